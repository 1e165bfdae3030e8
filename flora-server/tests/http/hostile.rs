//! What a hostile client can send: it gets an error or a closed connection, and others are served.

use std::time::Duration;

use flora_engine::Options;
use flora_server::{ApiKey, Limits, ServerOptions};
use serde_json::json;
use tokio::io::AsyncWriteExt;

use crate::support::{MODEL, Server, Service, post_text, read_all};

const COMPLETIONS: &str = "/v1/completions";

/// The status of an answer as it came over the wire.
fn status(answer: &str) -> Option<u16> {
    answer.strip_prefix("HTTP/1.1 ")?.get(..3)?.parse().ok()
}

fn head(length: usize) -> String {
    format!(
        "POST {COMPLETIONS} HTTP/1.1\r\nhost: a\r\nconnection: close\r\ncontent-type: application/json\r\ncontent-length: {length}\r\n\r\n"
    )
}

/// A server that loses patience soon.
async fn impatient() -> Server {
    let soon = Duration::from_millis(200);
    let limits = Limits { header_timeout: soon, body_timeout: soon, ..Limits::default() };
    Server::start(Service::with(ServerOptions { limits, ..ServerOptions::default() }, Options::default())).await
}

#[tokio::test]
async fn a_huge_body_is_refused_whether_it_says_so_or_not() {
    let server = Server::start(Service::new()).await;
    let huge = " ".repeat(64 << 20);
    for announced in [head(huge.len()), head(1 << 50)] {
        let answer = server.exchange(&[announced.as_bytes(), huge.as_bytes()].concat()).await;
        assert_eq!(status(&answer), Some(413), "{answer}");
    }
    let chunked = head(0).replace("content-length: 0", "transfer-encoding: chunked");
    let chunk = format!("{:x}\r\n{huge}\r\n", huge.len());
    let answer = server.exchange(&[chunked.as_bytes(), chunk.as_bytes()].concat()).await;
    assert_eq!(status(&answer), Some(413), "{answer}");
    server.assert_alive().await;
    server.stop().await;
}

#[tokio::test]
async fn deep_json_is_refused() {
    let server = Server::start(Service::new()).await;
    let depth = 100_000;
    for body in [
        "[".repeat(depth),
        "{\"a\":".repeat(depth),
        format!("{{\"prompt\": {}", "[".repeat(depth)),
        format!("{{\"model\": \"{MODEL}\", \"prompt\": \"a\", \"x\": {}{}}}", "[".repeat(depth), "]".repeat(depth)),
    ] {
        let answer = server.exchange(&[head(body.len()).as_bytes(), body.as_bytes()].concat()).await;
        assert_eq!(status(&answer), Some(400), "{answer}");
    }
    server.assert_alive().await;
    server.stop().await;
}

#[tokio::test]
async fn slow_heads_and_bodies_are_cut_off() {
    let server = impatient().await;
    // Drips for as long as it can, as a client does that wants to hold a place.
    for (sent, drip, expected) in [
        ("GET /health HTTP/1.1\r\nx-slow: ", "y", [None, Some(408)]),
        ("", "", [None, Some(408)]),
        (head(1000).as_str(), " ", [Some(408), Some(408)]),
        (head(1000).as_str(), "", [Some(408), Some(408)]),
    ] {
        let mut stream = server.connect().await;
        stream.write_all(sent.as_bytes()).await.unwrap();
        let (mut reading, mut writing) = stream.into_split();
        let drips = tokio::spawn(async move {
            while writing.write_all(drip.as_bytes()).await.is_ok() {
                tokio::time::sleep(Duration::from_millis(10)).await;
            }
        });
        let answer = read_all(&mut reading).await;
        drips.abort();
        assert!(expected.contains(&status(&answer)), "{sent:?}: {answer}");
    }
    server.service.idle().await;
    server.assert_alive().await;
    server.stop().await;
}

#[tokio::test]
async fn what_is_no_http_is_refused() {
    let server = Server::start(Service::new()).await;
    let many = "x-many: y\r\n".repeat(10_000);
    let long = "y".repeat(10 << 20);
    for (request, expected) in [
        ("\x16\x03\x01\x02\x00 hello\r\n\r\n".to_owned(), [Some(400), None]),
        ("GET\r\n\r\n".to_owned(), [Some(400), None]),
        ("GET /health HTTP/9.9\r\n\r\n".to_owned(), [Some(400), None]),
        ("PRI * HTTP/2.0\r\n\r\nSM\r\n\r\n".to_owned(), [Some(400), None]),
        (format!("GET /health HTTP/1.1\r\nhost: a\r\n{many}\r\n"), [Some(431), None]),
        (format!("GET /health HTTP/1.1\r\nhost: a\r\nx-long: {long}\r\n\r\n"), [Some(431), None]),
        (format!("GET /{long} HTTP/1.1\r\nhost: a\r\n\r\n"), [Some(431), Some(414)]),
        (head(0).replace("content-length: 0", "content-length: -1"), [Some(400), None]),
        (head(0).replace("content-length: 0", "content-length: 1\r\ncontent-length: 2"), [Some(400), None]),
    ] {
        let answer = server.exchange(request.as_bytes()).await;
        let shown = &request[..request.len().min(60)];
        assert!(expected.contains(&status(&answer)), "{shown:?}: {answer}");
    }
    server.assert_alive().await;
    server.stop().await;
}

#[tokio::test]
async fn invalid_utf8_is_refused() {
    let server = Server::start(Service::new()).await;
    let body = b"{\"model\": \"test/parrot\", \"prompt\": \"\xc3\x28\"}";
    let answer = server.exchange(&[head(body.len()).as_bytes(), body].concat()).await;
    assert_eq!(status(&answer), Some(400), "{answer}");
    server.stop().await;
}

#[tokio::test]
async fn a_body_that_is_cut_is_nobodys_request() {
    let server = Server::start(Service::new()).await;
    let whole = post_text(COMPLETIONS, &json!({"model": MODEL, "prompt": "abc"}));
    for cut in [1, whole.len() / 2, whole.len() - 1] {
        let mut stream = server.connect().await;
        stream.write_all(&whole.as_bytes()[..cut]).await.unwrap();
        stream.shutdown().await.unwrap();
        let answer = read_all(&mut stream).await;
        assert!(matches!(status(&answer), None | Some(400)), "{answer}");
    }
    assert_eq!(server.service.engine.metrics().finished, 0);
    server.assert_alive().await;
    server.stop().await;
}

#[tokio::test]
async fn an_answer_before_the_body_says_that_the_connection_ends() {
    let options = ServerOptions { api_key: ApiKey::new("key").ok(), ..ServerOptions::default() };
    let server = Server::start(Service::with(options, Options::default())).await;
    for (path, key, content_type, expected) in [
        (COMPLETIONS, "wrong", "application/json", 401),
        (COMPLETIONS, "key", "text/plain", 415),
        ("/nowhere", "key", "application/json", 404),
        ("/v1/models", "key", "application/json", 405),
    ] {
        let mut stream = server.connect().await;
        let head = format!(
            "POST {path} HTTP/1.1\r\nhost: a\r\nauthorization: Bearer {key}\r\ncontent-type: {content_type}\r\n\
             content-length: 10\r\n\r\n"
        );
        // The body comes in a packet of its own, as clients send it, and too late.
        stream.write_all(head.as_bytes()).await.unwrap();
        let answer = read_all(&mut stream).await;
        assert_eq!(status(&answer), Some(expected), "{answer}");
        assert!(answer.contains("\r\nconnection: close\r\n"), "{answer}");
    }
    server.stop().await;
}
