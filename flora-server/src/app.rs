//! What answers draw on: the engine, how its model reads text, the options and the numbers.

use std::fmt;
use std::sync::Arc;

use flora_engine::Handle;

use crate::answer::unix_seconds;
use crate::chat::Message;
use crate::error::ApiError;
use crate::metrics::Metrics;
use crate::options::ServerOptions;

/// Longer than any folder's name.
const ADAPTER_NAME_BYTES: usize = 255;

/// What a client wrote to the tokens of a prompt; the error is said to the client.
type Read<T> = dyn Fn(&T) -> Result<Vec<u32>, String> + Send + Sync;

/// How a model reads text.
pub struct Text {
    plain: Box<Read<str>>,
    chat: Box<Read<[Message]>>,
    stop_tokens: Vec<u32>,
}

impl Text {
    /// `plain` gives the prompt that is a text as it stands, `chat` the one that a conversation becomes; what either says in its
    /// error is said to the client. `stop_tokens` end what the model says.
    pub fn new(
        plain: impl Fn(&str) -> Result<Vec<u32>, String> + Send + Sync + 'static,
        chat: impl Fn(&[Message]) -> Result<Vec<u32>, String> + Send + Sync + 'static,
        stop_tokens: Vec<u32>,
    ) -> Self {
        Self { plain: Box::new(plain), chat: Box::new(chat), stop_tokens }
    }

    pub(crate) fn plain(&self, text: &str) -> Result<Vec<u32>, String> {
        (self.plain)(text)
    }

    pub(crate) fn chat(&self, messages: &[Message]) -> Result<Vec<u32>, String> {
        (self.chat)(messages)
    }

    pub(crate) fn stop_tokens(&self) -> &[u32] {
        &self.stop_tokens
    }
}

impl fmt::Debug for Text {
    fn fmt(&self, formatter: &mut fmt::Formatter<'_>) -> fmt::Result {
        formatter.debug_struct("Text").field("stop_tokens", &self.stop_tokens).finish_non_exhaustive()
    }
}

/// One model behind the API, with the adapters of its engine.
#[derive(Debug)]
pub struct App {
    model: String,
    engine: Handle,
    text: Text,
    options: ServerOptions,
    metrics: Metrics,
    created: u64,
}

impl App {
    /// The base model is served under the name `model`, which goes before an adapter of the same name.
    #[must_use]
    pub fn new(model: impl Into<String>, engine: Handle, text: Text, options: ServerOptions) -> Arc<Self> {
        let source = engine.clone();
        let metrics = Metrics::new(move || source.metrics());
        Arc::new(Self { model: model.into(), engine, text, options, metrics, created: unix_seconds() })
    }

    pub(crate) fn model(&self) -> &str {
        &self.model
    }

    pub(crate) fn engine(&self) -> &Handle {
        &self.engine
    }

    pub(crate) fn text(&self) -> &Text {
        &self.text
    }

    pub(crate) fn options(&self) -> &ServerOptions {
        &self.options
    }

    pub(crate) fn metrics(&self) -> &Metrics {
        &self.metrics
    }

    /// When it began, in seconds since 1970.
    pub(crate) fn created(&self) -> u64 {
        self.created
    }

    /// The adapter that `model` names; none for the base model. Whether there is such an adapter is the engine's to say, but a
    /// name that could lead out of a folder is never even asked for.
    ///
    /// # Errors
    /// No adapter can have that name.
    pub(crate) fn adapter<'a>(&self, model: &'a str) -> Result<Option<&'a str>, ApiError> {
        if model == self.model {
            return Ok(None);
        }
        let leads_elsewhere = matches!(model, "" | "." | "..") || model.contains(['/', '\\', '\0']);
        if leads_elsewhere || model.len() > ADAPTER_NAME_BYTES {
            return Err(ApiError::UnknownModel(model.to_owned()));
        }
        Ok(Some(model))
    }
}

/// Runs `work` where it may take its time: reading a folder, or a long text.
///
/// # Errors
/// [`ApiError::Broken`] where it panics, or `work`'s own.
pub(crate) async fn blocking<T: Send + 'static>(
    work: impl FnOnce() -> Result<T, ApiError> + Send + 'static,
) -> Result<T, ApiError> {
    tokio::task::spawn_blocking(work).await.map_err(|_panic| ApiError::Broken)?
}
