//! Adapter folders: what PEFT's options mean, what is written is read back, and one error per mistake.

use flora_checkpoint::{AdapterError, AdapterFolder, AdapterKind, AdapterKinds, AdapterModule, Model, Operand};
use proptest::prelude::*;
use std::collections::BTreeMap;
use std::fs;
use std::path::Path;

/// A tensor's name after the prefix, and its shape.
pub(crate) type Shaped<'a> = (&'a str, &'a [usize]);

pub(crate) const Q: &str = "model.layers.0.self_attn.q_proj";

/// Writes a folder `a` of the given config and F32 tensors (name after the prefix, shape), whose values count up.
pub(crate) fn folder(config: &str, tensors: &[(&str, &[usize])]) -> tempfile::TempDir {
    let folder = tempfile::tempdir().expect("a temporary folder");
    fs::write(folder.path().join("adapter_config.json"), config).expect("writing a config");
    write_tensors(folder.path(), tensors.iter().map(|(name, shape)| (format!("base_model.model.{name}"), *shape)));
    folder
}

fn write_tensors<'a>(folder: &Path, tensors: impl IntoIterator<Item = (String, &'a [usize])>) {
    let tensors: Vec<(String, &[usize], Vec<u8>)> = tensors
        .into_iter()
        .map(|(name, shape)| {
            let count = shape.iter().product::<usize>();
            (name, shape, (1..=count).flat_map(|i| (i as f32).to_le_bytes()).collect())
        })
        .collect();
    let views = tensors.iter().map(|(name, shape, bytes)| {
        let view = safetensors::tensor::TensorView::new(safetensors::Dtype::F32, shape.to_vec(), bytes);
        (name, view.expect("matching bytes"))
    });
    let bytes = safetensors::serialize(views, None).expect("serialisable tensors");
    fs::write(folder.join("adapter_model.safetensors"), bytes).expect("writing tensors");
}

/// LoRA of rank 2 on a 5 → 3 query projection.
pub(crate) const LORA: &[(&str, &[usize])] = &[
    ("model.layers.0.self_attn.q_proj.lora_A.weight", &[2, 5]),
    ("model.layers.0.self_attn.q_proj.lora_B.weight", &[3, 2]),
];

