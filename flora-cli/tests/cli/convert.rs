//! `flora convert` on a tiny model: a LoRA adapter that `flora train` made becomes one that multiplies.

use serde_json::Value;

use super::command::{answer, flora, stderr};
use super::quality::{corpus, shown};
use super::serving::Tiny;

#[test]
fn a_lora_adapter_becomes_a_multiplicative_one() {
    let (tiny, texts, out) = (Tiny::new(), corpus(), tempfile::tempdir().expect("a temporary folder"));
    let (data, out) = (shown(&texts.path().join("up/train")), shown(out.path()));
    let train =
        ["train", &data, "--model", &tiny.model, "--out", &out, "--type", "lora", "--rank", "1", "--name", "own"];
    let more =
        ["--steps", "30", "--sequence-length", "40", "--batch", "4", "--learning-rate", "2e-2", "--held-out", "0"];
    flora(train.into_iter().chain(more));
    let lora = format!("{out}/own");
    let convert = |more: &[&str]| {
        let fixed = ["convert", &lora, "--text", &data, "--out", &out, "--model", &tiny.model, "--json"];
        answer(fixed.into_iter().chain(["--sequence-length", "40"]).chain(more.iter().copied()))
    };
    let number = |value: &Value| value.as_f64().unwrap_or_else(|| panic!("{value} is a number"));
    let mut residuals = Vec::new();
    for (kind, rank) in [("flora", "1"), ("flora", "4"), ("hira", "3")] {
        let said = convert(&["--to", kind, "--rank", rank]);
        let layers = said["layers"].as_array().expect("layers");
        assert_eq!(layers.len(), 6, "query and key of three blocks");
        for layer in layers {
            assert!((0.0..1.0).contains(&number(&layer["residual"])), "{layer}");
            let energy: Vec<f64> = layer["energy"].as_array().expect("shares").iter().map(number).collect();
            assert!(energy.is_sorted() && energy[0] > 0.0 && energy[3] <= 1.0, "{layer}");
        }
        residuals.push(layers.iter().map(|layer| number(&layer["residual"])).sum::<f64>());
        let losses = &said["losses"];
        let (base, lora, fitted) = (number(&losses["base"]), number(&losses["lora"]), number(&losses["fitted"]));
        assert!(lora < base && fitted < base, "{losses}");
        // What is written is what was told: flora serves it.
        let prompt = ["generate", "--model", &tiny.model, "--prompt", "abcde", "--max-tokens", "4", "--json"];
        let (adapters, name) = (out.clone(), format!("own-{kind}"));
        answer(prompt.into_iter().chain(["--adapters", &adapters, "--adapter", &name]));
    }
    assert!(residuals[1] < residuals[0], "a higher rank fits better: {residuals:?}");
    let distilled = convert(&["--to", "hira", "--rank", "3", "--distil", "10", "--learning-rate", "1e-2"]);
    assert!(number(&distilled["losses"]["distilled"]) < number(&distilled["losses"]["fitted"]), "{distilled}");

    let refuse = |adapter: &str, more: &[&str], expected: &str| {
        let fixed = ["convert", adapter, "--text", &data, "--out", &out, "--model", &tiny.model];
        let output = flora(fixed.into_iter().chain(more.iter().copied()));
        assert!(!output.status.success() && stderr(&output).contains(expected), "`{expected}`: {}", stderr(&output));
    };
    refuse(&format!("{out}/own-hira"), &["--to", "flora"], "more to a layer than to add a low-rank update");
    refuse(&lora, &["--to", "hira", "--rank", "500"], "has ranks from 1 to");
    refuse(&lora, &["--to", "lora"], "invalid value");
}
