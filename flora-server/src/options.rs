//! What a server may be told: who may ask, and how much of anything.

use std::fmt;
use std::net::SocketAddr;
use std::time::Duration;

use axum::http::HeaderValue;
use subtle::ConstantTimeEq;

use crate::updates::AdapterUpdates;

/// How a server answers.
#[derive(Clone, Debug)]
pub struct ServerOptions {
    /// What a client must send as `Authorization: Bearer KEY`; `None` lets everyone in. `/health` is open in either case.
    pub api_key: Option<ApiKey>,
    /// What a client may take of everything.
    pub limits: Limits,
    /// How long running requests may go on after a shutdown was asked for.
    pub grace: Duration,
    /// Whose pages may ask, beside the server's own.
    pub origins: AllowedOrigins,
    /// How clients may load adapters and unload them, where they may.
    pub adapter_updates: Option<AdapterUpdates>,
}

/// The origins of web pages that a browser lets ask (CORS).
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub enum AllowedOrigins {
    /// None but the server's own.
    #[default]
    Own,
    /// Every one.
    Any,
    /// These.
    Some(Vec<HeaderValue>),
}

/// An origin that no page has.
#[derive(Clone, Debug, PartialEq, Eq, thiserror::Error)]
#[error("`{0}` is no origin; it is a scheme, a host and perhaps a port, such as http://localhost:3000, or * for all")]
pub struct InvalidOrigin(String);

impl AllowedOrigins {
    /// Of origins as browsers write them, `*` being all.
    ///
    /// # Errors
    /// One that isn't so written.
    pub fn parse<S: AsRef<str>>(origins: &[S]) -> Result<Self, InvalidOrigin> {
        if origins.iter().any(|origin| origin.as_ref() == "*") {
            return Ok(Self::Any);
        }
        let origin = |origin: &S| {
            let origin = origin.as_ref();
            let host = origin.split_once("://").map(|(_, host)| host);
            let is_one = host.is_some_and(|host| !host.is_empty() && !host.contains(['/', '?', '#', '*', ' ']));
            let value = HeaderValue::from_str(origin).ok().filter(|_| is_one);
            value.ok_or_else(|| InvalidOrigin(origin.to_owned()))
        };
        match origins {
            [] => Ok(Self::Own),
            origins => origins.iter().map(origin).collect::<Result<_, _>>().map(Self::Some),
        }
    }
}

impl Default for ServerOptions {
    fn default() -> Self {
        let (limits, grace) = (Limits::default(), Duration::from_secs(30));
        Self { api_key: None, limits, grace, origins: AllowedOrigins::Own, adapter_updates: None }
    }
}

impl ServerOptions {
    /// What is wrong with serving at `address`, for people: anyone may ask who reaches a machine that has no key.
    #[must_use]
    pub fn warning(&self, address: SocketAddr) -> Option<String> {
        let exposed = self.api_key.is_none() && !address.ip().is_loopback();
        exposed.then(|| {
            format!("{address} can be reached from other machines and no API key is set: anyone there may ask; set a key, or bind to 127.0.0.1")
        })
    }
}

/// What one client may take. How many requests may wait is the engine's to say.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Limits {
    /// Bytes of a request's body.
    pub body_bytes: usize,
    /// Tokens of a prompt; the model's context is a limit too.
    pub prompt_tokens: usize,
    /// Choices of one request: its prompts times its `n`.
    pub choices: usize,
    /// Those of them that the engine has at a time; the others follow.
    pub choices_at_once: usize,
    /// Bytes of a schema, a regular expression, a list of choices or a grammar.
    pub grammar_bytes: usize,
    /// How long one of them may take to compile, with the time that it waits for others to be compiled.
    pub grammar_timeout: Duration,
    /// Connections at a time; a further one is told 503 and closed.
    pub connections: usize,
    /// From a connection's start, or the end of its last answer, to the end of the next request's header.
    pub header_timeout: Duration,
    /// For all of a request's body.
    pub body_timeout: Duration,
    /// How long a client may take nothing of what is sent to it.
    pub write_timeout: Duration,
    /// From a request's arrival to the end of its answer; what isn't said by then is cancelled. `None`: as long as it takes.
    pub request_timeout: Option<Duration>,
}

