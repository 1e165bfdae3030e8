//! `flora train` as a person meets it: adapters from a folder of texts or a file of jobs, which `flora generate` takes, and going on
//! after an interruption.

use std::path::Path;

use serde_json::Value;

use super::command::{answer, flora, stderr};
use super::serving::Tiny;

/// A folder of texts in which letters follow one another in a few ways.
fn texts() -> tempfile::TempDir {
    let folder = tempfile::tempdir().expect("a temporary folder");
    for index in 0..12usize {
        let text: String = (0..60).map(|at| char::from(b'a' + ((at * (1 + index % 3) + index) % 26) as u8)).collect();
        std::fs::write(folder.path().join(format!("{index}.txt")), text).expect("a file");
    }
    folder
}

fn shown(path: &Path) -> String {
    path.display().to_string()
}

#[test]
fn a_folder_of_texts_makes_an_adapter_that_generates() {
    let (tiny, texts, out) = (Tiny::new(), texts(), tempfile::tempdir().expect("a temporary folder"));
    let (data, out) = (shown(texts.path()), shown(out.path()));
    let train = |more: &[&str]| {
        let mut arguments = vec!["train", &data, "--model", &tiny.model, "--out", &out, "--json"];
        arguments.extend(["--steps", "30", "--sequence-length", "40", "--batch", "4", "--evaluate-every", "10"]);
        arguments.extend_from_slice(more);
        answer(arguments)
    };
    let said = &train(&[])[0];
    assert_eq!(
        (&said["job"], &said["steps"], &said["ended"]["reason"]),
        (&"flora".into(), &30.into(), &"complete".into())
    );
    let number = |said: &Value, key: &str| said[key].as_f64().expect("a number");
    assert!(number(said, "held_out") < 0.95 * number(said, "held_out_before"), "{said}");
    let again = &train(&[])[0];
    assert_eq!((&again["steps"], &again["loss"]), (&30.into(), &Value::Null), "it was complete: {again}");
    let fresh = &train(&["--fresh"])[0];
    assert_eq!(fresh["loss"], said["loss"], "the same numbers anew");
    let other = flora([
        "train",
        &data,
        "--model",
        &tiny.model,
        "--out",
        &out,
        "--steps",
        "40",
        "--sequence-length",
        "40",
        "--batch",
        "4",
        "--evaluate-every",
        "10",
    ]);
    assert!(stderr(&other).contains("`length` was") && stderr(&other).contains("begin anew"), "{}", stderr(&other));

    train(&["--type", "lora", "--rank", "2", "--alpha", "4", "--targets", "q_proj,v_proj", "--name", "own"]);
    let generate = |more: &[&str]| {
        let mut arguments =
            vec!["generate", "--model", &tiny.model, "--prompt", "abcde", "--max-tokens", "9", "--json"];
        arguments.extend_from_slice(more);
        answer(arguments)["tokens"].clone()
    };
    let base = generate(&[]);
    assert_ne!(base, generate(&["--adapters", &out, "--adapter", "flora"]));
    assert_ne!(base, generate(&["--adapters", &out, "--adapter", "own"]));
    let metrics = std::fs::read_to_string(Path::new(&out).join(".training/metrics.jsonl")).expect("metrics");
    let lines: Vec<Value> = metrics.lines().map(|line| serde_json::from_str(line).expect("JSON")).collect();
    assert_eq!(lines.iter().filter(|line| line["event"] == "step").count(), 90);
    assert!(lines.iter().all(|line| line["job"].is_string() && line["seconds"].is_number()));
    let page = std::fs::read_to_string(Path::new(&out).join(".training/training.svg")).expect("the page of curves");
    assert!(page.starts_with("<svg") && page.contains("own") && !page.contains("flora"), "the jobs of the last run");
}

#[test]
fn jobs_of_a_file_share_the_base_and_are_what_they_are_alone() {
    let (tiny, texts, out) = (Tiny::new(), texts(), tempfile::tempdir().expect("a temporary folder"));
    let job = |kind: &str, rest: &str| format!("[[job]]\nname = \"{kind}\"\nkind = \"{kind}\"\n{rest}\n");
    let defaults = "[defaults]\ndata = \".\"\nextensions = [\"txt\"]\ntargets = [\"q_proj\", \"k_proj\"]\nsteps = 6\nbatch = 2\n\
        sequence_length = 40\nlearning_rate = 0.01\n\n";
    let jobs = [
        ("lora", "rank = 2"),
        ("dora", "rank = 1"),
        ("ia3", ""),
        ("hira", "rank = 3"),
        ("flora", "rank = 2\nseed = 4"),
    ];
    let file = texts.path().join("jobs.toml");
    let run = |out: &Path, text: String| {
        std::fs::write(&file, text).expect("a file");
        answer(["train", "--jobs", &shown(&file), "--model", &tiny.model, "--out", &shown(out), "--json"])
    };
    let together: String = jobs.iter().map(|(kind, rest)| job(kind, rest)).collect();
    let said = run(&out.path().join("all"), format!("{defaults}{together}"));
    assert_eq!(said.as_array().map(Vec::len), Some(5), "{said}");
    for (kind, rest) in jobs {
        run(&out.path().join("alone"), format!("{defaults}{}", job(kind, rest)));
        let file = |run: &str| out.path().join(run).join(kind).join("adapter_model.safetensors");
        let bytes = |run: &str| std::fs::read(file(run)).expect("an adapter");
        assert_eq!(bytes("all"), bytes("alone"), "{kind}");
    }
}

#[test]
fn what_cannot_be_trained_is_told() {
    let (tiny, texts, out) = (Tiny::new(), texts(), tempfile::tempdir().expect("a temporary folder"));
    let (data, out) = (shown(texts.path()), shown(out.path()));
    let refused = |arguments: &[&str], expected: &str| {
        let mut all = vec!["train", "--model", &tiny.model, "--out", &out];
        all.extend_from_slice(arguments);
        let output = flora(all);
        assert!(
            !output.status.success() && stderr(&output).contains(expected),
            "`{expected}` is not in: {}",
            stderr(&output)
        );
    };
    refused(&[], "required");
    refused(&[&data, "--jobs", "x.toml"], "cannot be used with");
    refused(&["/nowhere"], "cannot read /nowhere");
    refused(&["--jobs", "/nowhere/jobs.toml"], "cannot read /nowhere/jobs.toml");
    refused(&[&data, "--type", "lara", "--learning-rate", "1e-3"], "must be one of lora, dora, ia3");
    refused(&[&data, "--type", "lara"], "--learning-rate");
    refused(&[&data, "--targets", "qq_proj"], "no layer of the model is called so");
    refused(&[&data, "--tokens-per-batch", "100"], "smaller `batch`");
    refused(&[&data, "--extensions", "rkt"], "no file is read there");
    let bad = texts.path().join("bad.jsonl");
    std::fs::write(&bad, "{\"text\": \"abc\"}\n{\"text\": 1}\n").expect("a file");
    refused(&[&shown(&bad)], "bad.jsonl:2: ");
}
