//! Every command's answer is what the README says it is.

use std::process::Stdio;

use serde_json::Value;

use super::command::{answer, command, flora, stderr};
use super::world::World;

fn has_keys(value: &Value, keys: &[&str]) {
    for key in keys {
        assert!(value.get(key).is_some(), "no `{key}` in {value}");
    }
}

fn array(value: &Value) -> &[Value] {
    value.as_array().expect("an array")
}

#[test]
fn devices_lists_the_host() {
    let devices = answer(["devices", "--json"]);
    let host = array(&devices).iter().find(|device| device["id"] == "host").expect("the host");
    has_keys(host, &["name", "backend", "driver", "software", "element_types", "fragments"]);
}

/// With the tuning of no device and of the host: multiply-adds are counted, times are what was measured.
#[test]
fn plan_prices_steps_of_training() {
    let plan =
        ["plan", "--model", "smollm2-135m", "--training", "--ranks", "1,16", "--segments", "3", "--tokens", "100"];
    let answered = answer(plan.into_iter().chain(["--device", "host", "--json"]));
    has_keys(&answered, &["device", "format", "measured_for", "layers", "steps"]);
    let (rows, d, k, rank) = (100u64, 576u64, 576u64, 16u64);
    let of = |kind: &str, rank: Option<u64>| {
        let is_it = |row: &&Value| row["kind"] == kind && row["k"] == k && row["rank"] == Value::from(rank);
        array(&answered["layers"]).iter().find(is_it).unwrap_or_else(|| panic!("no {kind} of rank {rank:?}")).clone()
    };
    let macs = |row: &Value, part: &str| row[part]["macs"].as_u64().expect("a count");
    // docs/gradients.md: a base product each way for rows, and what an adapter has beyond it.
    let lora = of("lora", Some(rank));
    assert_eq!(macs(&lora, "forward"), 3 * rows * (d * k + rank * (d + k)));
    assert_eq!((macs(&lora, "input"), &lora["scales"]), (macs(&lora, "forward"), &Value::Null));
    assert_eq!(macs(&lora, "vectors"), 3 * 2 * rows * rank * (d + k));
    let flora = of("flora", Some(rank));
    assert_eq!(macs(&flora, "input"), 3 * (rows + rank) * d * k);
    assert_eq!(macs(&flora, "vectors"), 3 * (rows + 1 + 2 * rank) * d * k);
    assert_eq!((&flora["scales"]["lowering"], &flora["scales"]["count"]), (&"outer".into(), &(2 * rank).into()));
    let ia3 = of("ia3", None);
    assert_eq!((macs(&ia3, "vectors"), &ia3["scales"]["lowering"]), (3 * rows * d * k, &"reduced".into()));
    for row in array(&answered["layers"]) {
        let is_time = |part: &str| row[part]["seconds"].as_f64().is_some_and(|seconds| seconds > 0.0);
        assert!(["forward", "input", "vectors"].into_iter().all(is_time), "{row}");
    }
    // Four kinds of two ranks, and one without.
    let steps = array(&answered["steps"]);
    assert_eq!(steps.len(), 4 * 2 + 1);
    assert!(steps.iter().all(|step| step["of_base"].as_f64().is_some_and(|share| share > 0.0)), "{steps:?}");
    assert!(steps.iter().filter(|step| step["kind"] == "lora").all(|step| step["of_lora"] == 1.0), "{steps:?}");

    // A file from before gradients were measured, or of a device that computes none.
    let coefficients = concat!(env!("CARGO_MANIFEST_DIR"), "/tests/snapshots/coefficients.json");
    let answered = answer(plan.into_iter().chain(["--coefficients", coefficients, "--json"]));
    assert!(array(&answered["layers"]).iter().all(|row| row["vectors"]["seconds"].is_null()));
    assert!(array(&answered["steps"]).iter().all(|step| step["seconds"].is_null() && step["of_lora"].is_null()));
}

