//! Adapters whose parts a network weighs for each token (X-LoRA) against PEFT, through the engine; what they say in company, over what
//! other requests left, and when their folders are replaced; and what is refused.

use std::collections::BTreeMap;
use std::fs;
use std::path::Path;
use std::sync::Arc;
use std::time::Instant;

use flora_checkpoint::Model;
use flora_engine::{
    AdapterSource, AdapterSpans, Event, LoadOutcome, Loaded, LogProbabilities, LogitRules, Options, Request, RequestId,
    Sampling, Span, Spans, StopAt,
};
use flora_model::AdapterDirectory;
use flora_plan::layer::Element;

use crate::activated::Served;
use crate::golden::prompts;
use crate::is_host;
use crate::served::golden;
use crate::spans::compare;

const CASES: [&str; 3] = ["layerwise", "top_two", "shares"];
const FOLDER: &str = "llama_xlora";

#[test]
fn gates_equal_pefts() {
    if !is_host() {
        println!("NOT RUN: on devices there are no gates");
        return;
    }
    for name in CASES {
        let (prompts, _) = prompts(&golden(FOLDER).join("outputs"), name);
        assert_eq!(prompts.len(), 2);
        for chunk_tokens in [64, 8] {
            let mut served = Served::new(FOLDER, Options { chunk_tokens, ..Options::default() });
            for prompt in &prompts {
                let worst = compare(name, &mut served, &Some(name).into(), prompt);
                assert!(worst < 1e-4, "{name} {}: off by {worst}", prompt.name);
            }
        }
    }
}

/// What a request said, with the bits of its tokens' log-probabilities.
type Said = Vec<(u32, u32)>;

/// Runs requests that arrive at the given steps.
fn run(served: &mut Served, requests: &[(usize, Request)]) -> Vec<Said> {
    let now = Instant::now();
    let mut ids: BTreeMap<RequestId, usize> = BTreeMap::new();
    let mut said = vec![Said::new(); requests.len()];
    let (mut step, mut left) = (0, requests.len());
    while left > 0 {
        for (own, (_, request)) in requests.iter().enumerate().filter(|(_, (arrival, _))| *arrival == step) {
            ids.insert(served.core.submit(request.clone(), now).expect("a request that can be run"), own);
        }
        for order in served.core.take_orders() {
            let read = served.source.read(&order.adapter).expect("a golden adapter");
            let (version, prepared) = (read.version, read.prepared);
            let outcome = LoadOutcome::Prepared { version, facts: prepared.facts(), prepared };
            served.core.loaded(Loaded { adapter: order.adapter, outcome });
        }
        for (id, event) in served.core.step(now) {
            match event {
                Event::Prompt(_) => {}
                Event::Text { scored, .. } => {
                    said[ids[&id]].extend(scored.into_iter().map(|own| (own.token, own.log_probability.to_bits())));
                }
                Event::Finished { .. } => left -= 1,
                Event::Failed(error) => panic!("{error}"),
            }
        }
        step += 1;
        assert!(step < 5000, "the engine makes no progress");
    }
    said
}

fn request(prompt: &[u32], adapters: AdapterSpans, max_tokens: u32) -> Request {
    Request {
        prompt: prompt.to_vec(),
        adapters,
        sampling: Sampling::Greedy,
        rules: LogitRules::default(),
        grammar: None,
        stop: StopAt { max_tokens, strings: Vec::new(), tokens: Vec::new() },
        log_probabilities: LogProbabilities { generated: Some(0), prompt: None },
    }
}

/// A folder with the gated adapters and others beside them.
fn mixed_folder() -> tempfile::TempDir {
    let folder = tempfile::tempdir().expect("a folder");
    for (from, name) in
        CASES.map(|name| (FOLDER, name)).into_iter().chain([("llama_spans", "one"), ("llama_zoo", "oft")])
    {
        copy(&golden(from).join("adapters").join(name), &folder.path().join(name));
    }
    folder
}

fn copy(from: &Path, to: &Path) {
    fs::create_dir_all(to).expect("a folder");
    for entry in fs::read_dir(from).expect("a folder") {
        let entry = entry.expect("an entry");
        match entry.file_type().expect("a type").is_dir() {
            true => copy(&entry.path(), &to.join(entry.file_name())),
            false => fs::copy(entry.path(), to.join(entry.file_name())).map(drop).expect("a copy"),
        }
    }
}

