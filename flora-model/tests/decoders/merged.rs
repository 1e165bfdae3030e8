//! A model that keeps the weights of one adapter: its requests and those beside them, what is merged when an adapter is replaced, and
//! which adapters can't be.

use std::sync::Arc;

use flora_checkpoint::Model;
use flora_engine::{
    AdapterId, AdapterSource, Engine, LogitRows, Options, PlaceError, SequenceId, StepSegment, Vocabulary,
};
use flora_model::{AdapterDirectory, MergeError, ServeOptions};
use flora_plan::layer::Element;

use crate::golden::check;
use crate::invariance::crowd_changes_no_bit;
use crate::replaced::{ask, copy, write_version};
use crate::served::{Served, golden, load, load_by};
use crate::{device, is_host};

fn merging(model: &str, adapter: &str) -> Served {
    load_by(model, Element::F32, |model, options| {
        let options = ServeOptions { merged: Some(adapter.to_owned()), ..options.clone() };
        flora_model::load(&device(), model, &options)
    })
}

#[test]
fn a_merged_adapter_gives_transformers_outputs() {
    for (name, adapter) in [("llama_tiny", "lora"), ("llama_tiny", "hira"), ("gpt_bigcode", "lora_all")] {
        let mut model = merging(name, adapter);
        check(&mut model, adapter);
    }
}

#[test]
fn a_merged_adapter_s_rows_change_no_bit_in_a_crowd() {
    crowd_changes_no_bit(&mut merging("llama_tiny", "lora"));
}

/// The bits of a step of a sequence for each of these, all at once.
fn logits(model: &mut Served, adapters: &[Option<AdapterId>]) -> Vec<Vec<u32>> {
    let tokens = [5, 80, 3, 17, 90, 41, 9];
    let segment = |(own, adapter): (usize, &Option<AdapterId>)| StepSegment {
        sequence: SequenceId(own as u64),
        adapter: *adapter,
        first_position: 0,
        tokens: &tokens,
        prompt_tokens: tokens.len() as u32,
        logits: LogitRows::Last,
    };
    let segments: Vec<_> = adapters.iter().enumerate().map(segment).collect();
    let logits = model.step(&segments);
    (0..adapters.len()).for_each(|own| flora_engine::Decoder::release(&mut model.decoder, SequenceId(own as u64)));
    let bits = |logits: &[f32]| logits.iter().map(|logit| logit.to_bits()).collect();
    logits.chunks_exact(model.vocabulary()).map(bits).collect()
}

/// The merged adapter's sums are other ones than without, to the bit, and nobody else's are.
#[test]
fn the_weight_of_the_named_adapter_alone_is_merged() {
    let (mut merged, mut separate) = (merging("llama_tiny", "lora"), load("llama_tiny"));
    let of = |model: &mut Served| {
        let adapters = [None, Some(model.adapter("lora")), Some(model.adapter("hira"))];
        logits(model, &adapters)
    };
    let (with, without) = (of(&mut merged), of(&mut separate));
    assert_eq!((&with[0], &with[2]), (&without[0], &without[2]));
    assert_ne!(with[1], without[1], "nothing is merged");
}

