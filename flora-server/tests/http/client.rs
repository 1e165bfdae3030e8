//! The API as OpenAI's own client for Python takes it.
//!
//! `FLORA_OPENAI=required` fetches the client; without it this test uses what was fetched before, and says so when there is none.

use std::process::Stdio;

use flora_engine::Options;
use flora_server::{ApiKey, ServerOptions};

use crate::support::{PATIENCE, Server, Service};

const KEY: &str = "sk-test";

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn openais_client_is_answered() {
    let python = flora_toolchain::openai_client_from_environment()
        .expect("FLORA_OPENAI=required, but the openai package can't be had");
    let Some(python) = python else {
        eprintln!("NOT RUN: the openai package was not fetched; FLORA_OPENAI=required fetches it");
        return;
    };
    let options = ServerOptions { api_key: ApiKey::new(KEY).ok(), ..ServerOptions::default() };
    let server = Server::start(Service::with(options, Options::default())).await;
    let mut command = tokio::process::Command::from(python.command());
    command
        .arg(concat!(env!("CARGO_MANIFEST_DIR"), "/tests/openai_client.py"))
        .args([format!("http://{}/v1", server.address), KEY.to_owned()])
        .args((0..32).map(|number| format!("user{number}")))
        // A proxy of this machine would be asked for its own loopback.
        .env("NO_PROXY", "*")
        .stdin(Stdio::null())
        .kill_on_drop(true);
    let output = tokio::time::timeout(PATIENCE, command.output()).await.expect("the client hangs").unwrap();
    let said = [&output.stdout, &output.stderr].map(|bytes| String::from_utf8_lossy(bytes).into_owned()).join("\n");
    assert!(output.status.success() && said.contains("passed: 15"), "{said}");
    server.service.idle().await;
    server.stop().await;
}