/// Random companies of requests, some beginning alike, with sharing and without, with room for all and with so little that some are
/// pre-empted: each says what it says alone, to the bit where nothing is computed twice.
#[test]
fn what_a_gated_request_says_is_its_own() {
    if !is_host() {
        println!("NOT RUN: on devices there are no gates");
        return;
    }
    let folder = mixed_folder();
    let names = [Some("layerwise"), Some("top_two"), Some("shares"), Some("one"), Some("oft"), None];
    let mut random = fastrand::Rng::with_seed(7);
    let text: Vec<u32> = (0..64).map(|_| random.u32(0..173)).collect();
    let requests: Vec<Request> = (0..24)
        .map(|_| {
            let tail: Vec<u32> = (0..random.usize(1..8)).map(|_| random.u32(0..173)).collect();
            let prompt = [&text[..random.usize(0..50)], &tail].concat();
            // Half of them are gated.
            let name = if random.bool() { names[random.usize(0..3)] } else { names[random.usize(0..6)] };
            request(&prompt, name.into(), random.u32(1..20))
        })
        .collect();
    let options = |share_prefixes, cache_tokens, sequences| Options {
        share_prefixes,
        cache_tokens,
        sequences,
        chunk_tokens: 16,
        block_tokens: 32,
        ..Options::default()
    };
    let alone: Vec<Said> = requests
        .iter()
        .map(|own| run(&mut Served::of(folder.path(), options(false, 4096, 1)), &[(0, own.clone())]).remove(0))
        .collect();
    let tokens = |said: &Said| said.iter().map(|(token, _)| *token).collect::<Vec<_>>();
    let (mut preemptions, mut shared) = (0, 0);
    for round in 0..100 {
        let (shares, is_tight) = (round % 2 == 0, round % 4 > 1);
        let mut served =
            Served::of(folder.path(), options(shares, if is_tight { 224 } else { 8192 }, random.usize(2..9)));
        let chosen: Vec<usize> = (0..random.usize(2..12)).map(|_| random.usize(0..requests.len())).collect();
        let crowd: Vec<_> = chosen.iter().map(|own| (random.usize(0..20), requests[*own].clone())).collect();
        let said = run(&mut served, &crowd);
        let metrics = served.core.metrics();
        assert_eq!(metrics.cache_blocks_used, 0);
        for (own, said) in chosen.iter().zip(said) {
            assert_eq!(tokens(&said), tokens(&alone[*own]), "round {round}, request {own}");
            assert!(
                shares || metrics.preemptions > 0 || said == alone[*own],
                "the bits in round {round}, request {own}"
            );
        }
        preemptions += metrics.preemptions;
        shared += metrics.shared_tokens;
    }
    println!("{preemptions} pre-emptions, {shared} tokens shared");
    assert!(preemptions > 10 && shared > 1000, "the test doesn't test what it is for");
}

fn source(folder: &Path) -> AdapterDirectory {
    let model = Arc::new(Model::open(&golden("llama_tiny").join("model")).expect("a golden model"));
    AdapterDirectory::new(Some(folder), &model, Element::F32).expect("built-in layers")
}

/// Whichever of its files is another: the version and the content are, and nothing is shared.
#[test]
fn a_replaced_mixture_shares_nothing() {
    if !is_host() {
        println!("NOT RUN: on devices there are no gates");
        return;
    }
    let folder = mixed_folder();
    let own = folder.path().join("layerwise");
    let mut served = Served::of(folder.path(), Options { block_tokens: 32, ..Options::default() });
    let prompt: Vec<u32> = (0..70).map(|token| token * 13 % 173).collect();
    let ask = |served: &mut Served| {
        let before = served.core.metrics();
        let said = run(served, &[(0, request(&prompt, Some("layerwise").into(), 4))]).remove(0);
        let after = served.core.metrics();
        (said, after.shared_tokens - before.shared_tokens)
    };
    let (first, shared) = ask(&mut served);
    assert_eq!(shared, 0);
    let before = source(folder.path()).prepare("layerwise").expect("an adapter");
    assert_eq!(ask(&mut served), (first.clone(), 69));
    for (file, with) in [
        ("2/adapter_model.safetensors", "llama_xlora"),
        ("adapter_model.safetensors", "llama_xlora"),
        ("1/adapter_config.json", "llama_xlora"),
    ] {
        let path = own.join(file);
        let original = fs::read(&path).expect("a file");
        assert!(golden(with).exists());
        let mut other = original.clone();
        match file.ends_with("json") {
            // Another scale.
            true => {
                let text = String::from_utf8(other).expect("text").replace("\"lora_alpha\": 4", "\"lora_alpha\": 9");
                other = text.into_bytes();
            }
            // The sign of the last number.
            false => *other.last_mut().expect("numbers") ^= 0x80,
        }
        assert_ne!(other, original);
        fs::write(&path, &other).expect("written");
        let changed = source(folder.path()).prepare("layerwise").expect("an adapter");
        assert_ne!(changed.version, before.version, "{file}");
        assert_ne!(changed.prepared.content, before.prepared.content, "{file}");
        assert_eq!(changed.version, source(folder.path()).version("layerwise").expect("a version"));
        let (said, shared) = ask(&mut served);
        assert_eq!(shared, 0, "{file}");
        assert_ne!(said, first, "{file}");
        fs::write(&path, &original).expect("written");
        let back = source(folder.path()).prepare("layerwise").expect("an adapter");
        assert_eq!(back.prepared.content, before.prepared.content, "{file}");
    }
}

