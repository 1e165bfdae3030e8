//! What a server may be told: who may ask, and how much of anything.

use std::fmt;
use std::net::SocketAddr;
use std::time::Duration;

use subtle::ConstantTimeEq;

/// How a server answers.
#[derive(Clone, Debug)]
pub struct ServerOptions {
    /// What a client must send as `Authorization: Bearer KEY`; `None` lets everyone in. `/health` is open in either case.
    pub api_key: Option<ApiKey>,
    /// What a client may take of everything.
    pub limits: Limits,
    /// How long running requests may go on after a shutdown was asked for.
    pub grace: Duration,
}

impl Default for ServerOptions {
    fn default() -> Self {
        Self { api_key: None, limits: Limits::default(), grace: Duration::from_secs(30) }
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
    /// Connections at a time; a further one is told 503 and closed.
    pub connections: usize,
    /// From a connection's start, or the end of its last answer, to the end of the next request's header.
    pub header_timeout: Duration,
    /// For all of a request's body.
    pub body_timeout: Duration,
    /// How long a client may take nothing of what is sent to it.
    pub write_timeout: Duration,
}

impl Default for Limits {
    fn default() -> Self {
        Self {
            body_bytes: 1 << 20,
            prompt_tokens: 1 << 17,
            choices: 4096,
            choices_at_once: 32,
            connections: 512,
            header_timeout: Duration::from_secs(30),
            body_timeout: Duration::from_secs(30),
            write_timeout: Duration::from_secs(60),
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
