//! Serving as a person meets it: text from a model, an HTTP server that comes and goes, the experiment and its page.

use std::io::{BufRead, BufReader, Read, Write};
use std::net::TcpStream;
use std::path::{Path, PathBuf};
use std::process::Stdio;

use serde_json::{Map, Value, json};
use tempfile::TempDir;

use super::command::{answer, command, flora, stderr};

/// The tiny golden Llama with a tokenizer of letters.
struct Tiny {
    _root: TempDir,
    model: String,
}

impl Tiny {
    fn new() -> Self {
        let root = tempfile::tempdir().expect("a temporary folder");
        let folder = root.path().join("tiny");
        std::fs::create_dir(&folder).expect("a folder");
        for file in ["config.json", "model.safetensors"] {
            std::fs::copy(golden("model").join(file), folder.join(file)).expect("a golden file");
        }
        let vocabulary: Map<_, _> = ('a'..='z').map(String::from).zip((0..).map(|id: u32| json!(id))).collect();
        let tokenizer = json!({
            "model": {"type": "BPE", "vocab": vocabulary, "merges": []},
            "added_tokens": [{"id": 26, "content": "<|end|>", "special": true}],
            "pre_tokenizer": {"type": "ByteLevel", "add_prefix_space": false, "use_regex": true},
            "decoder": {"type": "ByteLevel"},
        });
        std::fs::write(folder.join("tokenizer.json"), tokenizer.to_string()).expect("a file");
        Self { model: folder.display().to_string(), _root: root }
    }
}

fn golden(name: &str) -> PathBuf {
    Path::new(env!("CARGO_MANIFEST_DIR")).join("tests/golden/llama_tiny").join(name)
}

fn adapters() -> String {
    golden("adapters").display().to_string()
}

#[test]
fn a_prompt_is_continued_with_an_adapter_and_without() {
    let tiny = Tiny::new();
    let generate = |more: &[&str]| {
        let mut arguments =
            vec!["generate", "--model", &tiny.model, "--prompt", "abcde", "--max-tokens", "6", "--json"];
        arguments.extend_from_slice(more);
        answer(arguments)
    };
    let adapters = adapters();
    let base = generate(&[]);
    let adapted = generate(&["--adapters", &adapters, "--adapter", "lora"]);
    for said in [&base, &adapted] {
        assert_eq!((&said["prompt_tokens"], &said["completion_tokens"]), (&5.into(), &6.into()));
        assert_eq!(said["finish_reason"], "length");
    }
    assert_ne!(base["tokens"], adapted["tokens"]);
    assert_eq!(base["tokens"], generate(&[])["tokens"], "greedy");
    let drawn = |seed: &str| generate(&["--temperature", "1.5", "--seed", seed])["tokens"].clone();
    assert_eq!(drawn("7"), drawn("7"));
    assert_ne!(drawn("7"), drawn("8"));
}

#[test]
fn what_cannot_be_generated_is_told() {
    let tiny = Tiny::new();
    let adapters = adapters();
    let refused = |arguments: &[&str], expected: &str| {
        let mut all = vec!["generate", "--model", &tiny.model, "--prompt", "abc"];
        all.extend_from_slice(arguments);
        let output = flora(all);
        let said = stderr(&output);
        assert_eq!(output.status.code(), Some(1), "{said}");
        assert!(said.contains(expected), "`{expected}` is not in: {said}");
    };
    refused(&["--adapters", &adapters, "--adapter", "nobody"], "there is no adapter `nobody`");
    refused(&["--adapters", &adapters, "--adapter", "../lora"], "there is no adapter `../lora`");
    refused(&["--adapters", &adapters, "--adapter", "hira"], "adapts `model.layers.0");
    refused(&["--adapted", "nothing"], "no projection of the model is called `nothing`");
    refused(&["--temperature=-1"], "temperature");
    refused(&["--device", "cuda:99"], "no device `cuda:99`");
    let long = "a".repeat(200);
    let output = flora(["generate", "--model", &tiny.model, "--prompt", &long]);
    assert!(stderr(&output).contains("96"), "the model's context: {}", stderr(&output));
    // A layer is no decoder.
    let layer = Path::new(env!("CARGO_MANIFEST_DIR")).join("tests/golden/peft/dora/base.safetensors");
    let output = flora(["generate", "--model", &layer.display().to_string(), "--prompt", "abc"]);
    assert_eq!(output.status.code(), Some(1), "{}", stderr(&output));
}