#[test]
fn a_gated_adapter_has_all_tokens() {
    if !is_host() {
        println!("NOT RUN: on devices there are no gates");
        return;
    }
    let mut served = Served::new(FOLDER, Options::default());
    let span = Span { start: 2, end: Some(4), adapter: Some("top_two".into()) };
    let adapters = Spans::new(None, [span]).expect("one span");
    let id = served.core.submit(request(&[1; 9], adapters, 1), Instant::now()).expect("a request");
    let mut events = Vec::new();
    while events.is_empty() {
        for order in served.core.take_orders() {
            let read = served.source.read(&order.adapter).expect("a golden adapter");
            let (version, prepared) = (read.version, read.prepared);
            let outcome = LoadOutcome::Prepared { version, facts: prepared.facts(), prepared };
            served.core.loaded(Loaded { adapter: order.adapter, outcome });
        }
        events = served.core.step(Instant::now());
    }
    let [(own, Event::Failed(error))] = &events[..] else { panic!("{events:?}") };
    let message = error.to_string();
    assert!(*own == id && message.contains("`top_two`") && message.contains("all tokens of a request"), "{message}");
}

/// A copy of a golden folder with something else in it, and what is said of it.
fn refusal(name: &str, change: impl FnOnce(&Path)) -> String {
    let folder = tempfile::tempdir().expect("a folder");
    let own = folder.path().join(name);
    copy(&golden(FOLDER).join("adapters").join(name), &own);
    change(&own);
    let message = source(folder.path()).prepare(name).expect_err("what can't be used").to_string();
    println!("{message}");
    message
}

/// Another value of an option of the config.
fn option(name: &str, key: &str, value: &str) -> String {
    refusal(name, |folder| {
        let path = folder.join("adapter_config.json");
        let mut config: serde_json::Value = serde_json::from_slice(&fs::read(&path).expect("a config")).expect("JSON");
        config[key] = serde_json::from_str(value).expect("a value");
        fs::write(&path, serde_json::to_vec(&config).expect("JSON")).expect("written");
    })
}

#[test]
fn options_that_cannot_be_honoured_are_refused_by_name() {
    for (key, value, says) in [
        ("scaling_pass_value", "0.5", "hidden states of a model that the adapters change"),
        ("softmax_temperature", "0", "above 0"),
        ("softmax_temperature", "-1.5", "above 0"),
        ("softmax_temperature", "\"hot\"", "a finite number"),
        ("top_k_lora", "4", "from 1 to 3"),
        ("top_k_lora", "0", "from 1 to 3"),
        ("xlora_depth", "0", "from 1 to 64"),
        ("hidden_size", "-4", "whole number"),
        ("enable_softmax", "1", "true or false"),
        ("layerwise_scalings", "null", "true or false"),
        ("global_scaling_weight", "null", "a finite number"),
        ("adapters", "{}", "from 1 to 64"),
        ("adapters", "[1]", "an object of adapters"),
        ("adapters", "{\"first\": \"a\", \"1\": \"b\"}", "one is called `first`"),
        ("adapters", "{\"1\": \"a\", \"2\": \"b\"}", "one is called `2`"),
        ("adapters", "{\"00\": \"a\", \"1\": \"b\"}", "one is called `00`"),
        ("adapters", "{\"0\": \"a\", \"1\": \"b\", \"2\": \"c\", \"3\": \"/home/d\"}", "`3` isn't in"),
        ("new_gate", "3", "unknown"),
    ] {
        let message = option("layerwise", key, value);
        let names_it = message.contains(&format!("`{key}`")) || says.contains('`');
        assert!(
            names_it && message.contains(says) && message.contains("adapter_config.json"),
            "{key} = {value}: {message}"
        );
    }
    let message = option("layerwise", "hidden_size", "48");
    assert!(message.contains("[27, 40]") || message.contains("48"), "{message}");
}

/// Writes the classifier again without one tensor, or with another in its place.
fn classifier(name: &str, tensor: &str, with: Option<(Vec<usize>, f32)>) -> String {
    refusal(name, |folder| {
        let path = folder.join("adapter_model.safetensors");
        let bytes = fs::read(&path).expect("tensors");
        let tensors = safetensors::SafeTensors::deserialize(&bytes).expect("safetensors");
        let mut kept: Vec<(String, safetensors::Dtype, Vec<usize>, Vec<u8>)> = Vec::new();
        for (own, view) in tensors.tensors() {
            if own != tensor {
                kept.push((own, view.dtype(), view.shape().to_vec(), view.data().to_vec()));
            }
        }
        if let Some((shape, value)) = with {
            let count = shape.iter().product();
            let values = [value].repeat(count).iter().flat_map(|value| value.to_le_bytes()).collect();
            kept.push((tensor.to_owned(), safetensors::Dtype::F32, shape, values));
        }
        let views = kept.iter().map(|(own, dtype, shape, bytes)| {
            (own, safetensors::tensor::TensorView::new(*dtype, shape.clone(), bytes).expect("a tensor"))
        });
        fs::write(&path, safetensors::serialize(views, None).expect("safetensors")).expect("written");
    })
}

