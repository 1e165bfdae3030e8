//! Bad input: exit code 1, a message that names what is wrong, never a panic (`flora()` checks that of every run).

use std::ffi::OsStr;

use super::command::{flora, stderr};
use super::world::World;

fn refused<S: AsRef<OsStr>>(arguments: impl IntoIterator<Item = S>, expected: &[&str]) {
    let output = flora(arguments);
    let message = stderr(&output);
    assert_eq!(output.status.code(), Some(1), "{message}");
    assert!(output.stdout.is_empty(), "an answer beside an error");
    assert!(message.contains("error: "), "{message}");
    for fragment in expected {
        assert!(message.contains(fragment), "`{fragment}` is not in: {message}");
    }
}

#[test]
fn batches() {
    let world = World::new();
    let with = |text: &str| world.run(&["--batch", &world.write("batch.json", text).to_string_lossy()]);
    refused(with(r#"[{"adapter": "nobody", "rows": 1}]"#), &["`nobody`", "a-lora"]);
    for broken in [
        "",
        "[",
        "{}",
        r#"[{"adapter": 3, "rows": 1}]"#,
        r#"[{"rows": -1}]"#,
        r#"[{"adapter": null, "rows": 1, "row": 2}]"#,
    ] {
        refused(with(broken), &["is no batch", "help: "]);
    }
    refused(with(r#"[{"adapter": null, "rows": 4294967295}, {"adapter": null, "rows": 9}]"#), &["4294967304 rows"]);
    refused(world.run(&["--batch", "/nowhere/batch.json"]), &["/nowhere/batch.json"]);
}

#[test]
fn inputs() {
    let mut world = World::new();
    let batch = world.write("batch.json", r#"[{"adapter": "a-lora", "rows": 2}]"#).to_string_lossy().into_owned();
    let arguments =
        |world: &World| world.run(&["--batch", &batch, "--inputs", &world.path("x.safetensors").to_string_lossy()]);
    world.write_inputs("x.safetensors", 3);
    refused(arguments(&world), &["is [3, 7]", "be [2, 7]", "add up to 2 rows"]);

    let mut inputs = world.write_inputs("x.safetensors", 2);
    let lost = inputs.remove("model.layers.1.mlp.down_proj").expect("an input");
    flora_checkpoint::write_matrices(&world.path("x.safetensors"), &inputs).expect("a writable folder");
    refused(arguments(&world), &["no input for `model.layers.1.mlp.down_proj`"]);

    inputs.insert("model.layers.1.mlp.down_proj".to_owned(), lost.clone());
    inputs.insert("model.layers.7.mlp.down_proj".to_owned(), lost);
    flora_checkpoint::write_matrices(&world.path("x.safetensors"), &inputs).expect("a writable folder");
    refused(arguments(&world), &["`model.layers.7.mlp.down_proj`", "doesn't have"]);

    world.write("x.safetensors", "cut");
    refused(arguments(&world), &["safetensors"]);
}

#[test]
fn models() {
    let world = World::new();
    refused(["run", "--model", "/nowhere"], &["/nowhere"]);
    refused(["plan", "--model", "/nowhere"], &["no model `/nowhere`", "starcoder-15b"]);
    let cut = world.path("cut.gguf");
    for length in [0usize, 3, 4, 8, 20, 23, 24, 31] {
        let mut bytes = b"GGUF\x03\0\0\0".to_vec();
        bytes.extend([7u64.to_le_bytes(), 9u64.to_le_bytes(), 200u64.to_le_bytes()].concat());
        bytes.truncate(length);
        std::fs::write(&cut, bytes).expect("a writable folder");
        refused([OsStr::new("run"), "--model".as_ref(), cut.as_os_str()], &["cut.gguf"]);
        refused([OsStr::new("plan"), "--model".as_ref(), cut.as_os_str()], &["cut.gguf"]);
    }
    refused(world.run(&["--targets", "o_proj"]), &["o_proj", "self_attn.q_proj"]);
    refused(["plan", "--model", "starcoder-1b", "--targets", "o_proj"], &["o_proj", "attn.c_proj"]);
}

#[test]
fn adapters() {
    let world = World::new();
    let batch = r#"[{"adapter": "a-lora", "rows": 2}, {"adapter": "d-ia3", "rows": 3}, {"adapter": null, "rows": 1}]"#;
    let batch = world.write("batch.json", batch).to_string_lossy().into_owned();
    let without = world.write("without.json", r#"[{"adapter": "a-lora", "rows": 2}]"#).to_string_lossy().into_owned();
    let config = world.path("adapters/d-ia3/adapter_config.json");
    let good = std::fs::read_to_string(&config).expect("the config");
    std::fs::write(&config, good.replace("IA3", "POLY")).expect("a writable folder");
    // A bad folder fails its own requests, and the others are run.
    let output = flora(world.run(&["--batch", &batch]));
    let message = stderr(&output);
    assert_eq!(output.status.code(), Some(1), "{message}");
    assert!(message.contains("requests of d-ia3 weren't run") && message.contains("POLY"), "{message}");
    assert!(!output.stdout.is_empty(), "the others are in the answer");
    let others = flora(world.run(&["--batch", &without]));
    assert!(others.status.success() && stderr(&others).contains("warning: the adapter `d-ia3`"), "{}", stderr(&others));
    std::fs::write(&config, good).expect("a writable folder");
    refused(["run", "--seeded", "--adapters", &world.path("adapters").to_string_lossy()], &["`a-lora`"]);
    refused(["run", "--seeded", "--adapters", &world.path("model").to_string_lossy()], &["no sub-folder"]);
    let kept = world.path("kept").to_string_lossy().into_owned();
    let keep = [
        "run",
        "--seeded",
        "--device",
        "host",
        "--targets",
        "model.layers.0.self_attn.k_proj",
        "--keep-adapters",
        &kept,
    ];
    assert!(flora(keep).status.success());
    refused(keep, &["exists already"]);
}

#[test]
fn ia3_that_would_scale_a_bias() {
    let world = World::new();
    let folder = world.path("biased/i");
    std::fs::create_dir_all(&folder).expect("a writable folder");
    let module = flora_checkpoint::AdapterModule {
        layer: "ia3".to_owned(),
        rank: 0,
        operands: [("l".to_owned(), flora_checkpoint::Operand { shape: vec![10], values: vec![1.0; 10] })].into(),
    };
    let modules = [("model.layers.0.self_attn.q_proj".to_owned(), module)].into();
    let kind = flora_checkpoint::AdapterKinds::builtin().kind_of_layer("ia3").expect("a built-in layer");
    let adapter = flora_checkpoint::AdapterFolder::new("own", kind, modules);
    adapter.write(&world.path("biased")).expect("a writable folder");
    let path = |name: &str| world.path(name).to_string_lossy().into_owned();
    refused(["run", "--model", &path("model"), "--adapters", &path("biased")], &["`own`", "q_proj", "bias"]);
}

#[test]
fn layers_and_lowerings() {
    let world = World::new();
    refused(["explain", "lorra"], &["no layer `lorra`", "lora"]);
    refused(["inspect", "lorra"], &["no layer `lorra`"]);
    refused(["inspect", "lora", "--lowering", "stacked"], &["`stacked`", "fused or segmented or bmm or merged"]);
    refused(["inspect", "flora", "--lowering", "segmented"], &["`segmented`", "stacked or on_chip or bmm or merged"]);
    refused(["inspect", "flora", "--lowering", "quickly"], &["`quickly`", "stacked or on_chip or bmm or merged"]);
    refused(["inspect", "linear", "--lowering", "bmm"], &["leave --lowering out"]);
    refused(["inspect", "flora", "--target", "metal"], &["`metal`", "cuda:sm_90"]);
    refused(["inspect", "flora", "--target", "wgsl", "--check"], &["--check"]);
    refused(["inspect", "flora", "--weight", "q8_0", "--d", "33"], &["blocks of 32", "--weight int8"]);
    // No compilers can be in a cache folder that can't be made.
    refused(["inspect", "flora", "--check"], &["--fetch"]);

    let mistaken = |text: &str| ["explain".to_owned(), world.write("wrong.flora", text).to_string_lossy().into_owned()];
    refused(mistaken("layer broken("), &["wrong.flora", "layer broken("]);
    let shapes = "layer broken(x: input[tokens, D], w0: weight[D, K], l: adapter[R]) { l * (x @ w0) }";
    refused(mistaken(shapes), &["wrong.flora", shapes]);
    let no_normal_form = "layer broken(x: input[tokens, D], w0: weight[D, D]) { silu(x @ w0) + (x @ w0) }";
    refused(mistaken(no_normal_form), &["wrong.flora", "silu"]);
}

#[test]
fn devices_and_coefficients() {
    let world = World::new();
    refused(["run", "--device", "abacus", "--seeded"], &["abacus", "host"]);
    let file = |text: &str| {
        let path = world.write("coefficients.json", text).to_string_lossy().into_owned();
        ["plan".to_owned(), "--coefficients".to_owned(), path]
    };
    for broken in ["", "{}", r#"{"schema": 99}"#, r#"{"schema": 1, "flora": "0"}"#] {
        refused(file(broken), &["coefficients.json", "flora tune"]);
    }
    refused(["plan", "--segments", "4096", "--tokens", "1048576"], &["the rows of the batch are too many"]);
}

#[test]
fn wrong_usage_is_told_apart() {
    for arguments in [&["plan", "--ranks", "0"][..], &["plan", "--ranks", "one"], &["run", "--batch"], &["fly"], &[]] {
        let output = flora(arguments);
        assert_eq!(output.status.code(), Some(2), "{arguments:?}: {}", stderr(&output));
    }
}
