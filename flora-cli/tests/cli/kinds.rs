//! A kind of adapter that flora doesn't have, from its equation to an answer over HTTP: what is said is what the model says whose
//! weights have the adapter multiplied in.

use std::collections::BTreeMap;
use std::path::{Path, PathBuf};

use safetensors::SafeTensors;
use safetensors::tensor::{Dtype, TensorView};
use serde_json::{Map, Value, json};
use tempfile::TempDir;

use super::command::{answer, flora, stderr};
#[cfg(unix)]
use super::server::Server;

type Tensors = BTreeMap<String, (Vec<usize>, Vec<f32>)>;

const RANK: usize = 3;
const ALPHA: f32 = 6.0;

/// The tiny golden Llama, an adapter of the example's kind for its queries and keys, and the model with the adapter in its weights.
struct World {
    root: TempDir,
}

impl World {
    fn new() -> Self {
        let world = Self { root: tempfile::tempdir().expect("a temporary folder") };
        let base = read(&golden("model.safetensors"));
        let mut random = fastrand::Rng::with_seed(11);
        let mut around = |centre: f32, half_width: f32, count: usize| -> Vec<f32> {
            (0..count).map(|_| centre + half_width * (2.0 * random.f32() - 1.0)).collect()
        };
        let (mut adapter, mut merged) = (Tensors::new(), base.clone());
        let adapted = ["q_proj.weight", "k_proj.weight"];
        for (name, (shape, weight)) in base.iter().filter(|(name, _)| adapted.iter().any(|end| name.ends_with(end))) {
            // As PyTorch has it, `[k, d]`.
            let [k, d] = shape[..] else { panic!("{name} is a matrix") };
            let (down, up) = (around(0.0, 0.2, RANK * d), around(0.0, 0.2, k * RANK));
            let (gate, scale) = (around(1.0, 0.8, k), around(1.0, 0.8, d));
            let element = |index: usize| {
                let (output, input) = (index / d, index % d);
                let update: f64 =
                    (0..RANK).map(|r| f64::from(up[output * RANK + r]) * f64::from(down[r * d + input])).sum();
                let sum = f64::from(weight[index]) + f64::from(ALPHA / RANK as f32) * update;
                (f64::from(gate[output]) * f64::from(scale[input]) * sum) as f32
            };
            merged.insert(name.clone(), (shape.clone(), (0..k * d).map(element).collect()));
            let module = name.trim_end_matches(".weight");
            let mut put = |end: &str, shape: &[usize], values: Vec<f32>| {
                adapter.insert(format!("base_model.model.{module}.{end}"), (shape.to_vec(), values));
            };
            put("down.weight", &[RANK, d], down);
            put("up.weight", &[k, RANK], up);
            put("gate", &[k], gate);
            put("input_scale", &[d], scale);
        }
        world.write_model("base", &base);
        world.write_model("merged", &merged);
        let config = json!({
            "peft_type": "TWO_SIDED_LORA", "r": RANK, "alpha": ALPHA, "target_modules": ["q_proj", "k_proj"], "dropout": 0.1,
        });
        let folder = world.folder("adapters/mine");
        std::fs::write(folder.join("adapter_config.json"), config.to_string()).expect("a new file");
        write(&folder.join("adapter_model.safetensors"), &adapter);
        world
    }

    fn folder(&self, name: &str) -> PathBuf {
        let folder = self.root.path().join(name);
        std::fs::create_dir_all(&folder).expect("a new folder");
        folder
    }

    fn path(&self, name: &str) -> String {
        self.root.path().join(name).display().to_string()
    }

    /// The model with a tokenizer that has a text of its own for each token.
    fn write_model(&self, name: &str, tensors: &Tensors) {
        let folder = self.folder(name);
        std::fs::copy(golden("config.json"), folder.join("config.json")).expect("a golden file");
        write(&folder.join("model.safetensors"), tensors);
        let letters = || ('a'..='z').map(String::from);
        let pairs = letters().flat_map(|first| letters().map(move |second| first.clone() + &second));
        let vocabulary: Map<_, _> = letters().chain(pairs).take(172).zip((0..).map(|id: u32| json!(id))).collect();
        let tokenizer = json!({
            "model": {"type": "BPE", "vocab": vocabulary, "merges": []},
            "added_tokens": [{"id": 172, "content": "<|end|>", "single_word": false, "lstrip": false,
                "rstrip": false, "normalized": false, "special": true}],
            "pre_tokenizer": {"type": "ByteLevel", "add_prefix_space": false, "trim_offsets": true, "use_regex": true},
            "decoder": {"type": "ByteLevel", "add_prefix_space": false, "trim_offsets": true},
        });
        std::fs::write(folder.join("tokenizer.json"), tokenizer.to_string()).expect("a new file");
    }
}

fn golden(file: &str) -> PathBuf {
    Path::new(env!("CARGO_MANIFEST_DIR")).join("../tests/golden/llama_tiny/model").join(file)
}

/// The kind that `docs/extending.md` shows.
fn kind() -> String {
    Path::new(env!("CARGO_MANIFEST_DIR")).join("../examples/kinds/two_sided_lora.toml").display().to_string()
}

fn read(path: &Path) -> Tensors {
    let bytes = std::fs::read(path).expect("a file");
    let file = SafeTensors::deserialize(&bytes).expect("tensors");
    let value = |bytes: &[u8]| f32::from_le_bytes(bytes.try_into().expect("four bytes"));
    let tensor = |view: &TensorView<'_>| (view.shape().to_vec(), view.data().chunks_exact(4).map(value).collect());
    file.tensors().iter().map(|(name, view)| (name.clone(), tensor(view))).collect()
}

