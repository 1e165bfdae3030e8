//! `flora serve`: the OpenAI API over HTTP.

use std::net::IpAddr;
use std::time::Duration;

use clap::Args;
use flora_engine::AdapterFailure;
use flora_model::AdapterDirectory;
use flora_server::{
    AdapterUpdates, AllowedOrigins, ApiKey, App, Limits, ServerOptions, Text, UpdateError, serve as serve_http,
};

use super::{ModelArguments, start};
use crate::commands::error::CommandError;
use crate::commands::output;

/// Serve the OpenAI API, an adapter for every request
#[derive(Args)]
pub(crate) struct Arguments {
    #[command(flatten)]
    model: ModelArguments,
    /// The name of an adapter whose whole weights are kept beside the base model's, for the requests of an adapter that most are for
    #[arg(long, value_name = "NAME", requires = "sources")]
    merge: Option<String>,
    /// The address to listen at
    #[arg(long, default_value = "127.0.0.1")]
    host: IpAddr,
    /// The port; 0 takes any that is free
    #[arg(long, default_value = "8000")]
    port: u16,
    /// What clients have to send as `Authorization: Bearer KEY`
    #[arg(long, env = "FLORA_API_KEY", hide_env_values = true)]
    api_key: Option<String>,
    /// The name of the base model; the folder's, or the file's without .gguf, unless given
    #[arg(long, visible_alias = "served-model-name")]
    served_name: Option<String>,
    /// KiB of a request's body
    #[arg(long, default_value = "1024", value_name = "KIB", value_parser = clap::value_parser!(u32).range(1..))]
    body_limit: u32,
    /// Connections at a time
    #[arg(long, default_value = "512", value_parser = clap::value_parser!(u32).range(1..))]
    connections: u32,
    /// Seconds that a whole request may take; as long as it takes unless given
    #[arg(long, value_name = "SECONDS", value_parser = clap::value_parser!(u32).range(1..))]
    request_timeout: Option<u32>,
    /// An origin whose web pages may ask, such as http://localhost:3000, or * for all; may be given several times
    #[arg(long, value_name = "ORIGIN")]
    allowed_origin: Vec<String>,
    /// Let clients load adapters from any folder that this process can read, and unload them
    #[arg(long)]
    allow_lora_updates: bool,
    /// Seconds that running requests get to end in after an interrupt
    #[arg(long, default_value = "30", value_name = "SECONDS")]
    grace: u64,
}

pub(crate) fn serve(arguments: &Arguments) -> Result<(), CommandError> {
    let api_key = arguments.api_key.as_deref().map(ApiKey::new).transpose()?;
    let serving = start(&arguments.model, arguments.merge.as_deref())?;
    let name = arguments.served_name.clone().unwrap_or_else(|| serving.name.clone());
    let limits = Limits {
        body_bytes: arguments.body_limit as usize * 1024,
        connections: arguments.connections as usize,
        request_timeout: arguments.request_timeout.map(|seconds| Duration::from_secs(seconds.into())),
        ..Limits::default()
    };
    let options = ServerOptions {
        api_key,
        limits,
        grace: Duration::from_secs(arguments.grace),
        origins: AllowedOrigins::parse(&arguments.allowed_origin)?,
        adapter_updates: arguments.allow_lora_updates.then(|| updates(&serving.adapters)),
    };
    if serving.engine.handle().adapters().contains(&name) {
        return Err(CommandError::AdapterNamedAsModel(name));
    }
    let adapters = serving.adapters.clone();
    let text = Text::with_adapters(serving.tokenizer.clone(), move |name| adapters.folder_of(name));
    let app = App::new(&*name, serving.engine.handle(), text, options);
    let runtime = tokio::runtime::Builder::new_current_thread().enable_all().build().map_err(CommandError::Listen)?;
    runtime.block_on(async {
        let address = (arguments.host, arguments.port);
        let listener = tokio::net::TcpListener::bind(address).await.map_err(CommandError::Listen)?;
        let bound = listener.local_addr().map_err(CommandError::Listen)?;
        output::note(&format!("{name} on {}\nlistening at http://{bound}/v1", serving.device));
        serve_http(listener, app, interrupted()).await.map_err(CommandError::from)
    })?;
    serving.engine.handle().shutdown(Duration::from_secs(arguments.grace));
    serving.engine.join();
    Ok(())
}

/// Adapters that clients load and unload.
fn updates(adapters: &AdapterDirectory) -> AdapterUpdates {
    let (loading, unloading) = (adapters.clone(), adapters.clone());
    AdapterUpdates::new(
        move |name, folder, replaces| loading.load(name, folder, replaces).map_err(told),
        move |name| unloading.unload(name).map_err(told),
    )
}

fn told(error: flora_model::UpdateError) -> UpdateError {
    use flora_model::UpdateError as Found;
    match error {
        Found::Exists(name) => UpdateError::Exists(name),
        Found::Unknown(name) | Found::Unusable(AdapterFailure::Unknown(name)) => UpdateError::Unknown(name),
        Found::Unusable(AdapterFailure::Unusable { name, reason }) => UpdateError::Unusable { name, reason },
        other => UpdateError::Unusable { name: String::new(), reason: other.to_string() },
    }
}

/// Ready when the process is asked to end.
async fn interrupted() {
    let interrupt = tokio::signal::ctrl_c();
    #[cfg(unix)]
    {
        use tokio::signal::unix::{SignalKind, signal};
        if let Ok(mut terminate) = signal(SignalKind::terminate()) {
            tokio::select! {
                _ = interrupt => {}
                _ = terminate.recv() => {}
            }
            return;
        }
    }
    // Where the signal can't be waited for, the process ends by it all the same.
    if interrupt.await.is_err() {
        std::future::pending::<()>().await;
    }
}