#[test]
fn classifiers_that_cannot_be_used_are_refused_by_their_tensors() {
    let name = |layer: usize, what: &str| format!("base_model.internal_xlora_classifier.layers.{layer}.{what}");
    for (case, tensor, with, says) in [
        ("layerwise", name(0, "weight"), None, "of the classifier is missing; PEFT 0.21's save_pretrained leaves out"),
        ("top_two", name(3, "bias"), None, "is missing"),
        (
            "layerwise",
            name(0, "weight"),
            Some((vec![60, 40], 0.1)),
            "[60, 40] where [63, 40] (outputs, inputs, 3 for each of 21",
        ),
        ("layerwise", name(0, "bias"), Some((vec![63, 1], 0.1)), "[63, 1] where [63]"),
        ("top_two", name(3, "weight"), Some((vec![12, 3], 0.1)), "[12, 3] where [3, 12]"),
        ("shares", name(2, "weight"), Some((vec![9, 9], f32::NAN)), "holds NaN at element 0"),
        ("shares", name(4, "bias"), Some((vec![63], f32::INFINITY)), "holds inf at element 0"),
        ("layerwise", name(3, "weight"), Some((vec![2, 2], 0.1)), "is no part of a classifier of 1 layers"),
    ] {
        let message = classifier(case, &tensor, with);
        let is_named = message.contains(&format!("`{tensor}`")) && message.contains("adapter_model.safetensors");
        assert!(is_named && message.contains(says), "{message}");
    }
}

/// What is said of a mixture of one adapter of another golden model.
fn mixture_of_one(from: &str, name: &str) -> String {
    let folder = tempfile::tempdir().expect("a folder");
    let own = folder.path().join("mixture");
    copy(&golden(from).join("adapters").join(name), &own.join("0"));
    let config = br#"{"peft_type": "XLORA", "hidden_size": 24, "adapters": {"0": "somewhere"}}"#;
    fs::write(own.join("adapter_config.json"), config).expect("written");
    let (weight, bias) = ([0; 24 * 4], [0; 4]);
    let tensor = |shape: Vec<usize>, bytes| {
        safetensors::tensor::TensorView::new(safetensors::Dtype::F32, shape, bytes).expect("a tensor")
    };
    let layer = "base_model.internal_xlora_classifier.layers.0";
    let tensors = [
        (format!("{layer}.weight"), tensor(vec![1, 24], &weight[..])),
        (format!("{layer}.bias"), tensor(vec![1], &bias[..])),
    ];
    let bytes = safetensors::serialize(tensors, None).expect("safetensors");
    fs::write(own.join("adapter_model.safetensors"), bytes).expect("written");
    let model = Arc::new(Model::open(&golden(from).join("model")).expect("a golden model"));
    let source = AdapterDirectory::new(Some(folder.path()), &model, Element::F32).expect("built-in layers");
    source.prepare("mixture").expect_err("what can't be used").to_string()
}

#[test]
fn parts_that_are_no_lora_of_projections_are_refused() {
    let part = |from: &str, name: &str| {
        refusal("top_two", |folder| {
            fs::remove_dir_all(folder.join("1")).expect("a part");
            copy(&golden(from).join("adapters").join(name), &folder.join("1"));
        })
    };
    for (from, name, says) in [
        ("llama_zoo", "oft", "can't be a part of X-LoRA: it has `oft`"),
        ("llama_alora", "alora", "alora_invocation_tokens"),
        ("llama_xlora", "shares", "`peft_type` = \"XLORA\" is not supported: a network weighs its adapters"),
    ] {
        let message = part(from, name);
        assert!(message.contains(says), "{name}: {message}");
    }
    for (name, says) in [
        ("head", "changes the output matrix"),
        ("saved_head", "changes the output matrix"),
        ("tokens", "changes the token embedding"),
        ("lora_bias", "changes biases"),
    ] {
        let message = mixture_of_one("llama_ends/untied", name);
        assert!(message.contains(says), "{name}: {message}");
    }
    let missing = refusal("top_two", |folder| fs::remove_dir_all(folder.join("2")).expect("a part"));
    assert!(missing.contains("the adapter `2` isn't in") && missing.contains("adapters/top_two/2"), "{missing}");
}
