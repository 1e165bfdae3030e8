//! `flora report`: a page of whatever is given, and a word about what can't be.

use std::path::Path;

use serde_json::{Value, json};

use super::command::{answer, flora, stderr};

/// A measurement of the paper's curves.
fn record() -> Value {
    json!({
        "device": "<script>alert(1)</script> & co", "model": "m", "layer": "\"q\"", "d": 64, "k": 48, "dtype": "f32", "weight": "f32",
        "tokens": 6, "segments": 3, "rank": 2, "adapter": "flora", "lowering": "stacked", "seconds": 0.5, "spread": 0.0,
        "repetitions": 1, "base_seconds": 0.25, "tokens_per_second": 12.0,
    })
}

/// A planner's grid of one point.
fn grid() -> Value {
    let result = json!({
        "d": 64, "k": 48, "tokens": 6, "segments": 3, "rank": 2, "adapter": "lora", "shared": true, "chosen": "fused",
        "fastest": "bmm", "regret": 0.25,
        "candidates": [{ "lowering": "fused", "predicted_seconds": 0.004, "seconds": 0.005 }],
    });
    json!({
        "device": "<b>", "format": "f32/f32/f32", "points": 1, "top1": 0.0, "mean_regret": 0.25, "p95_regret": 0.25,
        "max_regret": 0.25, "worst": [result], "results": [result],
    })
}

fn with(mut value: Value, key: &str, other: Value) -> Value {
    value[key] = other;
    value
}

struct Folder(tempfile::TempDir);

impl Folder {
    fn new() -> Self {
        Self(tempfile::tempdir().expect("a temporary folder"))
    }

    fn write(&self, name: &str, contents: &str) -> String {
        let path = self.0.path().join(name);
        std::fs::write(&path, contents).expect("a file");
        path.display().to_string()
    }

    fn page(&self) -> String {
        self.0.path().join("page.html").display().to_string()
    }
}

#[test]
fn text_of_files_is_no_markup() {
    let folder = Folder::new();
    let paper = folder.write("paper.json", &json!([record(), with(record(), "rank", json!(4))]).to_string());
    let planner = folder.write("planner.json", &grid().to_string());
    let page = folder.page();
    let arguments =
        ["report", "--device", "host", "--paper", &paper, "--planner", &planner, "--output", &page, "--json"];
    let said = answer(arguments);
    assert_eq!((&said["paper_panels"], &said["planner_grids"]), (&1.into(), &1.into()));
    assert_eq!(said["has_coefficients"], true);
    let html = std::fs::read_to_string(&page).expect("the page");
    assert_eq!(said["bytes"], html.len());
    for absent in ["<script", "<b>alert", "http:", "https:", "NaN", "inf"] {
        let namespace = html.replace("http://www.w3.org/2000/svg", "");
        assert!(!namespace.contains(absent), "`{absent}` is in the page");
    }
    // Charts, and another device's coefficients left out of them.
    assert!(html.contains("<svg") && html.contains("the coefficients are another device&#39;s"), "{html}");
    for tag in ["svg", "section", "figure", "table", "details", "div"] {
        assert_eq!(html.matches(&format!("<{tag}")).count(), html.matches(&format!("</{tag}>")).count(), "{tag}");
    }
}

#[test]
fn what_is_not_given_is_named_with_its_command() {
    let folder = Folder::new();
    let page = folder.page();
    let output = flora(["report", "--device", "host", "--output", &page]);
    assert!(output.status.success(), "{}", stderr(&output));
    let html = std::fs::read_to_string(&page).expect("the page");
    for command in ["flora bench paper --weight f32,q8_0,q4_0 --json", "flora bench planner --json"] {
        assert!(html.contains(command), "`{command}` is not in the page");
    }
    // No curves of nothing.
    let nothing = folder.write("nothing.json", "[]");
    let output = flora(["report", "--device", "host", "--paper", &nothing, "--output", &page]);
    assert!(output.status.success(), "{}", stderr(&output));
}