/// An adapter whose files are replaced answers as the new version, by its own weights, and so does the one that had them before
/// under another name.
#[test]
fn a_replaced_adapter_is_merged_anew() {
    let model = Arc::new(Model::open(&golden("llama_tiny").join("model")).expect("a golden model"));
    let root = tempfile::tempdir().expect("a temporary folder");
    let (versions, adapters) = (root.path().join("versions"), root.path().join("adapters"));
    [&versions, &adapters].into_iter().for_each(|folder| std::fs::create_dir(folder).expect("a folder"));
    (0..3).for_each(|version| write_version(&versions, &model, version));
    let version = |version: usize| versions.join(format!("v{version}"));
    let named = (0..3).map(|number| (format!("v{number}"), version(number)));
    let source = AdapterDirectory::new(Some(&adapters), &model, Element::F32).expect("built in");
    let source = source.with_named(named).expect("names of their own");
    let start = |merged: Option<&str>| {
        let options = ServeOptions { merged: merged.map(str::to_owned), ..ServeOptions::default() };
        let decoder = flora_model::load(&device(), &model, &options).expect("a decoder");
        let pinned = merged.into_iter().map(str::to_owned).collect();
        let adapters = flora_engine::AdapterOptions { pinned, ..Options::default().adapters };
        let options = Options { adapters, ..Options::default() };
        Engine::start(decoder, source.clone(), Vocabulary::new(Vec::new()), options).expect("an engine")
    };
    let separate = start(None);
    let right: Vec<_> = (0..3).map(|at| ask(&separate.handle(), &format!("v{at}")).expect("a version")).collect();
    let distinct: std::collections::BTreeSet<_> = right.iter().collect();
    assert_eq!(distinct.len(), 3, "the versions can be told apart");
    let engine = start(Some("own"));
    for at in [0, 1, 2, 0, 2] {
        let _ = std::fs::remove_dir_all(adapters.join("own"));
        copy(&version(at), &adapters.join("own"));
        assert_eq!(ask(&engine.handle(), "own").as_ref(), Some(&right[at]), "version {at}");
        // Beside others, all at once.
        std::thread::scope(|scope| {
            let names = ["own", "v0", "own", "v1", "v2", "own"];
            let asked = names.map(|name| {
                let handle = engine.handle();
                scope.spawn(move || ask(&handle, name))
            });
            for (name, said) in names.into_iter().zip(asked) {
                let version = if name == "own" { at } else { usize::from(name.as_bytes()[1] - b'0') };
                assert_eq!(said.join().expect("no panic").as_ref(), Some(&right[version]), "{name} beside {at}");
            }
        });
    }
}

#[test]
fn what_a_merged_adapter_takes_is_told_and_what_cannot_be_is_refused() {
    let model = Arc::new(Model::open(&golden("llama_tiny").join("model")).expect("a golden model"));
    let source = |folder: &str| {
        let adapters = golden(folder).join("adapters");
        AdapterDirectory::new(Some(&adapters), &model, Element::F32).expect("built in")
    };
    let tiny = source("llama_tiny");
    let adapted = tiny.prepare("lora").expect("a golden adapter").prepared.adapted;
    let numbers = |path: &String| model.projection(path).map(|own| (own.d * own.k) as u64).expect("a projection");
    let numbers: u64 = adapted.modules.keys().map(numbers).sum();
    assert!(numbers > 0);
    assert_eq!(tiny.merged_bytes("lora", Element::F32).expect("it can be"), 4 * numbers);
    assert_eq!(tiny.merged_bytes("lora", Element::Bf16).expect("it can be"), 2 * numbers);
    let refused = tiny.merged_bytes("laro", Element::F32).expect_err("there is none");
    assert!(matches!(refused, MergeError::Unknown { .. }));
    assert_eq!(refused.to_string(), "there is no adapter `laro` to merge; there are: hira, lora");

    // A weight of its own would be the base's.
    let zoo =
        AdapterDirectory::new(Some(&golden("llama_zoo").join("adapters")), &model, Element::F32).expect("built in");
    let refused = zoo.merged_bytes("oft", Element::F32).expect_err("its change is sparse");
    assert!(matches!(refused, MergeError::NothingToMerge(_)), "{refused}");

    let mixtures = source("llama_xlora");
    let refused = mixtures.merged_bytes("layerwise", Element::F32).expect_err("it has gates");
    assert!(matches!(refused, MergeError::Gated(_)), "{refused}");
    // Nor is it placed where it became one.
    if is_host() {
        let mut model = merging("llama_tiny", "layerwise");
        let prepared = mixtures.prepare("layerwise").expect("a golden adapter").prepared;
        let refused = flora_engine::Decoder::place(&mut model.decoder, AdapterId(0), prepared);
        assert!(matches!(refused, Err(PlaceError::Unfit(failure)) if failure.to_string().contains("merge another")));
    }
}
