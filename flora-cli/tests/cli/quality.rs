//! `flora bench quality` on a tiny model, as a person meets it, and what is left of a run that was killed.

use std::path::{Path, PathBuf};

use serde_json::Value;

use super::command::{answer, flora, stderr};
use super::serving::Tiny;

pub(crate) fn shown(path: &Path) -> String {
    path.display().to_string()
}

/// Letters that follow one another as `step` says.
fn text(index: usize, step: usize) -> String {
    (0..90).map(|at| char::from(b'a' + ((at * step + index) % 26) as u8)).collect()
}

/// A corpus of two languages, of texts without lines.
pub(crate) fn corpus() -> tempfile::TempDir {
    let folder = tempfile::tempdir().expect("a temporary folder");
    for (language, step) in [("up", 1), ("down", 25)] {
        for (split, files) in [("train", 12), ("validation", 3), ("held_out", 9)] {
            let split = folder.path().join(language).join(split);
            std::fs::create_dir_all(&split).expect("a folder");
            for index in 0..files {
                std::fs::write(split.join(format!("{index:02}.txt")), text(index, step)).expect("a file");
            }
        }
    }
    folder
}

const PLAN: &str = r#"
languages = ["up"]
seeds = [1, 2]
steps = 12
rate_steps = 4
batch = 2
sequence_length = 40
excerpt_bytes = 80
validation_files = 3
held_out_files = 9

[[variant]]
kind = "flora"
ranks = [1, 2]
targets = ["q_proj", "k_proj"]
rates = [1e-2, 3e-2]

[[variant]]
kind = "lora"
ranks = [2]
targets = ["q_proj", "k_proj"]
rates = [1e-2]

[[comparison]]
of = "flora"
with = "lora"
"#;

struct Bench {
    tiny: Tiny,
    corpus: tempfile::TempDir,
    plan: PathBuf,
}

impl Bench {
    fn new() -> Self {
        let corpus = corpus();
        let plan = corpus.path().join("quality.toml");
        std::fs::write(&plan, PLAN).expect("a file");
        Self { tiny: Tiny::new(), corpus, plan }
    }

    fn arguments(&self, state: &Path, more: &[&str]) -> Vec<String> {
        let (plan, corpus, state) = (shown(&self.plan), shown(self.corpus.path()), shown(state));
        let fixed = ["bench", "quality", "--plan", &plan, "--corpus", &corpus, "--state", &state, "--model"];
        let fixed = fixed.into_iter().chain([self.tiny.model.as_str(), "--tokens-per-batch", "200", "--json"]);
        fixed.chain(more.iter().copied()).map(str::to_owned).collect()
    }
}

#[test]
fn kinds_are_compared_and_what_was_killed_goes_on() {
    let (bench, state) = (Bench::new(), tempfile::tempdir().expect("a temporary folder"));
    let whole = state.path().join("whole");
    let said = answer(bench.arguments(&whole, &[]));
    let language = &said["languages"][0];
    let number = |value: &Value| value.as_f64().unwrap_or_else(|| panic!("{value} is a number"));
    assert_eq!((&language["files"], &language["base_exact"]), (&9.into(), &Value::Null), "there are no lines");
    let variants = language["variants"].as_array().expect("variants");
    let names: Vec<_> = variants.iter().map(|own| own["name"].as_str().expect("a name")).collect();
    assert_eq!(names, ["flora-r1", "flora-r2", "lora-r2"]);
    for own in variants {
        let mean =
            own["seeds"].as_array().expect("seeds").iter().map(|seed| number(&seed["bits_per_byte"])).sum::<f64>()
                / 2.0;
        assert!((number(&own["bits_per_byte"]) - mean).abs() < 1e-12);
        // Files are of one size, so the mean of ratios is the ratio of sums.
        let gain = number(&language["base_bits_per_byte"]) - mean;
        assert!((number(&own["gain"]["estimate"]) - gain).abs() < 1e-12 && gain > 0.0, "{own}");
        assert!(number(&own["gain"]["low"]) <= gain && gain <= number(&own["gain"]["high"]));
    }
    let rates = variants[0]["rates"].as_array().expect("rates");
    let best =
        rates.iter().min_by(|one, other| number(&one["bits_per_byte"]).total_cmp(&number(&other["bits_per_byte"])));
    assert_eq!(variants[0]["rate"], best.expect("two rates")["rate"]);
    assert_eq!(variants[2]["rates"][0]["bits_per_byte"], Value::Null, "one rate isn't tried");
    let compared = &language["comparisons"][0];
    assert_eq!((&compared["of"], &compared["with"]), (&"flora-r2".into(), &"lora-r2".into()));
    let difference = number(&variants[1]["gain"]["estimate"]) - number(&variants[2]["gain"]["estimate"]);
    assert!((number(&compared["bits"]["difference"]["estimate"]) - difference).abs() < 1e-12);
    assert!(language["comparisons"].as_array().is_some_and(|all| all.len() == 1), "LoRA has no rank 1");

    // What a killed run leaves: some jobs' states, some scores. The rest is what it would have been.
    let parts = state.path().join("parts");
    answer(bench.arguments(&parts, &["--variants", "flora", "--seeds", "2"]));
    for score in ["flora-r1.rate-0.03", "flora-r2.seed-2"] {
        std::fs::remove_file(parts.join("up/scores").join(format!("{score}.json"))).expect("it was scored");
    }
    std::fs::remove_file(parts.join("up/states/flora-r1.rate-0.01.safetensors")).expect("it was saved");
    // Rates were chosen by the first seed, which is another here.
    let refused = flora(bench.arguments(&parts, &[]));
    assert!(stderr(&refused).contains("is the score of another job"), "{}", stderr(&refused));
    let one_seed = answer(bench.arguments(&whole, &["--variants", "flora", "--seeds", "1"]));
    for file in
        ["scores/flora-r1.rate-0.03.json", "scores/flora-r2.seed-1.json", "states/flora-r1.rate-0.01.safetensors"]
    {
        std::fs::remove_file(whole.join("up").join(file)).expect("it was there");
    }
    let again = answer(bench.arguments(&whole, &["--variants", "flora", "--seeds", "1"]));
    assert_eq!(one_seed, again);
    assert_eq!(answer(bench.arguments(&whole, &[])), said);
    let page = std::fs::read_to_string(whole.join("quality.md")).expect("a page");
    assert!(page.contains("| flora-r2 | lora-r2 |"), "{page}");
    let kept = std::fs::read_to_string(whole.join("quality.json")).expect("an answer");
    assert_eq!(serde_json::from_str::<Value>(&kept).expect("JSON"), said);
}

#[test]
fn what_cannot_be_compared_is_told() {
    let (bench, state) = (Bench::new(), tempfile::tempdir().expect("a temporary folder"));
    let refused = |more: &[&str], expected: &str| {
        let output = flora(bench.arguments(state.path(), more));
        assert!(!output.status.success() && stderr(&output).contains(expected), "`{expected}`: {}", stderr(&output));
    };
    refused(&["--languages", "sideways"], "there is no folder");
    refused(&["--held-out-files", "3"], "at least 8");
    refused(&["--variants", "lora,dora"], "no variant `dora`");
    refused(&["--steps", "0"], "`steps` is 0");
}
