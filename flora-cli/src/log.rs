//! What the crates below have to say, beside the command's own answers: warnings on standard error, and spans for a command that
//! listens to them.

use std::sync::OnceLock;

use tracing_subscriber::filter::LevelFilter;
use tracing_subscriber::layer::SubscriberExt;
use tracing_subscriber::util::SubscriberInitExt;
use tracing_subscriber::{Layer, Registry, reload};

type Listener = Box<dyn Layer<Registry> + Send + Sync>;

static LISTENER: OnceLock<reload::Handle<Option<Listener>, Registry>> = OnceLock::new();

/// To be called once, before anything else.
pub(crate) fn start() {
    let (listener, handle) = reload::Layer::new(None);
    let warnings = tracing_subscriber::fmt::layer()
        .with_writer(std::io::stderr)
        .with_target(false)
        .without_time()
        .with_ansi(false)
        .log_internal_errors(false)
        .with_filter(LevelFilter::INFO);
    tracing_subscriber::registry().with(listener).with(warnings).init();
    // Nobody has set it before.
    let _ = LISTENER.set(handle);
}

/// Has all spans told to `listener` from now on.
#[cfg_attr(not(feature = "serve"), expect(dead_code, reason = "no command listens"))]
pub(crate) fn listen(listener: impl Layer<Registry> + Send + Sync) {
    if let Some(handle) = LISTENER.get() {
        // It is there as long as the process.
        let _ = handle.reload(Some(Box::new(listener) as Listener));
    }
}
