//! The paths of the API, who may ask at them, and what answers.

use std::sync::Arc;

use axum::extract::rejection::PathRejection;
use axum::extract::{MatchedPath, Path, Request, State};
use axum::http::{HeaderMap, Method, StatusCode, header};
use axum::middleware::{Next, from_fn_with_state};
use axum::response::{IntoResponse, Response};
use axum::routing::{get, post};
use axum::{Json, Router};
use prometheus_client::encoding::prometheus_text::CONTENT_TYPE;
use serde_json::{Value, json};
use tower_http::cors::{AllowOrigin, CorsLayer};

use crate::answer::{self, Endpoint};
use crate::app::{App, blocking};
use crate::error::ApiError;
use crate::generation;
use crate::options::AllowedOrigins;
use crate::page::page;
use crate::{tokenize, updates};

/// The API of `app` as a service. [`serve`](crate::serve) puts it on a socket and holds connections to their limits.
pub fn router(app: Arc<App>) -> Router {
    let open = Router::new()
        .route("/", get(page))
        .route("/health", get(health))
        .route("/ready", get(ready))
        .method_not_allowed_fallback(wrong_method);
    let updates = match app.options().adapter_updates {
        None => Router::new(),
        Some(_) => Router::new()
            .route("/v1/load_lora_adapter", post(load_adapter))
            .route("/v1/unload_lora_adapter", post(unload_adapter)),
    };
    let origins = origins(&app.options().origins);
    let router = Router::new()
        .route("/v1/completions", post(completions))
        .route("/v1/chat/completions", post(chat_completions))
        .route("/tokenize", post(tokenize))
        .route("/detokenize", post(detokenize))
        .route("/tokenizer_info", get(tokenizer_info))
        .merge(updates)
        .route("/v1/models", get(models))
        // Names of base models have slashes.
        .route("/v1/models/{*id}", get(model))
        .route("/metrics", get(metrics))
        .fallback(async || ApiError::UnknownPath)
        .method_not_allowed_fallback(wrong_method)
        .layer(from_fn_with_state(Arc::clone(&app), authorise))
        .merge(open)
        .layer(from_fn_with_state(Arc::clone(&app), count))
        .with_state(app);
    match origins {
        None => router,
        // Outermost, because a browser asks without a key whether it may.
        Some(origins) => router.layer(origins),
    }
}

/// What tells browsers whose pages may ask.
fn origins(allowed: &AllowedOrigins) -> Option<CorsLayer> {
    let origins = match allowed {
        AllowedOrigins::Own => return None,
        AllowedOrigins::Any => AllowOrigin::any(),
        AllowedOrigins::Some(origins) => AllowOrigin::list(origins.clone()),
    };
    let layer = CorsLayer::new().allow_origin(origins).allow_methods([Method::GET, Method::POST]);
    Some(layer.allow_headers([header::AUTHORIZATION, header::CONTENT_TYPE]))
}

async fn tokenize(State(app): State<Arc<App>>, request: Request) -> Result<Response, ApiError> {
    tokenize::tokenize(app, request).await
}

async fn detokenize(State(app): State<Arc<App>>, request: Request) -> Result<Response, ApiError> {
    tokenize::detokenize(app, request).await
}

async fn tokenizer_info(State(app): State<Arc<App>>) -> Json<Value> {
    tokenize::information(&app)
}

async fn load_adapter(State(app): State<Arc<App>>, request: Request) -> Result<Response, ApiError> {
    updates::load(app, request).await
}

async fn unload_adapter(State(app): State<Arc<App>>, request: Request) -> Result<Response, ApiError> {
    updates::unload(app, request).await
}

async fn completions(State(app): State<Arc<App>>, request: Request) -> Result<Response, ApiError> {
    generation::answer(app, Endpoint::Completions, request).await
}

async fn chat_completions(State(app): State<Arc<App>>, request: Request) -> Result<Response, ApiError> {
    generation::answer(app, Endpoint::Chat, request).await
}

async fn models(State(app): State<Arc<App>>) -> Result<Response, ApiError> {
    let adapters = adapters(&app).await?;
    Ok(Json(answer::models(app.model(), &adapters, app.created())).into_response())
}

async fn model(State(app): State<Arc<App>>, id: Result<Path<String>, PathRejection>) -> Result<Response, ApiError> {
    // What isn't UTF-8 is nobody's name.
    let Ok(Path(id)) = id else { return Err(ApiError::UnknownModel("\u{fffd}".to_owned())) };
    let base = match app.adapter(&id)? {
        None => None,
        Some(adapter) if adapters(&app).await?.iter().any(|name| name == adapter) => Some(app.model()),
        Some(_) => return Err(ApiError::UnknownModel(id)),
    };
    Ok(Json(answer::model(&id, base, app.created())).into_response())
}

/// The adapters that there are now.
async fn adapters(app: &Arc<App>) -> Result<Vec<String>, ApiError> {
    let app = Arc::clone(app);
    blocking(move || {
        // One that is called as the base model came after the start; the base model answers to the name.
        let mut names = app.engine().adapters();
        names.retain(|name| name != app.model());
        Ok(names)
    })
    .await
}

/// Whether requests are taken; open to all, because what asks restarts or replaces the server.
async fn health(State(app): State<Arc<App>>) -> Response {
    if app.engine().is_healthy() {
        Json(json!({"status": "ok"})).into_response()
    } else {
        (StatusCode::SERVICE_UNAVAILABLE, Json(json!({"status": "unavailable"}))).into_response()
    }
}

/// Whether a request that came now would be taken: what routes requests asks this, and what restarts servers asks `/health`.
async fn ready(State(app): State<Arc<App>>) -> Response {
    if app.engine().is_ready() {
        Json(json!({"status": "ready"})).into_response()
    } else {
        (StatusCode::SERVICE_UNAVAILABLE, Json(json!({"status": "busy"}))).into_response()
    }
}

async fn metrics(State(app): State<Arc<App>>) -> Response {
    match app.metrics().text() {
        Ok(text) => ([(header::CONTENT_TYPE, CONTENT_TYPE)], text).into_response(),
        Err(error) => (StatusCode::INTERNAL_SERVER_ERROR, error.to_string()).into_response(),
    }
}

async fn wrong_method() -> ApiError {
    ApiError::Method
}

/// Lets through who has the key, before anything of a body is read.
async fn authorise(State(app): State<Arc<App>>, request: Request, next: Next) -> Response {
    if let Some(key) = &app.options().api_key {
        match bearer(request.headers()) {
            None => return ApiError::NoKey.into_response(),
            Some(given) if !key.is(given) => return ApiError::WrongKey.into_response(),
            Some(_) => {}
        }
    }
    next.run(request).await
}

/// Counts every answer.
async fn count(State(app): State<Arc<App>>, request: Request, next: Next) -> Response {
    let method = request.method().clone();
    let path = request.extensions().get::<MatchedPath>().cloned();
    let response = next.run(request).await;
    app.metrics().answered(&method, path.as_ref().map(MatchedPath::as_str), response.status());
    response
}

/// The key that a client sends.
fn bearer(headers: &HeaderMap) -> Option<&[u8]> {
    let value = headers.get(header::AUTHORIZATION)?.as_bytes();
    let (scheme, key) = value.split_at_checked("Bearer ".len())?;
    scheme.eq_ignore_ascii_case(b"Bearer ").then_some(key)
}
