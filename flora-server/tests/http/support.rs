//! A server with a small model behind it: asked without a socket, or over one.

use std::net::SocketAddr;
use std::sync::Arc;
use std::time::Duration;

use axum::body::Body;
use axum::http::{HeaderMap, Request, StatusCode};
use flora_engine::{Engine, EngineHandle, Options};
use flora_server::{App, Next, ServerError, ServerOptions, Text, router, serve};
use serde_json::Value;
use tokio::io::{AsyncRead, AsyncReadExt, AsyncWriteExt};
use tokio::net::{TcpListener, TcpStream};
use tokio::sync::oneshot;
use tokio::task::JoinHandle;
use tower::ServiceExt;

use crate::model::{CONTEXT, END_TOKEN, Gate, Names, Parrot};

/// The base model's name.
pub(crate) const MODEL: &str = "test/parrot";
/// Longer than anything here takes on a loaded machine; a test that waits so long has failed.
pub(crate) const PATIENCE: Duration = Duration::from_secs(120);

/// A model with its API.
pub(crate) struct Service {
    pub(crate) gate: Gate,
    pub(crate) app: Arc<App>,
    pub(crate) engine: EngineHandle,
    /// Stops the engine when dropped.
    _engine: Engine,
}

impl Drop for Service {
    fn drop(&mut self) {
        // The engine ends after the step that it is at.
        self.gate.open();
    }
}

impl Service {
    pub(crate) fn new() -> Self {
        Self::with(ServerOptions::default(), Options::default())
    }

    pub(crate) fn with(options: ServerOptions, engine: Options) -> Self {
        let gate = Gate::default();
        let engine = Options { cache_tokens: 40 * CONTEXT as usize, ..engine };
        let engine = Engine::start(Parrot::new(gate.clone()), Names, Parrot::vocabulary(), engine).unwrap();
        let tokens = |text: &str| text.bytes().map(u32::from).collect();
        let text = Text::new(
            move |text| Ok(tokens(text)),
            move |conversation| {
                let contents: Vec<_> = conversation.messages.iter().map(|message| message.content.joined()).collect();
                if contents.iter().any(|content| content == "unspeakable") {
                    return Err("that can't be said".to_owned());
                }
                // What is to come and the variables are seen in what the model says.
                let next = match conversation.next {
                    Next::Answer => "",
                    Next::Anything => "*",
                    Next::Rest => "+",
                };
                let variables: Vec<_> =
                    conversation.variables.iter().map(|(name, value)| format!("{name}={value};")).collect();
                Ok(tokens(&format!("{}{next}{}", contents.join("|"), variables.concat())))
            },
            vec![END_TOKEN],
            |token| u8::try_from(token).map_or_else(|_| b"<end>".to_vec(), |byte| vec![byte]),
        );
        let app = App::new(MODEL, engine.handle(), text, options);
        Self { gate, app, engine: engine.handle(), _engine: engine }
    }

    /// Asks without a socket.
    pub(crate) async fn ask(&self, request: Request<Body>) -> Answer {
        let response = router(Arc::clone(&self.app)).oneshot(request).await.unwrap();
        let (parts, body) = response.into_parts();
        let bytes = axum::body::to_bytes(body, usize::MAX).await.unwrap();
        Answer { status: parts.status, headers: parts.headers, text: String::from_utf8(bytes.to_vec()).unwrap() }
    }

    pub(crate) async fn get(&self, path: &str) -> Answer {
        self.ask(Request::get(path).body(Body::empty()).unwrap()).await
    }

    pub(crate) async fn post(&self, path: &str, body: &Value) -> Answer {
        self.post_bytes(path, body.to_string()).await
    }

    pub(crate) async fn post_bytes(&self, path: &str, body: impl Into<Body>) -> Answer {
        let request = Request::post(path).header("content-type", "application/json");
        self.ask(request.body(body.into()).unwrap()).await
    }

    /// How many connections are open.
    pub(crate) async fn connections(&self) -> usize {
        let scrape = self.get("/metrics").await.text;
        let line = scrape.lines().find_map(|line| line.strip_prefix("flora_http_connections "));
        line.unwrap().parse().unwrap()
    }

    /// Waits until so many connections are open.
    pub(crate) async fn until_connections(&self, count: usize) {
        patiently(async {
            while self.connections().await != count {
                tokio::time::sleep(Duration::from_millis(2)).await;
            }
        })
        .await;
    }

    /// Waits until nothing runs or waits in the engine.
    pub(crate) async fn idle(&self) {
        self.until(|service| {
            let metrics = service.engine.metrics();
            metrics.running + metrics.waiting == 0
        })
        .await;
    }