#[test]
fn plan_prices_every_lowering() {
    let mut arguments = vec!["plan", "--model", "starcoder-15b", "--ranks", "1,2,4,8,16", "--device", "host", "--json"];
    let answered = answer(&arguments);
    has_keys(&answered, &["device", "format", "measured_for", "plans", "train"]);
    let plans = array(&answered["plans"]);
    // Query and key, five ranks, fLoRA and LoRA, decode and prefill.
    assert_eq!(plans.len(), 2 * 5 * 2 * 2);
    for row in plans {
        has_keys(row, &["layer", "d", "k", "rank", "tokens", "segments", "adapter", "count", "base_seconds"]);
        has_keys(row, &["c1", "c2", "eq7", "critical_rank", "chosen", "candidates", "why"]);
        let candidates = array(&row["candidates"]);
        // The cheapest that needs no weight made and kept.
        let chosen = candidates.iter().map(|candidate| &candidate["lowering"]).find(|lowering| **lowering != "merged");
        assert_eq!(chosen, Some(&row["chosen"]));
        assert!(candidates.iter().all(|candidate| candidate["predicted_seconds"].as_f64() > Some(0.0)));
        let is_flora = row["adapter"] == "flora";
        let legal =
            if is_flora { ["bmm", "merged", "on_chip", "stacked"] } else { ["bmm", "fused", "merged", "segmented"] };
        let mut found: Vec<_> = candidates.iter().map(|candidate| candidate["lowering"].as_str()).collect();
        found.sort_unstable();
        assert_eq!(found, legal.map(Some), "{row}");
    }
    // Of both phases and every rank, which kind costs less.
    for advice in array(&answered["train"]) {
        let seconds = |key: &str| advice[key].as_f64().expect("a time");
        let cheaper = if seconds("flora_seconds") <= seconds("lora_seconds") { "flora" } else { "lora" };
        assert!(advice["cheaper"] == cheaper && seconds("base_seconds") > 0.0, "{advice}");
    }
    assert_eq!(array(&answered["train"]).len(), 2 * 5);
    arguments.extend(["--targets", "all"]);
    let plans = &answer(&arguments)["plans"];
    let shapes: Vec<_> = array(plans).iter().filter(|row| row["rank"] == 1).map(|row| row["layer"].clone()).collect();
    assert!(shapes.contains(&"attn.k, attn.v".into()) && shapes.contains(&"attn.q, attn.c_proj".into()), "{shapes:?}");
}

#[test]
fn plan_prices_a_merged_weight_and_says_when_it_pays() {
    for segments in ["1", "5"] {
        let fixed = ["plan", "--model", "starcoder-1b", "--ranks", "4", "--segments", segments, "--device", "host"];
        for row in array(&answer(fixed.into_iter().chain(["--json"]))["plans"]) {
            let candidates = array(&row["candidates"]);
            let merged = candidates.iter().filter(|candidate| candidate["lowering"] == "merged");
            assert_eq!(merged.count(), 1, "{row}");
            // What needs no weight made and kept is chosen.
            let why = row["why"].as_str().expect("a reason");
            assert!(row["chosen"] != "merged" && !why.contains("merged"), "{row}");
            let share = &row["merged_pays_from"];
            assert!(share.is_null() || share.as_f64().is_some_and(|share| share > 0.0 && share <= 1.0), "{row}");
        }
        let text = String::from_utf8_lossy(&flora(fixed).stdout).into_owned();
        assert!(text.contains("merged from") && text.contains("flora serve --merge"), "{text}");
    }
}

#[test]
fn plan_says_whose_coefficients_it_uses() {
    let quantised = ["plan", "--model", "starcoder-1b", "--ranks", "2", "--weight", "q4_0", "--device", "host"];
    let answered = answer(quantised.into_iter().chain(["--json"]));
    assert_eq!((&answered["format"], &answered["measured_for"]), (&"f32/f32/q4_0".into(), &"f32/f32/f32".into()));
    let text = flora(quantised);
    assert!(String::from_utf8_lossy(&text.stdout).contains("flora tune --dtype f32 --weight q4_0"));
}

#[test]
fn plan_reads_a_model_s_shapes_and_a_tuning_file() {
    let world = World::new();
    let tuned = answer(["tune", "--effort", "least", "--device", "host", "--json"]);
    has_keys(&tuned, &["path", "coefficients", "seconds_to_synchronize", "held_out"]);
    let model = world.path("model").to_string_lossy().into_owned();
    let file = tuned["path"].as_str().expect("a path");
    let plans = answer(["plan", "--model", &model, "--coefficients", file, "--ranks", "3", "--json"]);
    let first = &array(&plans["plans"])[0];
    assert_eq!(
        (&first["layer"], &first["count"], &first["d"], &first["k"]),
        (&"self_attn.k_proj".into(), &2.into(), &12.into(), &5.into())
    );
}

