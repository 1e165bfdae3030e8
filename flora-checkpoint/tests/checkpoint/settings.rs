//! What a request for a new adapter says of a model's modules, and that what it makes can be written and replaced.

use flora_checkpoint::peft::description::{Extent, LayerDescription};
use flora_checkpoint::{AdapterFolder, AdapterKinds, AdapterModule, AdapterRequest, AdapterSettings, Operand};
use serde_json::{Value, json};
use std::collections::BTreeMap;
use std::path::Path;

const PATHS: [&str; 5] = [
    "model.layers.0.self_attn.q_proj",
    "model.layers.0.self_attn.k_proj",
    "model.layers.1.self_attn.q_proj",
    "model.layers.1.mlp.down_proj",
    "lm_head",
];

fn request(layer: &str, rank: Option<usize>, targets: &[&str], options: Value) -> AdapterRequest {
    let Value::Object(options) = options else { panic!("an object") };
    let targets = targets.iter().map(|target| (*target).to_owned()).collect();
    AdapterRequest { layer: layer.to_owned(), rank, alpha: None, targets, options }
}

fn settings(request: &AdapterRequest) -> Result<AdapterSettings, String> {
    AdapterSettings::new(Path::new("jobs.toml"), request, &AdapterKinds::builtin()).map_err(|error| error.to_string())
}

#[test]
fn options_mean_what_they_mean_in_a_finished_adapter() {
    let options = json!({
        "use_rslora": true, "rank_pattern": {"layers.1.self_attn.q_proj": 4},
        "alpha_pattern": {"k_proj": 8}, "layers_to_transform": [0, 1],
    });
    let said = AdapterRequest { alpha: Some(6.0), ..request("dora", Some(9), &["q_proj", "k_proj"], options) };
    let settings = settings(&said).expect("sensible options");
    assert_eq!(settings.kind().name(), "dora");
    let scale = |path: &str| {
        let module = settings.module(path).expect("a path").expect("a target");
        (module.layer.name.clone(), module.rank, module.scalars["s"])
    };
    assert_eq!(scale(PATHS[0]), ("dora".to_owned(), 9, 2.0));
    assert_eq!(scale(PATHS[1]), ("dora".to_owned(), 9, (8.0f64 / 3.0) as f32));
    assert_eq!(scale(PATHS[2]), ("dora".to_owned(), 4, 3.0));
    assert_eq!(settings.module(PATHS[3]).expect("a path"), None);
}

#[test]
fn without_an_alpha_the_scale_is_one() {
    for options in [json!({}), json!({"use_rslora": true})] {
        let settings = settings(&request("lora", Some(7), &["all-linear"], options)).expect("sensible options");
        assert_eq!(settings.module(PATHS[3]).expect("a path").expect("a target").scalars["s"], 1.0);
        assert_eq!(settings.module("lm_head").expect("a path"), None);
    }
}

#[test]
fn listed_modules_are_of_the_layer_that_lists_them() {
    let options = json!({"feedforward_modules": ["down_proj"]});
    let settings = settings(&request("ia3", None, &["q_proj", "down_proj"], options)).expect("sensible options");
    let layer = |path: &str| settings.module(path).expect("a path").expect("a target").layer.name.clone();
    assert_eq!([layer(PATHS[0]), layer(PATHS[3])], ["ia3", "ia3_feedforward"]);
}