/// A LoRA config with further members.
fn lora(more: &str) -> String {
    let comma = if more.is_empty() { "" } else { ", " };
    format!(r#"{{"peft_type": "LORA", "target_modules": ["q_proj"], "r": 2, "lora_alpha": 3{comma}{more}}}"#)
}

fn open(config: &str, tensors: &[(&str, &[usize])]) -> Result<AdapterFolder, AdapterError> {
    AdapterFolder::open(folder(config, tensors).path(), &AdapterKinds::builtin())
}

fn scale(more: &str) -> f32 {
    open(&lora(more), LORA).expect(more).modules[Q].operands["s"].values[0]
}

#[test]
fn lora_factors_are_transposed_to_inputs_by_rank_and_rank_by_outputs() {
    let adapter = open(&lora(""), LORA).expect("an adapter");
    let module = &adapter.modules[Q];
    assert_eq!((adapter.kind.name(), &module.layer[..], module.rank), ("lora", "lora", 2));
    let b = [1.0, 6.0, 2.0, 7.0, 3.0, 8.0, 4.0, 9.0, 5.0, 10.0];
    assert_eq!(module.operands["b"], Operand { shape: vec![5, 2], values: b.to_vec() });
    assert_eq!(module.operands["a"], Operand { shape: vec![2, 3], values: vec![1.0, 3.0, 5.0, 2.0, 4.0, 6.0] });
}

#[test]
fn the_scale_follows_alpha_rank_and_patterns() {
    assert_eq!(scale(""), 1.5);
    assert_eq!(scale(r#""use_rslora": true"#), (3.0 / 2f64.sqrt()) as f32);
    assert_eq!(scale(r#""alpha_pattern": {"q_proj": 7}"#), 3.5);
    // The first match in the order of the file holds.
    assert_eq!(scale(r#""alpha_pattern": {"z": 1, "self_attn.q_proj": 9, "q_proj": 7}"#), 4.5);
    // A pattern matches the whole path or what follows a dot, not any end.
    assert_eq!(scale(r#""alpha_pattern": {"proj": 7, "_proj": 7, "^q_proj": 7, "layers": 7}"#), 1.5);
    assert_eq!(scale(r#""alpha_pattern": {"layers\\.\\d+\\..*(?<!k)_proj": 7}"#), 3.5);
}

#[test]
fn our_own_kind_is_stored_in_the_order_of_the_paper() {
    let config =
        |reduce: &str| format!(r#"{{"peft_type": "FLORA", "target_modules": ["q_proj"], "r": 2, "reduce": {reduce}}}"#);
    let tensors: &[(&str, &[usize])] = &[("q_proj.flora_B", &[5, 2]), ("q_proj.flora_A", &[2, 3])];
    for (reduce, layer) in [("\"sum\"", "flora"), ("\"mean\"", "flora_mean")] {
        let adapter = open(&config(reduce), tensors).expect("an adapter");
        let module = &adapter.modules["q_proj"];
        assert_eq!((&module.layer[..], module.rank), (layer, 2));
        assert_eq!(module.operands["b"].shape, [5, 2]);
        assert_eq!(module.operands["b"].values[..3], [1.0, 2.0, 3.0]);
    }
    for reduce in ["null", "\"max\"", "1"] {
        assert!(open(&config(reduce), tensors).is_err(), "{reduce}");
    }
}

#[test]
fn ia3_feedforward_comes_from_the_config_and_must_agree_with_the_shape() {
    let config = |feedforward: &str| {
        format!(r#"{{"peft_type": "IA3", "target_modules": ["down"], "feedforward_modules": {feedforward}}}"#)
    };
    let layer = |feedforward: &str, shape: &[usize]| {
        open(&config(feedforward), &[("down.ia3_l", shape)]).map(|adapter| adapter.modules["down"].layer.clone())
    };
    assert_eq!(layer("[\"down\"]", &[1, 4]).ok().as_deref(), Some("ia3_feedforward"));
    assert_eq!(layer("\"do.*\"", &[1, 4]).ok().as_deref(), Some("ia3_feedforward"));
    assert_eq!(layer("[]", &[4, 1]).ok().as_deref(), Some("ia3"));
    assert_eq!(layer("null", &[4, 1]).ok().as_deref(), Some("ia3"));
    assert_eq!(layer("null", &[1, 4]).ok().as_deref(), Some("ia3_feedforward"));
    for (feedforward, shape) in
        [("[\"down\"]", &[4, 1][..]), ("[]", &[1, 4]), ("null", &[1, 1]), ("[]", &[4]), ("[]", &[2, 2])]
    {
        assert!(layer(feedforward, shape).is_err(), "{feedforward} with {shape:?}");
    }
}

#[test]
fn mistakes_in_the_config_are_named() {
    let cases = [
        ("{}", "`peft_type` is missing"),
        (r#"{"peft_type": "POLY"}"#, "`peft_type` `POLY` is not supported"),
        (r#"{"peft_type": ["LORA"]}"#, "`peft_type`"),
        ("[]", "must be an object"),
        (r#"{"peft_type": "LORA", "peft_type": "LORA"}"#, "there twice"),
        (&lora(r#""lora_alpha": NaN"#), "no NaN"),
        (&lora(r#""alpha_pattern": {"q_proj": NaN}"#), "no NaN"),
        (&lora(r#""alpha_pattern": {"q_proj": "7"}"#), "`alpha_pattern`"),
        (&lora(r#""alpha_pattern": {"q_proj": 1e300}"#), "range of f32"),
        (&lora(r#""alpha_pattern": {"q_(": 1}"#), "pattern"),
        (&lora(r#""alpha_pattern": {"(a|aa)+\\1?$.{0,9}(?<=x)b|(.*)*\\2x": 1}"#), "`alpha_pattern`"),
        (&lora(r#""rank_pattern": [2]"#), "`rank_pattern`"),
        (&lora(r#""rank_pattern": {"q_proj": 3}"#), "`rank_pattern` says 3"),
        (&lora(r#""rank_pattern": {"q_proj": 0}"#), "whole number"),
        (&lora(r#""use_rslora": "yes""#), "`use_rslora` is \"yes\""),
        (&lora(r#""fan_in_fan_out": 3"#), "`fan_in_fan_out`"),
        (&lora(r#""use_dora": true"#), "lora_magnitude_vector` is missing"),
        (&lora(r#""layers_to_transform": [1]"#), "not targeted"),
        (&lora(r#""layers_to_transform": "0""#), "layer numbers"),
        (&lora(r#""layers_to_transform": 0, "layers_pattern": "h""#), "not targeted"),
        (&lora(r#""exclude_modules": ["q_proj"]"#), "not targeted"),
        (&lora(r#""future_option": {"x": 1}"#), "`future_option`"),
        (r#"{"peft_type": "LORA", "target_modules": ["q_proj"], "lora_alpha": 3}"#, "`r` is missing"),
        (r#"{"peft_type": "LORA", "target_modules": ["q_proj"], "r": 2}"#, "`lora_alpha` is missing"),
        (r#"{"peft_type": "LORA", "target_modules": ["q_proj"], "r": -2, "lora_alpha": 3}"#, "`r` is -2"),
        (r#"{"peft_type": "LORA", "target_modules": ["q_proj"], "r": 4, "lora_alpha": 3}"#, "`r` says 4"),
        (r#"{"peft_type": "LORA", "target_modules": ["k_proj"], "r": 2, "lora_alpha": 3}"#, "not targeted"),
        (r#"{"peft_type": "LORA", "target_modules": ".*k_proj", "r": 2, "lora_alpha": 3}"#, "not targeted"),
        (r#"{"peft_type": "LORA", "target_modules": 3, "r": 2, "lora_alpha": 3}"#, "`target_modules` is 3"),
    ];
    for (config, expected) in cases {
        let message = open(config, LORA).expect_err(config).to_string();
        assert!(message.contains(expected) && message.contains("adapter_"), "{config}: {message}");
    }
}

#[test]
fn harmless_options_are_accepted() {
    for more in [
        "",
        r#""target_modules_note": null, "lora_dropout": 0.1, "task_type": "CAUSAL_LM", "inference_mode": false"#,
        r#""layers_to_transform": [0, 3], "layers_pattern": "layers""#,
        r#""layers_to_transform": 0"#,
        r#""exclude_modules": ["k_proj"], "fan_in_fan_out": true, "init_lora_weights": "gaussian""#,
        r#""rank_pattern": {"self_attn.q_proj": 2}"#,
    ] {
        assert!(open(&lora(more), LORA).is_ok(), "{more}");
    }
    let all = r#"{"peft_type": "LORA", "target_modules": "all-linear", "r": 2, "lora_alpha": 3}"#;
    assert!(open(all, LORA).is_ok());
}

#[test]
fn mistakes_in_the_tensors_are_named() {
    let (a, b) = (LORA[0], LORA[1]);
    let cases: &[(&[Shaped], &str)] = &[
        (&[a], "lora_B.weight` is missing"),
        (&[], "no lora tensors"),
        (&[a, b, ("x.lora_A.weight", &[2, 5])], "`base_model.model.x.lora_B.weight` is missing"),
        (&[a, b, ("model.layers.0.self_attn.q_proj.lora_B.bias", &[3])], "is no part of a lora adapter"),
        (&[a, b, ("lora_A.weight", &[2, 5])], "is no part of a lora adapter"),
        (&[a, ("model.layers.0.self_attn.q_proj.lora_B.weight", &[3, 4])], "has rank 4"),
        (&[a, ("model.layers.0.self_attn.q_proj.lora_B.weight", &[6])], "has the shape [6]"),
        (&[a, ("model.layers.0.self_attn.q_proj.lora_B.weight", &[0, 2])], "has the shape [0, 2]"),
        (&[a, ("model.layers.0.self_attn.q_proj.lora_B.weight", &[3, 2, 1, 1])], "has the shape [3, 2, 1, 1]"),
    ];
    for (tensors, expected) in cases {
        let message = open(&lora(""), tensors).expect_err(expected).to_string();
        assert!(message.contains(expected), "{message}");
    }

    let unprefixed = folder(&lora(""), LORA);
    write_tensors(unprefixed.path(), [("q_proj.lora_A.weight".to_string(), &[2usize, 5][..])]);
    let message = AdapterFolder::open(unprefixed.path(), &AdapterKinds::builtin()).expect_err("no prefix").to_string();
    assert!(message.contains("does not start with"), "{message}");

    let dora = LORA.iter().copied().chain([("model.layers.0.self_attn.q_proj.lora_magnitude_vector", &[4][..])]);
    let message = open(&lora(r#""use_dora": true"#), &dora.collect::<Vec<_>>()).expect_err("4 for 3").to_string();
    assert!(message.contains("[3], the outputs of `lora_B`"), "{message}");
}

#[test]
fn values_and_types_are_checked() {
    for (dtype, bytes, expected) in [
        (safetensors::Dtype::F32, f32::NAN.to_le_bytes().repeat(10), "NaN at element 0"),
        (safetensors::Dtype::I32, vec![0; 40], "element type I32"),
        (safetensors::Dtype::F64, vec![0; 80], "element type F64"),
    ] {
        let folder = folder(&lora(""), LORA);
        let view = safetensors::tensor::TensorView::new(dtype, vec![2, 5], &bytes).expect("matching bytes");
        let tensors = [(format!("base_model.model.{Q}.lora_A.weight"), view)];
        let bytes = safetensors::serialize(tensors, None).expect("serialisable tensors");
        fs::write(folder.path().join("adapter_model.safetensors"), bytes).expect("writing tensors");
        let message = AdapterFolder::open(folder.path(), &AdapterKinds::builtin()).expect_err(expected).to_string();
        assert!(message.contains(expected) && message.contains("lora_A"), "{message}");
    }
}

#[test]
fn what_is_no_adapter_folder_is_refused() {
    let message =
        |path: &Path| AdapterFolder::open(path, &AdapterKinds::builtin()).expect_err("no adapter").to_string();
    assert!(message(Path::new("/nonexistent")).contains("no such folder"));
    let folder = tempfile::tempdir().expect("a temporary folder");
    assert!(message(folder.path()).contains("no adapter_config.json"));
    fs::write(folder.path().join("adapter_config.json"), lora("")).expect("writing a config");
    assert!(message(folder.path()).contains("no adapter_model.safetensors"));
    fs::write(folder.path().join("adapter_model.bin"), "").expect("writing a pickle");
    let pickle = message(folder.path());
    assert!(pickle.contains("pickle") && pickle.contains("save_pretrained"), "{pickle}");
    fs::create_dir(folder.path().join("adapter_model.safetensors")).expect("a folder in place of the tensors");
    assert!(message(folder.path()).contains("not a regular file"));
}

/// The Hugging Face cache has links in place of files, and a link to the snapshot is an adapter of the link's name.
#[cfg(unix)]
#[test]
fn links_lead_where_they_want() {
    use std::os::unix::fs::symlink;
    let blobs = folder(&lora(""), LORA);
    let cache = tempfile::tempdir().expect("a temporary folder");
    let snapshot = cache.path().join("models--a--b/snapshots/0123abc");
    fs::create_dir_all(&snapshot).expect("a folder");
    fs::create_dir(cache.path().join("models--a--b/blobs")).expect("a folder");
    for (blob, name) in [("1f", "adapter_config.json"), ("2e", "adapter_model.safetensors")] {
        fs::copy(blobs.path().join(name), cache.path().join("models--a--b/blobs").join(blob)).expect("a copy");
        symlink(Path::new("../../blobs").join(blob), snapshot.join(name)).expect("a link");
    }
    let link = cache.path().join("sql");
    symlink(&snapshot, &link).expect("a link");
    let adapter = AdapterFolder::open(&link, &AdapterKinds::builtin()).expect("an adapter");
    assert_eq!((adapter.name.as_str(), adapter.modules.len()), ("sql", 1));

    fs::remove_file(cache.path().join("models--a--b/blobs/2e")).expect("a blob");
    let message = AdapterFolder::open(&link, &AdapterKinds::builtin()).expect_err("no tensors").to_string();
    assert!(message.contains("adapter_model.safetensors is a link that leads nowhere"), "{message}");
}

fn operand(shape: Vec<usize>) -> impl Strategy<Value = Operand> {
    let count: usize = shape.iter().product();
    proptest::collection::vec(-4f32..4.0, count).prop_map(move |values| Operand { shape: shape.clone(), values })
}

/// The kind whose modules are of the built-in layer.
fn kind(layer: &str) -> AdapterKind {
    AdapterKinds::builtin().kind_of_layer(layer).expect("a built-in layer")
}

fn module(kind: &'static str, mean: bool) -> impl Strategy<Value = AdapterModule> {
    (1usize..20, 1usize..20, 1usize..7, any::<bool>()).prop_flat_map(move |(d, k, r, feedforward)| {
        let (layer, rank, shapes): (_, _, Vec<(&'static str, Vec<usize>)>) = match kind {
            "lora" => ("lora", r, vec![("b", vec![d, r]), ("a", vec![r, k]), ("s", vec![])]),
            "dora" => ("dora", r, vec![("b", vec![d, r]), ("a", vec![r, k]), ("s", vec![]), ("m", vec![k])]),
            "ia3" if feedforward => ("ia3_feedforward", 0, vec![("l", vec![d])]),
            "ia3" => ("ia3", 0, vec![("l", vec![k])]),
            "hira" => ("hira", r, vec![("b", vec![d, r]), ("a", vec![r, k])]),
            _ => (if mean { "flora_mean" } else { "flora" }, r, vec![("b", vec![d, r]), ("a", vec![r, k])]),
        };
        let operands: Vec<_> =
            shapes.into_iter().map(|(name, shape)| (Just(name.to_string()), operand(shape))).collect();
        operands.prop_map(move |operands| {
            let (layer, operands) = (layer.to_string(), operands.into_iter().collect());
            AdapterModule { layer, rank, operands }
        })
    })
}

fn adapter() -> impl Strategy<Value = AdapterFolder> {
    (proptest::sample::select(vec!["lora", "dora", "ia3", "hira", "flora"]), any::<bool>()).prop_flat_map(
        |(name, mean)| {
            let path = "[a-z]{1,3}(\\.[0-9]{1,2}\\.[a-z_+(-]{1,4})?";
            proptest::collection::btree_map(path, module(name, mean), 1..4)
                .prop_map(move |modules: BTreeMap<_, _>| AdapterFolder::new("alice", kind(name), modules))
        },
    )
}

proptest! {
    #![proptest_config(ProptestConfig { cases: 64, rng_seed: proptest::test_runner::RngSeed::Fixed(1), ..Default::default() })]

    /// Reading gives back what was written, bit for bit; a refusal to write (paths that PEFT's rules confuse) leaves nothing.
    #[test]
    fn writing_and_reading_are_inverse(adapter in adapter()) {
        let parent = tempfile::tempdir().expect("a temporary folder");
        match adapter.write(parent.path()) {
            Ok(path) => {
                let again = AdapterFolder::open(&path, &AdapterKinds::builtin()).expect("what was written");
                prop_assert_eq!(&again.name, "alice");
                prop_assert_eq!((again.kind, again.modules), (adapter.kind, adapter.modules));
            }
            Err(error) => {
                prop_assert!(adapter.kind.name() == "ia3", "{}", error);
                prop_assert_eq!(fs::read_dir(parent.path()).expect("the parent").count(), 0);
            }
        }
    }
}

#[test]
fn what_can_t_be_written_is_refused() {
    let values = |shape: &[usize]| Operand { shape: shape.to_vec(), values: vec![1.0; shape.iter().product()] };
    let module = |rank, b: Operand, s: f32| AdapterModule {
        layer: "lora".to_string(),
        rank,
        operands: [("b", b), ("a", values(&[2, 3])), ("s", Operand { shape: vec![], values: vec![s] })]
            .map(|(name, operand)| (name.to_string(), operand))
            .into(),
    };
    let parent = tempfile::tempdir().expect("a temporary folder");
    let write = |name: &str, module: AdapterModule| {
        AdapterFolder::new(name, kind("lora"), [("q".to_string(), module)].into()).write(parent.path())
    };
    for name in ["", "..", "a/b", "/a"] {
        assert!(write(name, module(2, values(&[5, 2]), 1.0)).is_err(), "{name}");
    }
    assert!(write("x", module(3, values(&[5, 2]), 1.0)).is_err(), "another rank");
    assert!(write("x", module(2, values(&[5, 2]), f32::NAN)).is_err(), "a scale that is not finite");
    assert!(write("x", module(2, Operand { shape: vec![5, 2], values: vec![1.0; 9] }, 1.0)).is_err(), "9 of 10");
    assert!(write("x", module(2, Operand { shape: vec![5, 2], values: vec![f32::NAN; 10] }, 1.0)).is_err(), "NaN");
    assert_eq!(fs::read_dir(parent.path()).expect("the parent").count(), 0);
    assert!(write("x", module(2, values(&[5, 2]), 1.0)).is_ok());
    assert!(matches!(write("x", module(2, values(&[5, 2]), 1.0)), Err(AdapterError::Exists { .. })));
}

#[test]
fn options_that_would_change_the_result_are_refused_by_name() {
    for (key, value) in [
        ("layer_replication", "[[0, 4], [2, 5]]"),
        ("alora_invocation_tokens", "[0]"),
        ("use_qalora", "true"),
        ("use_bdlora", r#"{"nblocks": 2}"#),
        ("target_parameters", r#"["experts.gate_up_proj"]"#),
        ("megatron_config", r#"{"hidden_size": 4}"#),
        ("init_lora_weights", r#""pissa_niter_16""#),
        ("init_lora_weights", r#""olora""#),
        ("init_lora_weights", r#""corda""#),
        ("init_lora_weights", r#""loftq""#),
        ("init_lora_weights", r#""lora_ga""#),
        ("velora_config", r#"{"num_groups": 64}"#),
        ("monteclora_config", r#"{"num_samples": 8}"#),
        ("arrow_config", r#"{"top_k": 3}"#),
        ("kasa_config", r#"{"beta": 0.0001}"#),
    ] {
        let error = open(&lora(&format!(r#""{key}": {value}"#)), LORA).expect_err(key);
        let AdapterError::UnsupportedOption { key: named, .. } = &error else { panic!("{key}: {error}") };
        assert_eq!(named, key);
    }
}

/// What says how an initialisation works is kept in the config of an adapter that was converted, and does nothing then. What
/// changes the base weights and wasn't converted is refused, with the way to convert it.
#[test]
fn converted_adapters_are_plain() {
    for config in [
        r#""loftq_config": {"loftq_bits": 4}"#,
        r#""corda_config": {"corda_method": "ipm"}"#,
        r#""lora_ga_config": {"direction": "ArB2r"}"#,
    ] {
        assert!(open(&lora(&format!(r#""init_lora_weights": true, {config}"#)), LORA).is_ok(), "{config}");
    }
    let message = open(&lora(r#""init_lora_weights": "pissa""#), LORA).expect_err("not converted").to_string();
    assert!(message.contains("path_initial_model_for_weight_conversion"), "{message}");
}

#[test]
fn an_adapter_is_held_against_its_model() {
    let model = |tensors: &[(&str, &[usize])]| {
        let folder = tempfile::tempdir().expect("a temporary folder");
        write_tensors(folder.path(), tensors.iter().map(|(name, shape)| (name.to_string(), *shape)));
        let path = folder.path().join("adapter_model.safetensors");
        let renamed = folder.path().join("base.safetensors");
        fs::rename(path, &renamed).expect("renaming");
        Model::open(&renamed).expect("a model")
    };
    let adapter = open(&lora(""), LORA).expect("an adapter");
    let other = ("model.layers.0.mlp.up_proj.weight", &[4usize, 5][..]);
    let fits = model(&[("model.layers.0.self_attn.q_proj.weight", &[3, 5]), other]);
    adapter.check_against(&fits).expect("an adapter of this model");

    let message =
        |tensors: &[(&str, &[usize])]| adapter.check_against(&model(tensors)).expect_err("a mismatch").to_string();
    let transposed = message(&[("model.layers.0.self_attn.q_proj.weight", &[5, 3])]);
    assert!(transposed.contains("has the shape [2, 3] where [2, 5]"), "{transposed}");
    let absent = message(&[other]);
    assert!(absent.contains("no projection `model.layers.0.self_attn.q_proj`"), "{absent}");
    // A target that names no module of the model is PEFT's business; one that names one needs its tensors.
    let more = lora(r#""note": null"#).replace(r#"["q_proj"]"#, r#"["q_proj", "q_attn"]"#);
    open(&more, LORA).expect("an adapter").check_against(&fits).expect("no module is called `q_attn`");
    let named = more.replace("q_attn", "up_proj");
    let missing = open(&named, LORA).expect("an adapter").check_against(&fits).expect_err("no tensors").to_string();
    assert!(missing.contains("targets module `model.layers.0.mlp.up_proj`"), "{missing}");
    let deeper = [
        ("model.layers.0.self_attn.q_proj.weight", &[3usize, 5][..]),
        ("model.layers.1.self_attn.q_proj.weight", &[3, 5]),
    ];
    let missing = message(&deeper);
    assert!(missing.contains("targets module `model.layers.1.self_attn.q_proj`"), "{missing}");
}