impl Default for Limits {
    fn default() -> Self {
        Self {
            body_bytes: 1 << 20,
            prompt_tokens: 1 << 17,
            choices: 4096,
            choices_at_once: 32,
            grammar_bytes: 1 << 17,
            grammar_timeout: Duration::from_secs(10),
            connections: 512,
            header_timeout: Duration::from_secs(30),
            body_timeout: Duration::from_secs(30),
            write_timeout: Duration::from_secs(60),
            request_timeout: None,
        }
    }
}

/// A secret that clients share with the server. Never printed.
#[derive(Clone)]
pub struct ApiKey(String);

impl ApiKey {
    /// A key.
    ///
    /// # Errors
    /// [`InvalidApiKey`] for what no client could send.
    pub fn new(key: impl Into<String>) -> Result<Self, InvalidApiKey> {
        let key = key.into();
        if key.is_empty() || !key.bytes().all(|byte| byte.is_ascii_graphic()) {
            Err(InvalidApiKey)
        } else {
            Ok(Self(key))
        }
    }

    /// Whether `given` is the key. How long that takes tells nothing but the key's length.
    pub(crate) fn is(&self, given: &[u8]) -> bool {
        self.0.as_bytes().ct_eq(given).into()
    }
}

impl fmt::Debug for ApiKey {
    fn fmt(&self, formatter: &mut fmt::Formatter<'_>) -> fmt::Result {
        formatter.write_str("ApiKey(…)")
    }
}

/// A key that can't stand in a header.
#[derive(Clone, Copy, Debug, PartialEq, Eq, thiserror::Error)]
#[error("an API key is one or more visible ASCII characters, without spaces")]
pub struct InvalidApiKey;

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_key_is_what_a_header_can_hold_and_is_not_printed() {
        for key in ["", "two words", "schlüssel", "line\n"] {
            assert!(ApiKey::new(key).is_err(), "{key:?}");
        }
        let key = ApiKey::new("sk-secret").unwrap();
        assert!(key.is(b"sk-secret"));
        for other in ["", "sk-secre", "sk-secrets", "SK-SECRET"] {
            assert!(!key.is(other.as_bytes()), "{other}");
        }
        assert!(!format!("{key:?}").contains("secret"));
    }

    #[test]
    fn origins_are_as_browsers_write_them() {
        assert_eq!(AllowedOrigins::parse::<&str>(&[]), Ok(AllowedOrigins::Own));
        assert_eq!(AllowedOrigins::parse(&["http://a", "*"]), Ok(AllowedOrigins::Any));
        let two = ["http://localhost:3000", "https://chat.example"];
        assert_eq!(AllowedOrigins::parse(&two), Ok(AllowedOrigins::Some(two.map(HeaderValue::from_static).into())));
        for wrong in ["", "localhost", "http://", "http://a/", "http://*.a", "http://a\n"] {
            assert_eq!(AllowedOrigins::parse(&[wrong]), Err(InvalidOrigin(wrong.to_owned())));
        }
    }

    #[test]
    fn only_an_open_door_is_warned_of() {
        let open = ServerOptions::default();
        let closed = ServerOptions { api_key: ApiKey::new("key").ok(), ..ServerOptions::default() };
        for (address, reachable) in
            [("127.0.0.1:1", false), ("[::1]:1", false), ("0.0.0.0:1", true), ("[::]:1", true), ("192.0.2.1:1", true)]
        {
            let address = address.parse().unwrap();
            assert_eq!(open.warning(address).is_some(), reachable, "{address}");
            assert_eq!(closed.warning(address), None);
        }
    }
}