#[test]
fn mistakes_are_named_with_their_mend() {
    let refused = |request: &AdapterRequest| settings(request).err().expect("a mistake");
    let lora = |options| request("lora", Some(2), &["q_proj"], options);
    let with_alpha = |alpha, request| AdapterRequest { alpha: Some(alpha), ..request };
    for (message, words) in [
        (refused(&request("lara", Some(2), &["q_proj"], json!({}))), "one of lora, dora, ia3"),
        (refused(&request("lora", None, &["q_proj"], json!({}))), "`rank` is missing"),
        (refused(&request("ia3", Some(2), &["q_proj"], json!({}))), "ia3 has no rank"),
        (refused(&request("hira", Some(0), &["q_proj"], json!({}))), "from 1 to"),
        (refused(&request("lora", Some(2), &[], json!({}))), "name at least one module"),
        (refused(&with_alpha(2.0, request("flora", Some(2), &["q_proj"], json!({})))), "flora has no scale"),
        (refused(&with_alpha(f64::NAN, lora(json!({})))), "finite number"),
        (refused(&lora(json!({"lora_dropout": 0.1}))), "training of LORA doesn't have it"),
        (refused(&lora(json!({"use_dora": true}))), "said by `kind`"),
        (refused(&lora(json!({"rank_pattern": {"(": 2}}))), "can't be used"),
    ] {
        assert!(message.contains("jobs.toml") && message.contains(words), "{message} has no {words}");
    }
    let settings = settings(&request("lora", Some(2), &["q_proj", "qproj"], json!({}))).expect("names alone");
    let message = settings.check_targets(PATHS.into_iter()).expect_err("a name of nothing").to_string();
    assert!(message.contains("qproj") && message.contains("q_proj, k_proj, down_proj, lm_head"), "{message}");
}

/// An adapter as a trainer makes it: every described tensor in its shape.
fn made(name: &str, settings: &AdapterSettings, value: f32) -> AdapterFolder {
    let mut modules = BTreeMap::new();
    for path in PATHS {
        let Some(module) = settings.module(path).expect("a path") else { continue };
        let extent = |extent| match extent {
            Extent::Inputs => 3,
            Extent::Outputs => 5,
            Extent::Rank => module.rank,
            Extent::Fixed(number) => number,
            Extent::Components | Extent::Any => panic!("nothing that functions read is trained"),
        };
        let mut operands = BTreeMap::new();
        for tensor in &module.layer.tensors {
            let shape: Vec<usize> = tensor.shape().into_iter().map(extent).collect();
            let values = vec![value; shape.iter().product()];
            operands.insert(tensor.operand.clone(), Operand { shape, values });
        }
        for (operand, number) in &module.scalars {
            operands.insert(operand.clone(), Operand { shape: Vec::new(), values: vec![*number] });
        }
        modules
            .insert(path.to_owned(), AdapterModule { layer: module.layer.name.clone(), rank: module.rank, operands });
    }
    AdapterFolder::new(name, settings.kind().clone(), modules)
}

#[test]
fn what_every_layer_makes_is_written_read_back_and_replaced() {
    let kinds = AdapterKinds::builtin();
    // Those that are trained.
    let is_trained = |layer: &&LayerDescription| layer.tensors.iter().all(|tensor| tensor.init.is_some());
    let layers = kinds.descriptions().flat_map(|kind| &kind.layers).filter(is_trained);
    let layers: Vec<String> = layers.map(|layer| layer.name.clone()).collect();
    assert_eq!(layers.len(), 8);
    for layer in layers {
        let parent = tempfile::tempdir().expect("a temporary folder");
        let has_rank = kinds.kind_of_layer(&layer).expect("a kind").description().rank.is_some();
        let options = if has_rank { json!({"rank_pattern": {"k_proj": 1}}) } else { json!({}) };
        let settings = settings(&request(&layer, has_rank.then_some(2), &["q_proj", "k_proj"], options)).expect(&layer);
        let read = || AdapterFolder::open(&parent.path().join("a"), &kinds).expect(&layer);
        for value in [0.5, -1.25] {
            let adapter = made("a", &settings, value);
            adapter.replace(parent.path()).expect(&layer);
            assert_eq!((read().kind, read().modules), (adapter.kind, adapter.modules), "{layer}");
        }
        assert!(made("a", &settings, 1.0).write(parent.path()).is_err(), "it exists");
        let left: Vec<_> = std::fs::read_dir(parent.path()).expect("a folder").collect();
        assert_eq!(left.len(), 1, "nothing is left beside it");
        std::fs::remove_file(parent.path().join("a/adapter_config.json")).expect("a file");
        let refused = made("a", &settings, 1.0).replace(parent.path()).expect_err("no adapter's folder").to_string();
        assert!(refused.contains("exists already"), "{refused}");
    }
}
