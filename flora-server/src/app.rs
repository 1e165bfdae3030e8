//! What answers draw on: the engine, how its model reads text, the options and the numbers.

use std::sync::Arc;

use flora_engine::EngineHandle;

use crate::answer::unix_seconds;
use crate::error::ApiError;
use crate::grammar::Grammars;
use crate::metrics::Metrics;
use crate::options::ServerOptions;
use crate::text::Text;

/// Longer than any folder's name.
const ADAPTER_NAME_BYTES: usize = 255;

/// One model behind the API, with the adapters of its engine.
#[derive(Debug)]
pub struct App {
    model: String,
    engine: EngineHandle,
    text: Text,
    options: ServerOptions,
    metrics: Metrics,
    grammars: Grammars,
    created: u64,
}

impl App {
    /// The base model is served under the name `model`, which goes before an adapter of the same name.
    #[must_use]
    pub fn new(
        model: impl Into<String>,
        engine: EngineHandle,
        text: impl Into<Text>,
        options: ServerOptions,
    ) -> Arc<Self> {
        let source = engine.clone();
        let adapters = engine.clone();
        let metrics = Metrics::new(move || source.metrics(), move || adapters.adapter_requests());
        let (model, text, grammars, created) = (model.into(), text.into(), Grammars::new(), unix_seconds());
        Arc::new(Self { model, engine, text, options, metrics, grammars, created })
    }

    pub(crate) fn model(&self) -> &str {
        &self.model
    }

    pub(crate) fn engine(&self) -> &EngineHandle {
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

    pub(crate) fn grammars(&self) -> &Grammars {
        &self.grammars
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
