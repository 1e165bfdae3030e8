//! A server that can't open another file: it serves the connections that it has, and goes on when it can. In a process of its own,
//! because the limit is a whole process's.

#![cfg(unix)]
#![allow(dead_code, reason = "shared with the other tests")]

#[path = "http/model.rs"]
mod model;
#[path = "http/support.rs"]
mod support;

use std::fs::File;
use std::os::fd::AsRawFd;
use std::time::Duration;

use rlimit::Resource;
use tokio::io::AsyncWriteExt;
use tokio::net::TcpSocket;

use support::{Server, Service, patiently, read_all};

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_server_without_file_descriptors_serves_on() {
    let server = Server::start(Service::new()).await;
    server.assert_alive().await;
    // Made beforehand: what is left then is the server's, and is less than what it is to accept.
    let sockets: Vec<_> = (0..60).map(|_| TcpSocket::new_v4().unwrap()).collect();
    let (_, hard) = Resource::NOFILE.get().unwrap();
    let next = File::open("/dev/null").unwrap().as_raw_fd();
    Resource::NOFILE.set(next as u64 + 10, hard).unwrap();
    let mut connections = Vec::new();
    for socket in sockets {
        connections.push(patiently(socket.connect(server.address)).await.unwrap());
    }
    let first = &mut connections[0];
    first.write_all(b"GET /health HTTP/1.1\r\nhost: a\r\nconnection: close\r\n\r\n").await.unwrap();
    assert!(read_all(first).await.starts_with("HTTP/1.1 200 "));
    // It takes what that one gave back for the next: it goes on, but there is never enough for all.
    patiently(async {
        while File::open("/dev/null").is_ok() {
            tokio::time::sleep(Duration::from_millis(2)).await;
        }
    })
    .await;
    drop(connections);
    server.assert_alive().await;
    server.stop().await;
}
