//! The page at `/`: a chat with two adapters side by side, the adapters, their memory and the running batch. One file without
//! anything from elsewhere; what it shows it asks of the API, with the key that its reader gives it.

use axum::http::header;
use axum::response::{IntoResponse, Response};

/// The page may ask this server alone, and nothing else may be loaded by it or embed it.
const POLICY: &str = "default-src 'none'; style-src 'unsafe-inline'; script-src 'unsafe-inline'; connect-src 'self'; \
                      img-src data:; base-uri 'none'; form-action 'none'; frame-ancestors 'none'";

/// The page, which is the same for everyone.
pub(crate) async fn page() -> Response {
    let headers = [
        (header::CONTENT_TYPE, "text/html; charset=utf-8"),
        (header::CONTENT_SECURITY_POLICY, POLICY),
        (header::X_CONTENT_TYPE_OPTIONS, "nosniff"),
        (header::CACHE_CONTROL, "no-cache"),
    ];
    (headers, include_str!("page.html")).into_response()
}
