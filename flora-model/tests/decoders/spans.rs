//! Several adapters in one request against PEFT, through the engine: sums of them with weights, and spans of tokens by one each.

use std::sync::Arc;

use flora_checkpoint::Model;
use flora_engine::{
    AdapterChoice, AdapterFailure, AdapterSource, AdapterSpans, Composition, LogProbabilities, Options, Span, Spans,
};
use flora_model::AdapterDirectory;
use flora_plan::layer::Element;
use serde_json::Value;

use crate::activated::{Served, log_probability};
use crate::golden::{Prompt, prompts};
use crate::served::golden;

/// What a golden file says of its adapters.
fn about(name: &str) -> Value {
    let path = golden("llama_spans").join("outputs").join(format!("{name}.json"));
    serde_json::from_slice(&std::fs::read(path).expect("a golden file")).expect("JSON")
}

/// A sum, as the golden file of its outputs has it.
fn sum(name: &str) -> Composition {
    let about = about(name);
    let parts = about["parts"].as_array().expect("a list").iter().map(|part| {
        let (name, weight) = (part[0].as_str().expect("a name"), part[1].as_f64().expect("a weight"));
        (name.to_owned(), weight)
    });
    Composition::new(parts).expect("names that differ")
}

/// An adapter by its name in golden files.
fn choice(name: &Value) -> Option<AdapterChoice> {
    match name.as_str()? {
        name @ ("sum_of_two" | "sum_of_three" | "difference") => Some(sum(name).into()),
        name => Some(name.into()),
    }
}

fn position(number: &Value) -> Option<usize> {
    Some(number.as_u64()? as usize)
}

/// Asks for each prompt of a golden file, and compares each token's log-probability, in chunks and over what other requests left.
fn check(name: &str, adapters: &AdapterSpans) {
    let (prompts, _) = prompts(&golden("llama_spans").join("outputs"), name);
    assert_eq!(prompts.len(), 2);
    for chunk_tokens in [64, 8] {
        let mut served = Served::new("llama_spans", Options { chunk_tokens, ..Options::default() });
        for prompt in &prompts {
            compare(name, &mut served, adapters, prompt);
        }
    }
}

/// How far the log-probabilities of a prompt's tokens are off.
pub(crate) fn compare(name: &str, served: &mut Served, adapters: &AdapterSpans, prompt: &Prompt) -> f32 {
    let steps = prompt.continuation.len() as u32;
    let both = LogProbabilities { generated: Some(0), prompt: Some(0) };
    let heard = served.ask(&prompt.tokens, adapters.clone(), steps, both);
    assert_eq!(heard.tokens(), prompt.continuation, "{name} {}", prompt.name);
    assert_eq!(heard.prompt.len(), prompt.tokens.len() - 1);
    let off = |(position, scored): (usize, &flora_engine::ScoredToken)| {
        (scored.log_probability - log_probability(prompt, position, scored.token)).abs()
    };
    let worst = heard.prompt.iter().enumerate().map(off).fold(0.0, f32::max);
    println!("{name} {}: log-probabilities are off by {worst:.2e}", prompt.name);
    // As for other adapters of this model: logits go up to 20, and are sums of f32 through 3 layers.
    assert!(worst < 1e-4, "{name} {}: off by {worst}", prompt.name);
    // The same over its own keys and values, and over the base model's as far as nothing acts before.
    served.ask(&prompt.tokens, None::<&str>, 1, LogProbabilities::default());
    let said_alone = LogProbabilities { generated: Some(0), prompt: None };
    let again = served.ask(&prompt.tokens, adapters.clone(), steps, said_alone);
    assert_eq!(again.said, heard.said, "{name} {}: the bits of what is said", prompt.name);
    worst
}

#[test]
fn sums_of_adapters_equal_pefts() {
    for name in ["sum_of_two", "sum_of_three", "difference"] {
        check(name, &AdapterChoice::from(sum(name)).into());
    }
}

#[test]
fn spans_of_adapters_equal_pefts() {
    for name in ["middle", "answer", "sums", "within", "whole"] {
        let name = format!("spans_{name}");
        let about = about(&name);
        let spans = about["spans"].as_array().expect("a list").iter().map(|span| Span {
            start: position(&span[0]).expect("a position"),
            end: position(&span[1]),
            adapter: choice(&span[2]),
        });
        let adapters = Spans::new(choice(&about["own"]), spans).expect("spans that don't overlap");
        check(&name, &adapters);
    }
}

/// The adapters of a golden folder, for a golden model.
fn source(folder: &str, model: &str) -> AdapterDirectory {
    let model = Arc::new(Model::open(&golden(model).join("model")).expect("a golden model"));
    AdapterDirectory::new(Some(&golden(folder).join("adapters")), &model, Element::F32).expect("built-in layers")
}

fn composed(parts: &[(&str, f64)]) -> Composition {
    Composition::new(parts.iter().map(|(name, weight)| ((*name).to_owned(), *weight))).expect("names that differ")
}

#[test]
fn a_sum_is_known_by_its_parts_their_order_and_weights() {
    let source = source("llama_spans", "llama_tiny");
    let content = |parts: &[(&str, f64)]| {
        let read = source.compose(&composed(parts)).expect("parts that are weighted");
        assert_eq!(read.version, source.version_of(&composed(parts).into()).expect("a version"));
        read.prepared.content
    };
    let both = content(&[("one", 0.5), ("two", 0.25)]);
    assert_eq!(both, content(&[("one", 0.5), ("two", 0.25)]));
    let others: [&[(&str, f64)]; 4] = [
        &[("two", 0.25), ("one", 0.5)],
        &[("one", 0.5), ("two", 0.5)],
        &[("one", 0.5), ("three", 0.25)],
        &[("one", 0.5)],
    ];
    others.into_iter().for_each(|other| assert_ne!(both, content(other), "{other:?}"));
    assert_ne!(content(&[("one", 1.0)]), source.prepare("one").expect("an adapter").prepared.content);
}

#[test]
fn what_is_no_change_of_projections_is_refused_by_name() {
    let refusal = |(folder, model): (&str, &str), parts: &[(&str, f64)]| {
        source(folder, model).compose(&composed(parts)).expect_err("what isn't weighted").failure
    };
    let unknown = refusal(("llama_spans", "llama_tiny"), &[("one", 0.5), ("four", 0.5)]);
    assert_eq!(unknown, AdapterFailure::Unknown("four".to_owned()));
    let untied = ("llama_ends/untied", "llama_ends/untied");
    for (folders, name, reason) in [
        (("llama_alora", "llama_tiny"), "alora", "alora_invocation_tokens"),
        (("llama_xlora", "llama_tiny"), "layerwise", "it is X-LoRA"),
        (("llama_zoo", "llama_tiny"), "oft", "`oft` (oft)"),
        (("llama_zoo", "llama_tiny"), "shira", "`shira` (shira)"),
        (untied, "saved_head", "`saved_head` can't be a part of a sum: it replaces the output matrix"),
        (untied, "tokens", "`tokens` can't be a part of a sum: it replaces the token embedding"),
    ] {
        let message = refusal(folders, &[(name, 1.0)]).to_string();
        assert!(message.contains(reason), "{message}");
    }
}
