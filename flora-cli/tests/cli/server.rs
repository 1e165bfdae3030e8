//! `flora serve` as a child process, and requests to it by hand.
#![cfg(unix)]

use std::ffi::OsStr;
use std::io::{BufRead, BufReader, Read, Write};
use std::net::TcpStream;
use std::process::{Child, ExitStatus, Stdio};

use serde_json::Value;
use tempfile::TempDir;

use super::command::command;

/// A server that listens.
pub(crate) struct Server {
    child: Child,
    address: String,
    /// What it said before it listened.
    pub(crate) said: String,
    _config: TempDir,
}

impl Server {
    /// Starts one with these arguments, of which one is `--port 0`.
    pub(crate) fn start<S: AsRef<OsStr>>(arguments: impl IntoIterator<Item = S>) -> Self {
        let config = tempfile::tempdir().expect("a temporary folder");
        let mut child = command(config.path())
            .arg("serve")
            .args(arguments)
            .stderr(Stdio::piped())
            .spawn()
            .expect("the binary starts");
        let mut lines = BufReader::new(child.stderr.take().expect("a pipe")).lines();
        let mut said = String::new();
        let address = loop {
            let line = lines.next().unwrap_or_else(|| panic!("it ended: {said}")).expect("text");
            if let Some((_, url)) = line.split_once("http://") {
                break url.trim_end_matches("/v1").to_owned();
            }
            said += &line;
        };
        Self { child, address, said, _config: config }
    }

    /// Where it listens.
    pub(crate) fn url(&self) -> String {
        format!("http://{}", self.address)
    }

    /// The whole answer to a request.
    fn ask(&self, request: &str) -> String {
        let mut stream = TcpStream::connect(&self.address).expect("the server listens");
        stream.write_all(request.as_bytes()).expect("it reads");
        let mut answer = String::new();
        stream.read_to_string(&mut answer).expect("it answers");
        answer
    }

    pub(crate) fn get(&self, path: &str) -> String {
        self.ask(&format!("GET {path} HTTP/1.1\r\nhost: x\r\nconnection: close\r\n\r\n"))
    }

    pub(crate) fn post(&self, path: &str, body: &Value) -> String {
        let body = body.to_string();
        self.ask(&format!(
            "POST {path} HTTP/1.1\r\nhost: x\r\ncontent-type: application/json\r\ncontent-length: {}\r\n\
             connection: close\r\n\r\n{body}",
            body.len()
        ))
    }

    /// Asks it to end and waits until it has.
    pub(crate) fn stop(mut self) -> ExitStatus {
        let killed = std::process::Command::new("kill").arg(self.child.id().to_string()).status();
        assert!(killed.expect("kill is there").success());
        self.child.wait().expect("it ends")
    }
}

impl Drop for Server {
    /// A test that failed leaves no server behind; one that was stopped has ended.
    fn drop(&mut self) {
        let _ = self.child.kill();
        let _ = self.child.wait();
    }
}
