//! Serving as a person meets it: text from a model, an HTTP server that comes and goes, the experiment and its page.

use std::path::{Path, PathBuf};

use serde_json::{Value, json};
use tempfile::TempDir;

use super::command::{answer, flora, stderr};
#[cfg(unix)]
use super::server::Server;

/// The tiny golden Llama with a tokenizer of characters.
pub(crate) struct Tiny {
    _root: TempDir,
    pub(crate) model: String,
}

impl Tiny {
    pub(crate) fn new() -> Self {
        let root = tempfile::tempdir().expect("a temporary folder");
        let folder = root.path().join("tiny");
        std::fs::create_dir(&folder).expect("a folder");
        for file in ["config.json", "model.safetensors"] {
            std::fs::copy(golden("model").join(file), folder.join(file)).expect("a golden file");
        }
        let tokenizer = golden("../log_likelihoods/tokenizer.json");
        std::fs::copy(tokenizer, folder.join("tokenizer.json")).expect("a golden file");
        Self { model: folder.display().to_string(), _root: root }
    }
}

fn golden(name: &str) -> PathBuf {
    Path::new(env!("CARGO_MANIFEST_DIR")).join("../tests/golden/llama_tiny").join(name)
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
    let named = format!("own={}", golden("adapters").join("lora").display());
    let named = generate(&["--adapter", "own", "--lora-modules", &named]);
    assert_eq!(adapted["tokens"], named["tokens"]);
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
fn what_rounded_activations_cost_is_told() {
    let tiny = Tiny::new();
    let arguments = ["generate", "--model", &tiny.model, "--prompt", "abc", "--device", "host", "--base", "int8"];
    let rounded = stderr(&flora([&arguments[..], &["--activations", "int8"]].concat()));
    assert!(rounded.contains("activations: int8; logits are "), "{rounded}");
    let exact = stderr(&flora([&arguments[..], &["--activations", "float"]].concat()));
    assert!(!exact.contains("activations"), "{exact}");
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
    let restricted = ["--adapters", &adapters, "--adapter", "hira", "--adapted", "q_proj"];
    refused(&restricted, "--adapted lets only q_proj be adapted");
    refused(&["--adapters", "/nowhere"], "/nowhere is no folder of adapters");
    let lora = golden("adapters").join("lora").display().to_string();
    refused(&["--adapters", &lora], "is an adapter itself");
    let file = golden("model").join("config.json").display().to_string();
    refused(&["--adapters", &file], "it is a file; give a folder that holds one folder for each adapter");
    refused(&["--lora-modules", "a=/nowhere"], "the adapter `a`: /nowhere isn't there");
    let (twice, named) = (format!("a={lora}"), format!("lora={lora}"));
    refused(&["--lora-modules", &twice, &twice], "two adapters are called `a`");
    refused(&["--adapters", &adapters, "--lora-modules", &named], "two adapters are called `lora`");
    refused(&["--adapted", "nothing"], "no projection of the model is called `nothing`");
    refused(&["--temperature=-1"], "temperature");
    refused(&["--device", "cuda:99"], "no device `cuda:99`");
    refused(&["--device", "host", "--activations", "int8"], "no base weight of the model is quantised");
    let long = "a".repeat(200);
    let output = flora(["generate", "--model", &tiny.model, "--prompt", &long]);
    assert!(stderr(&output).contains("96"), "the model's context: {}", stderr(&output));
    // A layer is no decoder.
    let layer = Path::new(env!("CARGO_MANIFEST_DIR")).join("../tests/golden/peft/dora/base.safetensors");
    let output = flora(["generate", "--model", &layer.display().to_string(), "--prompt", "abc"]);
    assert_eq!(output.status.code(), Some(1), "{}", stderr(&output));
}

#[cfg(unix)]
#[test]
fn a_server_listens_answers_and_ends_when_it_is_asked_to() {
    let tiny = Tiny::new();
    let server =
        Server::start(["--model", &tiny.model, "--adapters", &adapters(), "--port", "0", "--served-name", "tiny"]);
    assert!(server.get("/health").starts_with("HTTP/1.1 200"));
    assert!(server.get("/v1/models").contains("\"id\":\"lora\""));
    let answer = server.post("/v1/completions", &json!({"model": "lora", "prompt": "abc", "max_tokens": 3}));
    assert!(answer.contains("\"completion_tokens\":3"), "{answer}");
    assert!(server.get("/metrics").contains("flora_requests_finished_total 1"));
    assert!(server.stop().success(), "asked to end, it ends well");
}

#[test]
fn an_adapter_is_served_by_its_own_weights() {
    let tiny = Tiny::new();
    let adapters = adapters();
    let arguments = ["--model", &tiny.model, "--adapters", &adapters, "--port", "0", "--merge", "lora"];
    let server = Server::start(arguments);
    assert!(server.said.contains("merge: the weights of `lora` take"), "{}", server.said);
    let body = json!({"model": "lora", "prompt": "abcde", "max_tokens": 6, "temperature": 0});
    let answer_of = |server: &Server| {
        let said = server.post("/v1/completions", &body);
        let (_, json) = said.split_once("\r\n\r\n").expect("a body");
        serde_json::from_str::<serde_json::Value>(json).expect("JSON")["choices"].clone()
    };
    let unmerged = Server::start(&arguments[..6]);
    assert_eq!(answer_of(&server), answer_of(&unmerged));
    assert!(!unmerged.said.contains("merge:"), "{}", unmerged.said);
    assert!(server.stop().success() && unmerged.stop().success());

    let output = flora([&["serve"], &arguments[..6], &["--merge", "laro"]].concat());
    assert_eq!(output.status.code(), Some(1), "{}", stderr(&output));
    assert!(
        stderr(&output).contains("there is no adapter `laro` to merge; there are: hira, lora"),
        "{}",
        stderr(&output)
    );
}

#[test]
fn an_adapter_with_the_base_models_name_is_refused_at_start() {
    let tiny = Tiny::new();
    let adapters = adapters();
    let name = ["--port", "0", "--served-model-name", "lora"];
    let output = flora([&["serve", "--model", &tiny.model, "--adapters", &adapters][..], &name].concat());
    assert_eq!(output.status.code(), Some(1), "{}", stderr(&output));
    assert!(stderr(&output).contains("an adapter is called `lora`"), "{}", stderr(&output));
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

#[test]
fn the_parts_of_a_step_make_up_the_whole() {
    let model = golden("model").display().to_string();
    let few = ["--ranks", "2", "--rounds", "1", "--sequences", "3", "--json"];
    let said = answer([&["bench", "serving", "--breakdown", "--device", "host", "--model", &model], &few[..]].concat());
    let broken_down = said["breakdown"].as_array().expect("a list");
    // The base, three ways, and the base again; of each a prompt and two kinds of steps.
    assert_eq!(broken_down.len(), 5 * 3, "{said}");
    for one in broken_down {
        let parts = one["parts"].as_array().expect("a list");
        let part = |name: &str| {
            let own = parts.iter().find(|part| part[0] == name).unwrap_or_else(|| panic!("no `{name}` in {one}"));
            own[1].as_f64().expect("seconds")
        };
        for name in ["projections", "attention", "norms", "output matrix", "sampling"] {
            assert!(part(name) > 0.0, "nothing for `{name}`: {one}");
        }
        let sum: f64 = parts.iter().filter_map(|part| part[1].as_f64()).sum();
        let whole = one["seconds"].as_f64().expect("seconds");
        assert!((sum / whole - 1.0).abs() < 1e-6, "{sum} of {whole}: {one}");
    }
}
