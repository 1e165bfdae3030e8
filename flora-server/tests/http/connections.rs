//! Many connections, clients that leave, and the server's end.

use std::time::Duration;

use flora_engine::Options;
use flora_server::{Limits, ServerOptions};
use serde_json::json;
use tokio::io::{AsyncReadExt, AsyncWriteExt};
use tokio::net::TcpStream;

use crate::support::{MODEL, Server, Service, patiently, post_text, read_all};

const COMPLETIONS: &str = "/v1/completions";
const HEALTH: &[u8] = b"GET /health HTTP/1.1\r\nhost: a\r\nconnection: close\r\n\r\n";

fn options(limits: Limits) -> ServerOptions {
    ServerOptions { limits, ..ServerOptions::default() }
}

/// A request that goes on for ever, or nearly so.
fn endless(stream: bool) -> String {
    post_text(COMPLETIONS, &json!({"model": MODEL, "prompt": "abc", "max_tokens": 60_000, "stream": stream}))
}

/// Reads until `text` has come.
async fn read_to(stream: &mut TcpStream, text: &str) -> String {
    let mut read = Vec::new();
    let mut buffer = [0; 1024];
    loop {
        let count = patiently(stream.read(&mut buffer)).await.unwrap();
        assert!(count > 0, "it ended with {}", String::from_utf8_lossy(&read));
        read.extend_from_slice(&buffer[..count]);
        let so_far = String::from_utf8_lossy(&read);
        if so_far.contains(text) {
            return so_far.into_owned();
        }
    }
}