    /// Waits until `condition` holds.
    pub(crate) async fn until(&self, condition: impl Fn(&Self) -> bool) {
        patiently(async {
            while !condition(self) {
                tokio::time::sleep(Duration::from_millis(2)).await;
            }
        })
        .await;
    }
}

/// Fails instead of waiting for ever.
pub(crate) async fn patiently<T>(future: impl Future<Output = T>) -> T {
    tokio::time::timeout(PATIENCE, future).await.expect("nothing happened for too long")
}

/// What was answered.
#[derive(Debug)]
pub(crate) struct Answer {
    pub(crate) status: StatusCode,
    pub(crate) headers: HeaderMap,
    pub(crate) text: String,
}

impl Answer {
    pub(crate) fn json(&self) -> Value {
        serde_json::from_str(&self.text).unwrap_or_else(|error| panic!("{error} in {}", self.text))
    }

    /// The `error` object of an answer with `status`.
    pub(crate) fn error(&self, status: u16) -> Value {
        assert_eq!(self.status.as_u16(), status, "{}", self.text);
        let error = self.json()["error"].clone();
        assert!(error["message"].is_string() && error["type"].is_string(), "{error}");
        for field in ["param", "code"] {
            assert!(error.get(field).is_some_and(|value| value.is_null() || value.is_string()), "{error}");
        }
        error
    }

    /// The data of server-sent events, each with its event's name.
    pub(crate) fn events(&self) -> Vec<(String, String)> {
        assert_eq!(self.headers["content-type"], "text/event-stream");
        let events = self.text.split_terminator("\n\n").map(|event| {
            let field = |name: &str| event.lines().find_map(|line| line.strip_prefix(name)).unwrap_or_default();
            (field("event: ").to_owned(), field("data: ").to_owned())
        });
        events.collect()
    }

    /// The chunks of a stream that ended as it should.
    pub(crate) fn chunks(&self) -> Vec<Value> {
        assert_eq!(self.status, 200, "{}", self.text);
        let mut events = self.events();
        assert_eq!(events.pop().map(|(_, data)| data).as_deref(), Some("[DONE]"));
        events.iter().map(|(_, data)| serde_json::from_str(data).unwrap()).collect()
    }
}

/// A server on a socket.
pub(crate) struct Server {
    pub(crate) service: Service,
    pub(crate) address: SocketAddr,
    shutdown: oneshot::Sender<()>,
    ended: JoinHandle<Result<(), ServerError>>,
}

impl Server {
    pub(crate) async fn start(service: Service) -> Self {
        let listener = TcpListener::bind("127.0.0.1:0").await.unwrap();
        let address = listener.local_addr().unwrap();
        let (shutdown, asked) = oneshot::channel();
        let app = Arc::clone(&service.app);
        let ended = tokio::spawn(serve(listener, app, async move {
            let _ = asked.await;
        }));
        Self { service, address, shutdown, ended }
    }

    pub(crate) async fn connect(&self) -> TcpStream {
        patiently(TcpStream::connect(self.address)).await.unwrap()
    }

    /// Sends `bytes` on a connection of their own, and gives all that comes back.
    pub(crate) async fn exchange(&self, bytes: &[u8]) -> String {
        let mut stream = self.connect().await;
        // A server may answer, and close, before it has read all.
        let _ = stream.write_all(bytes).await;
        read_all(&mut stream).await
    }

    /// Whether another client is served.
    pub(crate) async fn assert_alive(&self) {
        let answer = self.exchange(b"GET /health HTTP/1.1\r\nhost: a\r\nconnection: close\r\n\r\n").await;
        assert!(answer.starts_with("HTTP/1.1 200 "), "{answer}");
    }

    /// Asks it to stop.
    pub(crate) fn ask_to_stop(self) -> (Service, JoinHandle<Result<(), ServerError>>) {
        self.shutdown.send(()).unwrap();
        (self.service, self.ended)
    }

    /// Stops it.
    pub(crate) async fn stop(self) {
        let (_service, ended) = self.ask_to_stop();
        patiently(ended).await.unwrap().unwrap();
    }
}

/// All that comes until the other side closes, in whatever way.
pub(crate) async fn read_all(stream: &mut (impl AsyncRead + Unpin)) -> String {
    let mut bytes = Vec::new();
    let mut buffer = [0; 4096];
    while let Ok(count @ 1..) = patiently(stream.read(&mut buffer)).await {
        bytes.extend_from_slice(&buffer[..count]);
    }
    String::from_utf8_lossy(&bytes).into_owned()
}

/// A POST of `body` as it goes over the wire.
pub(crate) fn post_text(path: &str, body: &Value) -> String {
    let body = body.to_string();
    format!(
        "POST {path} HTTP/1.1\r\nhost: a\r\nconnection: close\r\ncontent-type: application/json\r\ncontent-length: {}\r\n\r\n{body}",
        body.len()
    )
}