#[test]
fn explain_derives_every_built_in_layer() {
    for layer in flora_ir::builtin::names() {
        let explained = answer(["explain", layer, "--json"]);
        has_keys(
            &explained,
            &[
                "layer",
                "source",
                "equation",
                "derivation",
                "terms",
                "offset",
                "bias",
                "activation",
                "residual",
                "lowerings",
            ],
        );
        assert_eq!(array(&explained["lowerings"]).is_empty(), layer == "linear");
        let text = flora(["explain", layer]);
        assert!(text.status.success());
        assert!(String::from_utf8_lossy(&text.stdout).contains("Normal form"));
    }
    let world = World::new();
    let file = world
        .write("mine.flora", "layer mine(x: input[tokens, D], w0: weight[D, K], l: adapter[K]) { silu(l * (x @ w0)) }");
    let explained = answer([std::ffi::OsStr::new("explain"), file.as_os_str(), "--json".as_ref()]);
    assert_eq!((&explained["layer"], &explained["activation"]), (&"mine".into(), &"silu".into()));
    assert_eq!(explained["residual"], Value::Null);

    let operands = "x: input[tokens, D], w0: weight[D, K], l: adapter[K], c: bias[K], before: residual[tokens, K]";
    let source = format!("layer mine({operands}) {{ silu(l * (x @ w0) + c) + before }}");
    let file = world.write("residual.flora", &source).to_string_lossy().into_owned();
    let explained = answer(["explain", &file, "--json"]);
    assert_eq!((&explained["bias"], &explained["residual"]), (&"c".into(), &"before".into()));
    let text = String::from_utf8_lossy(&flora(["explain", &file]).stdout).into_owned();
    assert!(text.contains("y = silu( sum of the terms + c ) + before"), "{text}");
}

/// An adapter of the golden files, whose kind's equation stands in its description; and the table of `docs/adapters.md`.
#[test]
fn explain_shows_folders_and_the_kinds_that_are_read() {
    let root = std::path::Path::new(env!("CARGO_MANIFEST_DIR")).join("..");
    let folder = root.join("tests/golden/zoo/loha_patterns/adapter").to_string_lossy().into_owned();
    let explained = answer(["explain", "--peft", &folder, "--json"]);
    assert_eq!((&explained["kind"], &explained["layers"][0]["ranks"]), (&"loha".into(), &vec![2, 4].into()));
    assert_eq!(array(&explained["layers"][0]["modules"]).len(), 4);
    let text = String::from_utf8_lossy(&flora(["explain", "--peft", &folder]).stdout).into_owned();
    assert!(text.contains("4 modules, of rank 2, 4") && text.contains("khatri_rao(a, c)"), "{text}");
    let text = String::from_utf8_lossy(&flora(["explain", "loha"]).stdout).into_owned();
    assert!(text.contains("merge-hadamard") && text.contains("fused"), "{text}");
    let text = String::from_utf8_lossy(&flora(["explain", "beft"]).stdout).into_owned();
    assert!(text.contains("sum of the terms + v"), "{text}");
    let table = String::from_utf8_lossy(&flora(["explain", "--zoo"]).stdout).into_owned();
    let page = std::fs::read_to_string(root.join("docs/adapters.md")).expect("the page");
    assert!(page.contains(table.trim_end()), "{table}");
}

