//! Two servers behind a router that knows of them what their metrics say, as the gateway API's inference extension does: a request
//! goes to the server that has its adapter, else to the one with less to do.

use serde_json::json;

use crate::support::{MODEL, Server, Service, patiently, post_text};

/// What a server's metrics say.
struct Load {
    adapters: Vec<String>,
    requests: f64,
}

async fn load(server: &Server) -> Load {
    let text = server.exchange(b"GET /metrics HTTP/1.1\r\nhost: a\r\nconnection: close\r\n\r\n").await;
    let line = |name: &str| text.lines().find_map(|line| line.strip_prefix(name)).unwrap();
    let number = |name: &str| line(name).trim().parse::<f64>().unwrap();
    let labels = line("vllm:lora_requests_info");
    let label = |name: &str| labels.split_once(&format!("{name}=\"")).unwrap().1.split_once('"').unwrap().0;
    let names = ["running_lora_adapters", "waiting_lora_adapters"].map(label).join(",");
    let adapters = names.split(',').filter(|name| !name.is_empty()).map(str::to_owned).collect();
    let requests = number("vllm:num_requests_running") + number("vllm:num_requests_waiting");
    Load { adapters, requests }
}

/// The server for a request with an adapter.
async fn route(servers: &[Server; 2], adapter: &str) -> usize {
    let loads = [load(&servers[0]).await, load(&servers[1]).await];
    let has = |at: usize| loads[at].adapters.iter().any(|name| name == adapter);
    match [has(0), has(1)] {
        [true, false] => 0,
        [false, true] => 1,
        _ => usize::from(loads[1].requests < loads[0].requests),
    }
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn requests_go_where_their_adapter_is() {
    let servers = [Server::start(Service::new()).await, Server::start(Service::new()).await];
    for server in &servers {
        server.service.gate.close();
    }
    let (mut sent, mut asked) = (Vec::new(), [0, 0]);
    for adapter in ["alice", "user1", "alice", "user1", "user1", MODEL, "alice"] {
        let at = route(&servers, adapter).await;
        asked[at] += 1;
        let body = json!({"model": adapter, "prompt": "!", "max_tokens": 3, "temperature": 0});
        let (mut stream, text) = (servers[at].connect().await, post_text("/v1/completions", &body));
        tokio::io::AsyncWriteExt::write_all(&mut stream, text.as_bytes()).await.unwrap();
        sent.push((adapter, at, stream));
        // The router looks again when the server has it.
        let expected = asked[at] as f64;
        patiently(async { while load(&servers[at]).await.requests < expected {} }).await;
    }
    for server in &servers {
        server.service.gate.open();
    }
    for (adapter, at, mut stream) in sent {
        let expected = match adapter {
            "alice" => (0, "ali"),
            "user1" => (1, "use"),
            _ => (at, "!!!"),
        };
        let answer = crate::support::read_all(&mut stream).await;
        assert!(answer.contains(&format!("\"text\":\"{}\"", expected.1)), "{answer}");
        assert_eq!(at, expected.0, "{adapter}");
    }
    for server in servers {
        server.service.idle().await;
        assert_eq!(server.service.engine.metrics().adapters.loads, 1, "each adapter was read by one server");
        server.stop().await;
    }
}