fn write(path: &Path, tensors: &Tensors) {
    let bytes: Vec<Vec<u8>> =
        tensors.values().map(|(_, values)| values.iter().flat_map(|value| value.to_le_bytes()).collect()).collect();
    let views = tensors.iter().zip(&bytes).map(|((name, (shape, _)), bytes)| {
        (name.clone(), TensorView::new(Dtype::F32, shape.clone(), bytes).expect("matching bytes"))
    });
    std::fs::write(path, safetensors::serialize(views, None).expect("serialisable tensors")).expect("a new file");
}

/// The tokens that follow a prompt.
fn generated(model: &str, prompt: &str, more: &[&str]) -> Value {
    let mut arguments =
        vec!["generate", "--device", "host", "--model", model, "--prompt", prompt, "--max-tokens", "12", "--json"];
    arguments.extend_from_slice(more);
    answer(arguments)["tokens"].clone()
}

/// The text of a completion.
#[cfg(unix)]
fn completion(server: &Server, model: &str, prompt: &str) -> String {
    let answer =
        server.post("/v1/completions", &json!({"model": model, "prompt": prompt, "max_tokens": 12, "temperature": 0}));
    let (_, body) = answer.split_once("\r\n\r\n").expect("a body");
    let body: Value = serde_json::from_str(body).unwrap_or_else(|error| panic!("{error}: {answer}"));
    body["choices"][0]["text"].as_str().unwrap_or_else(|| panic!("no text: {body}")).to_owned()
}

#[test]
fn an_adapter_of_a_new_kind_says_what_its_dense_model_says() {
    let world = World::new();
    let (base, merged, adapters) = (world.path("base"), world.path("merged"), world.path("adapters"));
    let mut differ = 0;
    for prompt in ["abcde", "hello", "zy", "thequickbrownfox"] {
        let adapted = generated(&base, prompt, &["--adapters", &adapters, "--adapter", "mine", "--kind", &kind()]);
        assert_eq!(adapted, generated(&merged, prompt, &[]), "{prompt}");
        differ += usize::from(adapted != generated(&base, prompt, &[]));
    }
    assert!(differ > 0, "the adapter changes what is said");
}

#[cfg(unix)]
#[test]
fn an_adapter_of_a_new_kind_is_served_over_http() {
    let world = World::new();
    let server = |model: &str, more: &[&str]| {
        let model = world.path(model);
        let mut arguments = vec!["--device", "host", "--model", &model, "--port", "0", "--served-name", "tiny"];
        arguments.extend_from_slice(more);
        Server::start(arguments)
    };
    let adapters = world.path("adapters");
    let adapted = server("base", &["--adapters", &adapters, "--kind", &kind()]);
    let merged = server("merged", &[]);
    let mut differ = 0;
    for prompt in ["abcde", "hello", "zy", "thequickbrownfox"] {
        let said = completion(&adapted, "mine", prompt);
        assert_eq!(said, completion(&merged, "tiny", prompt), "{prompt}");
        differ += usize::from(said != completion(&adapted, "tiny", prompt));
    }
    assert!(differ > 0, "the adapter changes what is said");
    assert!(adapted.get("/v1/models").contains("\"id\":\"mine\""));
    assert!(adapted.stop().success());
    assert!(merged.stop().success());

    // Without the description, the request that names the adapter is told why it can't be had.
    let without = server("base", &["--adapters", &adapters]);
    let answer = without.post("/v1/completions", &json!({"model": "mine", "prompt": "abc", "max_tokens": 2}));
    assert!(!answer.starts_with("HTTP/1.1 200") && answer.contains("TWO_SIDED_LORA"), "{answer}");
    assert!(without.stop().success());
}

#[test]
fn a_new_kind_is_run_through_a_model_s_projections_and_held_against_its_equation() {
    let world = World::new();
    let (base, adapters) = (world.path("base"), world.path("adapters"));
    let run = ["run", "--device", "host", "--model", &base, "--adapters", &adapters, "--repetitions", "1", "--json"];
    let report = answer(run.into_iter().chain(["--kind", &kind()]));
    assert_eq!(report["adapters"], json!({"two_sided_lora": 1}));
    assert_eq!(report["right"], true, "{report}");

    let refused = |more: &[&str], code: i32, expected: &str| {
        let output = flora(run.iter().chain(more));
        let said = stderr(&output);
        assert_eq!(output.status.code(), Some(code), "{said}");
        assert!(said.contains(expected), "`{expected}` is not in: {said}");
    };
    refused(&[], 1, "`TWO_SIDED_LORA` is not supported; supported: LORA, IA3, HIRA, FLORA");
    refused(&["--kind", "/nonexistent.toml"], 1, "cannot read /nonexistent.toml");
    refused(&["--kind", &kind(), "--kind", &kind()], 1, "is taken by another kind");
    let broken = world.path("broken.toml");
    std::fs::write(&broken, "peft_type = ").expect("a new file");
    refused(&["--kind", &broken], 1, "broken.toml");
    let output = flora(["run", "--seeded", "--kind", &kind()]);
    assert_eq!(output.status.code(), Some(2), "a kind without adapters means nothing: {}", stderr(&output));
}