#[test]
fn explain_derives_gradients() {
    for layer in flora_ir::builtin::names() {
        let explained = answer(["explain", layer, "--gradient", "--json"]);
        has_keys(&explained, &["layer", "source", "adjoint", "output", "written", "normal"]);
        let forward = answer(["explain", layer, "--json"]);
        assert_eq!(explained["adjoint"]["lowerings"], forward["lowerings"], "the same kernels compute it");
        let operands = flora_ir::builtin::builtin(layer).expect("built in").layer().operands.iter();
        let operands = operands.map(|(_, operand)| operand.name.as_str()).filter(|name| *name != "w0");
        let operands: Vec<&str> = operands.collect();
        for equations in [&explained["written"], &explained["normal"]] {
            has_keys(equations, &["rules", "shared", "gradients"]);
            let found: Vec<_> = array(&equations["gradients"]).iter().map(|row| row["operand"].as_str()).collect();
            assert_eq!(found, operands.iter().map(|name| Some(*name)).collect::<Vec<_>>());
        }
    }
    let text = String::from_utf8_lossy(&flora(["explain", "flora", "--gradient"]).stdout).into_owned();
    for line in [
        "Input, where g = dy is the gradient of the sum of the terms",
        "  Σ_r transpose(b)_r ∘ ((transpose(a)_r ∘ g) @ w0_transposed)",
        "  multiplicative  on_chip   one GEMM",
        "Operands, where dy is the gradient of the output",
        "  db = t0 @ transpose(a)",
        "  da = transpose(b) @ t0",
        "The same from the normal form",
    ] {
        assert!(text.contains(line), "no `{line}` in\n{text}");
    }
    let world = World::new();
    let operands = "x: input[tokens, D], w0: weight[D, K], l: adapter[K], c: bias[K], g: residual[tokens, K]";
    let source = format!("layer mine({operands}) {{ silu(l * (x @ w0) + c) + g }}");
    let file = world.write("mine.flora", &source).to_string_lossy().into_owned();
    let text = String::from_utf8_lossy(&flora(["explain", &file, "--gradient"]).stdout).into_owned();
    assert!(text.contains("g1 = silu_derivative(sum before it) * dy"), "{text}");
    assert!(text.contains("  dg = dy\n"), "{text}");
}

const RUN_KEYS: [&str; 9] =
    ["device", "layers", "rows", "segments", "adapters", "max_relative_error", "seconds", "base_seconds", "right"];

#[test]
fn run_makes_up_what_it_is_not_given() {
    let targets = "model.layers.0.self_attn.k_proj,model.layers.29.mlp.down_proj";
    let arguments = ["run", "--seeded", "--device", "host", "--targets", targets, "--repetitions", "1", "--json"];
    let report = answer(arguments);
    has_keys(&report, &RUN_KEYS);
    assert_eq!((&report["segments"], &report["weights"]), (&32.into(), &"seeded".into()));
    assert_eq!(array(&report["layers"]).len(), 2);
    let kinds: Vec<_> = report["adapters"].as_object().expect("counts by kind").keys().cloned().collect();
    assert_eq!(kinds, ["dora", "flora", "hira", "ia3", "lora"]);
    assert!(report["max_relative_error"].as_f64() < Some(1e-5));

    let again = answer(arguments);
    assert_eq!(report["max_relative_error"], again["max_relative_error"], "the same seed gives the same numbers");
}

#[test]
fn run_says_that_it_has_no_model_and_goes_on() {
    // The cache folder of every test is one that can't be made.
    let arguments = ["run", "--device", "host", "--targets", "model.layers.0.self_attn.v_proj", "--repetitions", "1"];
    let output = flora(arguments);
    assert!(output.status.success(), "{}", stderr(&output));
    assert!(stderr(&output).contains("random weights of SmolLM2-135M's shapes"), "{}", stderr(&output));
    assert!(String::from_utf8_lossy(&output.stdout).contains("right: all 1 layers"));
}

#[test]
fn run_keeps_the_adapters_that_it_makes_up() {
    let world = World::new();
    let kept = world.path("kept").to_string_lossy().into_owned();
    let model = world.path("model").to_string_lossy().into_owned();
    let arguments = ["run", "--device", "host", "--model", &model, "--repetitions", "1", "--json"];
    let made = answer(arguments.into_iter().chain(["--keep-adapters", &kept]));
    let read = answer(arguments.into_iter().chain(["--adapters", &kept]));
    assert_eq!(made["max_relative_error"], read["max_relative_error"]);
    assert_eq!(made["adapters"], read["adapters"]);
}

#[test]
fn a_reader_that_goes_away_is_no_error() {
    let config = tempfile::tempdir().expect("a temporary folder");
    let mut inspect = command(config.path());
    inspect.args(["inspect", "lora", "--lowering", "bmm"]).stdout(Stdio::piped()).stderr(Stdio::piped());
    let mut child = inspect.spawn().expect("the binary starts");
    drop(child.stdout.take());
    let output = child.wait_with_output().expect("it ends");
    assert!(output.status.success() && output.stderr.is_empty(), "{}", stderr(&output));
}