/// Both ends of 1,000 connections are this process's.
async fn connect_a_thousand(server: &Server) -> Vec<TcpStream> {
    let descriptors = rlimit::increase_nofile_limit(4096).unwrap();
    assert!(descriptors >= 2200, "this test needs 2,200 file descriptors, and may have {descriptors}");
    let mut connections = Vec::with_capacity(1000);
    for _ in 0..1000 {
        connections.push(server.connect().await);
    }
    connections
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_thousand_connections_leave_others_served() {
    let server =
        Server::start(Service::with(options(Limits { connections: 1100, ..Limits::default() }), Options::default()))
            .await;
    let mut connections = connect_a_thousand(&server).await;
    // Half of them begin a request and leave it there.
    for connection in connections.iter_mut().step_by(2) {
        connection.write_all(&HEALTH[..20]).await.unwrap();
    }
    server.assert_alive().await;
    for (number, mut connection) in connections.into_iter().enumerate() {
        let rest = if number % 2 == 0 { &HEALTH[20..] } else { HEALTH };
        connection.write_all(rest).await.unwrap();
        let answer = read_all(&mut connection).await;
        assert!(answer.starts_with("HTTP/1.1 200 "), "{number}: {answer}");
    }
    server.stop().await;
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn more_connections_than_there_are_places_are_refused_at_once() {
    let server =
        Server::start(Service::with(options(Limits { connections: 10, ..Limits::default() }), Options::default()))
            .await;
    let mut held = Vec::new();
    for _ in 0..10 {
        let mut connection = server.connect().await;
        connection.write_all(endless(true).as_bytes()).await.unwrap();
        read_to(&mut connection, "data: ").await;
        held.push(connection);
    }
    let mut told = 0;
    for mut refused in connect_a_thousand(&server).await {
        let _ = refused.write_all(HEALTH).await;
        let answer = read_all(&mut refused).await;
        assert!(answer.is_empty() || answer.starts_with("HTTP/1.1 503 "), "{answer}");
        if !answer.is_empty() {
            assert!(answer.contains("\"too_many_connections\""), "{answer}");
            told += 1;
        }
    }
    assert!(told > 0);
    let scrape = server.service.get("/metrics").await.text;
    assert!(scrape.contains("flora_http_connections 10\n"), "{scrape}");
    assert!(scrape.contains("flora_http_connections_refused_total 1000\n"), "{scrape}");
    drop(held);
    server.service.idle().await;
    // The places are given back by those that left.
    patiently(async {
        while !server.exchange(HEALTH).await.starts_with("HTTP/1.1 200 ") {
            tokio::time::sleep(Duration::from_millis(2)).await;
        }
    })
    .await;
    server.stop().await;
}

#[tokio::test]
async fn a_client_that_leaves_cancels_its_request() {
    let server = Server::start(Service::new()).await;
    for (number, (stream, half)) in [(true, false), (true, true), (false, false), (false, true)].into_iter().enumerate()
    {
        let mut connection = server.connect().await;
        connection.write_all(endless(stream).as_bytes()).await.unwrap();
        if stream {
            read_to(&mut connection, "data: ").await;
        } else {
            server.service.until(|service| service.engine.metrics().running == 1).await;
        }
        if half {
            // Only its sending side is closed: it may read on, but counts as gone.
            connection.shutdown().await.unwrap();
            read_all(&mut connection).await;
        } else {
            drop(connection);
        }
        server.service.idle().await;
        let metrics = server.service.engine.metrics();
        assert_eq!((metrics.cancelled, metrics.finished), (number as u64 + 1, 0));
    }
    server.assert_alive().await;
    server.stop().await;
}

#[tokio::test]
async fn a_client_that_leaves_while_it_waits_is_forgotten() {
    let server = Server::start(Service::new()).await;
    server.service.gate.close();
    let mut connections = Vec::new();
    for _ in 0..50 {
        let mut connection = server.connect().await;
        connection.write_all(endless(false).as_bytes()).await.unwrap();
        connections.push(connection);
    }
    server.service.until_connections(50).await;
    drop(connections);
    server.service.until_connections(0).await;
    server.service.gate.open();
    server.service.idle().await;
    assert_eq!(server.service.engine.metrics().finished, 0);
    server.stop().await;
}

#[tokio::test]
async fn a_client_that_reads_nothing_is_cut_off() {
    let limits = Limits { write_timeout: Duration::from_millis(200), ..Limits::default() };
    let server = Server::start(Service::with(options(limits), Options::default())).await;
    let mut connection = server.connect().await;
    // Larger than what the system holds for the two sides of a socket.
    let prompts: Vec<_> = (0..32).map(|_| "abc").collect();
    let body = json!({"model": MODEL, "prompt": prompts, "max_tokens": 60_000, "stream": true});
    connection.write_all(post_text(COMPLETIONS, &body).as_bytes()).await.unwrap();
    server.service.until_connections(1).await;
    server.service.until_connections(0).await;
    server.service.idle().await;
    assert!(server.service.engine.metrics().cancelled > 0);
    server.stop().await;
}

#[tokio::test]
async fn running_requests_end_before_the_server_does() {
    let server = Server::start(Service::new()).await;
    let address = server.address;
    let mut idle = server.connect().await;
    server.service.gate.close();
    let mut connection = server.connect().await;
    let body = json!({"model": MODEL, "prompt": "abc", "max_tokens": 5});
    connection.write_all(post_text(COMPLETIONS, &body).as_bytes()).await.unwrap();
    server.service.until(|service| service.engine.metrics().waiting == 1).await;
    let (service, ended) = server.ask_to_stop();
    assert_eq!(read_all(&mut idle).await, "", "an idle connection is closed at once");
    patiently(async {
        while TcpStream::connect(address).await.is_ok() {
            tokio::time::sleep(Duration::from_millis(2)).await;
        }
    })
    .await;
    assert!(!ended.is_finished());
    service.gate.open();
    let answer = read_all(&mut connection).await;
    assert!(answer.contains("\"abcab\""), "{answer}");
    patiently(ended).await.unwrap().unwrap();
}

#[tokio::test]
async fn what_runs_past_the_grace_is_cut_off() {
    let options = ServerOptions { grace: Duration::from_millis(100), ..ServerOptions::default() };
    let server = Server::start(Service::with(options, Options::default())).await;
    let mut connection = server.connect().await;
    connection.write_all(endless(true).as_bytes()).await.unwrap();
    read_to(&mut connection, "data: ").await;
    let (service, ended) = server.ask_to_stop();
    let rest = read_all(&mut connection);
    let (rest, ended) = tokio::join!(rest, patiently(ended));
    ended.unwrap().unwrap();
    assert!(!rest.contains("[DONE]"));
    service.idle().await;
    assert_eq!(service.engine.metrics().cancelled, 1);
}