/// One request by hand.
fn ask(address: &str, request: &str) -> String {
    let mut stream = TcpStream::connect(address).expect("the server listens");
    stream.write_all(request.as_bytes()).expect("it reads");
    let mut answer = String::new();
    stream.read_to_string(&mut answer).expect("it answers");
    answer
}

#[cfg(unix)]
#[test]
fn a_server_listens_answers_and_ends_when_it_is_asked_to() {
    let tiny = Tiny::new();
    let config = tempfile::tempdir().expect("a temporary folder");
    let mut child = command(config.path())
        .args(["serve", "--model", &tiny.model, "--adapters", &adapters(), "--port", "0", "--served-name", "tiny"])
        .stderr(Stdio::piped())
        .spawn()
        .expect("the binary starts");
    let mut lines = BufReader::new(child.stderr.take().expect("a pipe")).lines();
    let address = loop {
        let line = lines.next().expect("it says where it listens").expect("text");
        if let Some((_, url)) = line.split_once("http://") {
            break url.trim_end_matches("/v1").to_owned();
        }
    };
    let get = |path: &str| ask(&address, &format!("GET {path} HTTP/1.1\r\nhost: x\r\nconnection: close\r\n\r\n"));
    assert!(get("/health").starts_with("HTTP/1.1 200"));
    assert!(get("/v1/models").contains("\"id\":\"lora\""));
    let body = json!({"model": "lora", "prompt": "abc", "max_tokens": 3}).to_string();
    let request = format!(
        "POST /v1/completions HTTP/1.1\r\nhost: x\r\ncontent-type: application/json\r\ncontent-length: {}\r\n\
         connection: close\r\n\r\n{body}",
        body.len()
    );
    let answer = ask(&address, &request);
    assert!(answer.contains("\"completion_tokens\":3"), "{answer}");
    assert!(get("/metrics").contains("flora_requests_finished_total 1"));
    let killed = std::process::Command::new("kill").arg(child.id().to_string()).status().expect("kill is there");
    assert!(killed.success());
    assert!(child.wait().expect("it ends").success(), "asked to end, it ends well");
}

#[test]
fn the_experiment_runs_and_its_page_is_drawn() {
    let folder = tempfile::tempdir().expect("a temporary folder");
    let model = golden("model").display().to_string();
    let said = answer([
        "bench",
        "serving",
        "--device",
        "host",
        "--model",
        &model,
        "--requests",
        "6",
        "--latency-requests",
        "3",
        "--rate",
        "50",
        "--ranks",
        "1,3",
        "--scale",
        "0.05",
        "--steps",
        "4",
        "--sequences",
        "4",
        "--json",
    ]);
    let count = |what: &str| said[what].as_array().expect("a list").len();
    // The base, three ways at two ranks, and the base again.
    assert_eq!((count("throughput"), count("latency")), (8, 8));
    // Those, and the paper's three models, whose base is predicted once.
    assert_eq!(count("steps"), 8 + 3 * 7);
    for one in said["throughput"].as_array().expect("a list") {
        assert_eq!(one["prompt_tokens"], said["throughput"][0]["prompt_tokens"], "the same requests");
        assert!(one["tokens_per_second"].as_f64().expect("a number") > 0.0);
    }
    let measured = |step: &&Value| step["seconds"].is_number();
    assert_eq!(said["steps"].as_array().expect("a list").iter().filter(measured).count(), 8);

    let at = |name: &str| folder.path().join(name).display().to_string();
    std::fs::write(at("serving.json"), said.to_string()).expect("a file");
    let page = at("page.html");
    let serving = at("serving.json");
    let drawn = answer(["report", "--device", "host", "--serving", &serving, "--output", &page, "--json"]);
    assert_eq!(drawn["serving_runs"], 1);
    let html = std::fs::read_to_string(&page).expect("the page");
    for expected in ["Throughput, 6 requests at once", "starcoder-15b, decoding, predicted", "<svg"] {
        assert!(html.contains(expected), "`{expected}` is not in the page");
    }

    let mut wrong = said.clone();
    wrong["throughput"][0]["tokens_per_second"] = json!(-1);
    std::fs::write(at("serving.json"), wrong.to_string()).expect("a file");
    let output = flora(["report", "--device", "host", "--serving", &serving, "--output", &page]);
    assert!(stderr(&output).contains("tokens_per_second is -1"), "{}", stderr(&output));
}
