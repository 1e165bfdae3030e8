//! `/v1/load_lora_adapter` and `/v1/unload_lora_adapter`, as vLLM has them. They read any folder that a client names, and so are there
//! only where the operator allows it.

use std::fmt;
use std::path::{Path, PathBuf};
use std::sync::Arc;

use axum::extract::Request;
use axum::response::{IntoResponse, Response};
use serde::Deserialize;

use crate::app::{App, blocking};
use crate::body::{self, fields};
use crate::error::ApiError;
use crate::fields::{check_load, check_unload};

/// Puts an adapter's folder under a name, in place of another of the name where that is allowed.
type Load = dyn Fn(&str, &Path, bool) -> Result<(), UpdateError> + Send + Sync;
/// Takes a name away.
type Unload = dyn Fn(&str) -> Result<(), UpdateError> + Send + Sync;

/// How clients may change which adapters there are.
#[derive(Clone)]
pub struct AdapterUpdates {
    load: Arc<Load>,
    unload: Arc<Unload>,
}

/// Why adapters stay as they are.
#[derive(Clone, Debug, PartialEq, Eq, thiserror::Error)]
#[non_exhaustive]
pub enum UpdateError {
    /// There is one of the name.
    #[error("there is an adapter `{0}` already; set load_inplace to true to put another in its place")]
    Exists(String),
    /// There is none, or none that was loaded.
    #[error("no adapter `{0}` was loaded")]
    Unknown(String),
    /// It can't be used.
    #[error("the adapter `{name}` can't be used: {reason}")]
    Unusable {
        /// Its name.
        name: String,
        /// Why.
        reason: String,
    },
}

impl AdapterUpdates {
    /// `load` puts a folder under a name, and in place of what has it where its last argument says so; `unload` takes a name away that
    /// `load` gave. Both may read files.
    pub fn new(
        load: impl Fn(&str, &Path, bool) -> Result<(), UpdateError> + Send + Sync + 'static,
        unload: impl Fn(&str) -> Result<(), UpdateError> + Send + Sync + 'static,
    ) -> Self {
        Self { load: Arc::new(load), unload: Arc::new(unload) }
    }
}

impl fmt::Debug for AdapterUpdates {
    fn fmt(&self, formatter: &mut fmt::Formatter<'_>) -> fmt::Result {
        formatter.debug_struct("AdapterUpdates").finish_non_exhaustive()
    }
}

#[derive(Deserialize)]
struct LoadFields {
    lora_name: String,
    lora_path: PathBuf,
    load_inplace: Option<bool>,
}

#[derive(Deserialize)]
struct UnloadFields {
    lora_name: String,
}

/// Puts a folder under a name.
pub(crate) async fn load(app: Arc<App>, request: Request) -> Result<Response, ApiError> {
    let body = body::object(request, &app.options().limits).await?;
    blocking(move || {
        check_load(&body)?;
        let LoadFields { lora_name, lora_path, load_inplace } = fields(&body)?;
        let name = named(&app, &lora_name)?;
        let updates = app.options().adapter_updates.as_ref().ok_or(ApiError::UnknownPath)?;
        (updates.load)(name, &lora_path, load_inplace.unwrap_or(false))?;
        Ok(format!("Success: LoRA adapter '{name}' added successfully."))
    })
    .await
    .map(IntoResponse::into_response)
}

/// Takes a name away.
pub(crate) async fn unload(app: Arc<App>, request: Request) -> Result<Response, ApiError> {
    let body = body::object(request, &app.options().limits).await?;
    blocking(move || {
        check_unload(&body)?;
        let UnloadFields { lora_name } = fields(&body)?;
        let name = named(&app, &lora_name)?;
        let updates = app.options().adapter_updates.as_ref().ok_or(ApiError::UnknownPath)?;
        (updates.unload)(name)?;
        Ok(format!("Success: LoRA adapter '{name}' removed successfully."))
    })
    .await
    .map(IntoResponse::into_response)
}

/// A name that an adapter can have.
fn named<'a>(app: &App, name: &'a str) -> Result<&'a str, ApiError> {
    let wrong = |message: &str| ApiError::invalid("lora_name", message);
    match app.adapter(name) {
        Ok(Some(name)) => Ok(name),
        Ok(None) => Err(wrong("lora_name is the base model's name")),
        Err(_) => Err(wrong("lora_name must be a name without slashes, of up to 255 bytes")),
    }
}
