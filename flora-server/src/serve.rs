//! Connections: how many there may be, how slow they may be, and how they end.

use std::future::Future;
use std::io;
use std::pin::pin;
use std::sync::Arc;
use std::time::Duration;

use axum::Router;
use hyper::server::conn::http1;
use hyper_util::rt::{TokioIo, TokioTimer};
use hyper_util::server::graceful::{GracefulShutdown, Watcher};
use hyper_util::service::TowerToHyperService;
use tokio::io::{AsyncReadExt, AsyncWriteExt};
use tokio::net::{TcpListener, TcpStream};
use tokio::sync::{OwnedSemaphorePermit, Semaphore};
use tokio::task::JoinSet;
use tokio_io_timeout::TimeoutStream;

use crate::app::App;
use crate::error::ApiError;
use crate::options::Limits;
use crate::router::router;

/// The most refused connections that are given time to read why; more are just closed.
const REFUSALS: usize = 64;
/// That time.
const REFUSAL_TIMEOUT: Duration = Duration::from_secs(1);
/// How long nothing is accepted after the system couldn't give another connection.
const ACCEPT_PAUSE: Duration = Duration::from_millis(50);

/// Why nothing is served.
#[derive(Debug, thiserror::Error)]
#[non_exhaustive]
pub enum ServerError {
    /// The listener has no address.
    #[error("the listening socket can't be used: {0}")]
    Listener(#[source] io::Error),
}

/// Serves `app` to whoever connects to `listener` until `shutdown` is ready; then takes no more connections or requests, and
/// ends what still runs when the options' grace is over. Dropping the future ends everything at once.
///
/// # Errors
/// See [`ServerError`]. What goes wrong with one connection ends that connection only.
pub async fn serve(
    listener: TcpListener,
    app: Arc<App>,
    shutdown: impl Future<Output = ()>,
) -> Result<(), ServerError> {
    let address = listener.local_addr().map_err(ServerError::Listener)?;
    let options = app.options().clone();
    if let Some(warning) = options.warning(address) {
        tracing::warn!("{warning}");
    }
    let door = Door {
        router: router(Arc::clone(&app)),
        app,
        limits: options.limits,
        places: Arc::new(Semaphore::new(options.limits.connections.min(Semaphore::MAX_PERMITS))),
        refusals: Arc::new(Semaphore::new(REFUSALS)),
    };
    let graceful = GracefulShutdown::new();
    let mut connections = JoinSet::new();
    let mut shutdown = pin!(shutdown);
    loop {
        tokio::select! {
            biased;
            () = &mut shutdown => break,
            Some(_ended) = connections.join_next() => {}
            accepted = listener.accept() => match accepted {
                Ok((stream, _)) => door.enter(stream, graceful.watcher(), &mut connections),
                Err(error) if is_of_the_connection(&error) => {}
                // Out of file descriptors, mostly: others have to end first.
                Err(_) => tokio::time::sleep(ACCEPT_PAUSE).await,
            },
        }
    }
    drop(listener);
    // Past the deadline is as good as ended: the connections are dropped next, and with them their requests.
    let _ = tokio::time::timeout(options.grace, graceful.shutdown()).await;
    connections.shutdown().await;
    Ok(())
}

/// Where connections come in.
struct Door {
    router: Router,
    app: Arc<App>,
    limits: Limits,
    places: Arc<Semaphore>,
    refusals: Arc<Semaphore>,
}

impl Door {
    fn enter(&self, stream: TcpStream, watcher: Watcher, connections: &mut JoinSet<()>) {
        // Tokens are small, and each is worth a packet. Where it can't be set, they come later.
        let _ = stream.set_nodelay(true);
        if let Ok(place) = Arc::clone(&self.places).try_acquire_owned() {
            let open = Open::new(Arc::clone(&self.app), place);
            connections.spawn(connection(stream, self.router.clone(), self.limits, watcher, open));
            return;
        }
        self.app.metrics().refused_connections.inc();
        if let Ok(place) = Arc::clone(&self.refusals).try_acquire_owned() {
            connections.spawn(async move {
                // Whoever doesn't read why is refused all the same.
                let _ = tokio::time::timeout(REFUSAL_TIMEOUT, refuse(stream)).await;
                drop(place);
            });
        }
    }
}

/// A connection as the metrics count it.
struct Open {
    app: Arc<App>,
    _place: OwnedSemaphorePermit,
}

impl Open {
    fn new(app: Arc<App>, place: OwnedSemaphorePermit) -> Self {
        app.metrics().connections.inc();
        Self { app, _place: place }
    }
}

impl Drop for Open {
    fn drop(&mut self) {
        self.app.metrics().connections.dec();
    }
}

/// Serves one connection to its end. A client that closes its sending side counts as gone, and its requests are cancelled:
/// there is no other sign of a client that no longer waits.
async fn connection(stream: TcpStream, router: Router, limits: Limits, watcher: Watcher, open: Open) {
    let mut stream = TimeoutStream::new(stream);
    stream.set_write_timeout(Some(limits.write_timeout));
    let connection = http1::Builder::new()
        .timer(TokioTimer::new())
        .header_read_timeout(limits.header_timeout)
        .serve_connection(TokioIo::new(Box::pin(stream)), TowerToHyperService::new(router));
    // What went wrong with a connection is its client's to know.
    let _ = watcher.watch(connection).await;
    drop(open);
}

/// Tells a client that there is no place for it. Its request is read as long as it comes, because closing with something
/// unread would take the answer back.
async fn refuse(mut stream: TcpStream) -> io::Result<()> {
    let error = ApiError::NoPlace;
    let (status, body) = (error.status(), serde_json::to_string(&error.body())?);
    let head = format!(
        "HTTP/1.1 {status}\r\ncontent-type: application/json\r\ncontent-length: {}\r\nretry-after: 1\r\nconnection: close\r\n\r\n",
        body.len()
    );
    stream.write_all(&[head.as_bytes(), body.as_bytes()].concat()).await?;
    stream.shutdown().await?;
    let mut unread = [0; 1024];
    while stream.read(&mut unread).await? > 0 {}
    Ok(())
}

/// Whether accepting failed for one client's own reason.
fn is_of_the_connection(error: &io::Error) -> bool {
    use io::ErrorKind::{ConnectionAborted, ConnectionRefused, ConnectionReset};
    matches!(error.kind(), ConnectionAborted | ConnectionRefused | ConnectionReset)
}