#[test]
fn files_that_are_not_measurements_are_refused() {
    let folder = Folder::new();
    let refused = |option: &str, path: &str, expected: &[&str]| {
        let page = folder.page();
        let output = flora(["report", "--device", "host", option, path, "--output", &page]);
        let said = stderr(&output);
        assert_eq!(output.status.code(), Some(1), "{said}");
        for expected in expected.iter().chain([&path]) {
            assert!(said.contains(expected), "`{expected}` is not in: {said}");
        }
        assert!(!Path::new(&page).exists(), "a page of nothing");
    };
    let paper = |contents: &str, expected: &[&str]| {
        let path = folder.write("paper.json", contents);
        refused("--paper", &path, expected);
    };
    let whole = json!([record()]).to_string();
    for cut in [0, 1, whole.len() / 2, whole.len() - 1] {
        paper(&whole[..cut], &["flora bench paper --json"]);
    }
    paper("{}", &["flora bench paper --json"]);
    paper("[[[[[[", &["flora bench paper --json"]);
    paper(&"[".repeat(100_000), &["flora bench paper --json"]);
    for (key, value, expected) in [
        ("seconds", json!(-1.0), "seconds is -1"),
        ("seconds", json!(0), "seconds is 0"),
        ("seconds", json!(null), "null"),
        ("seconds", json!("fast"), "fast"),
        ("base_seconds", json!(-0.0), "base_seconds"),
        ("spread", json!(-0.5), "spread is -0.5"),
        ("d", json!(0), "d is 0"),
        ("k", json!(4_000_000), "k is 4000000"),
        ("rank", json!(1025), "rank is 1025"),
        ("rank", json!(1.5), "1.5"),
        ("tokens", json!(2), "segments is 3"),
        ("tokens", json!(7), "7 tokens are in 3 segments"),
        ("segments", json!(0), "segments is 0"),
        ("tokens", json!(u64::MAX), "18446744073709551615"),
        ("adapter", json!("../../secret"), "the adapter `../../secret` is unknown"),
    ] {
        paper(&json!([record(), with(record(), key, value)]).to_string(), &[expected]);
    }
    paper(&whole.replace("0.5", "1e999"), &["flora bench paper --json"]);
    paper(&whole.replace("0.5", "NaN"), &["flora bench paper --json"]);

    let planner = |contents: Value, expected: &str| {
        let path = folder.write("planner.json", &contents.to_string());
        refused("--planner", &path, &[expected, "flora bench planner --json"]);
    };
    planner(json!([]), "invalid");
    planner(with(grid(), "top1", json!(1.5)), "top1 is 1.5");
    planner(with(grid(), "mean_regret", json!(-0.1)), "mean_regret is -0.1");
    let mut bad = grid();
    bad["results"][0]["candidates"][0]["seconds"] = json!(-3);
    planner(bad, "in result 1, seconds is -3");
    let mut bad = grid();
    bad["worst"][0]["regret"] = json!(-3);
    planner(bad, "in result 2, regret is -3");

    let large = folder.write("large.json", "[");
    std::fs::File::options().write(true).open(&large).and_then(|file| file.set_len(40 << 20)).expect("a sparse file");
    refused("--paper", &large, &["more than 32 MiB"]);
    refused("--planner", "/nowhere/planner.json", &["can't read"]);
    refused("--paper", &folder.0.path().display().to_string(), &["can't read"]);

    let damaged = folder.write("coefficients.json", "{\"schema\": \"new\"");
    let output = flora(["report", "--coefficients", &damaged, "--output", &folder.page()]);
    assert_eq!(output.status.code(), Some(1));
    assert!(stderr(&output).contains(&damaged) && stderr(&output).contains("flora tune"), "{}", stderr(&output));
    let output = flora(["report", "--device", "host", "--output", "/nowhere/page.html"]);
    assert_eq!(output.status.code(), Some(1));
    assert!(stderr(&output).contains("can't write /nowhere/page.html"), "{}", stderr(&output));
}
