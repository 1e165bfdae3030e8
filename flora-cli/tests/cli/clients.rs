//! Clients that others wrote, against `flora serve`: lm-eval, and curl as the pages of this repository have it typed.
//!
//! `FLORA_LM_EVAL=required` fetches lm-eval; without it its test uses what was fetched before, and says so when there is none.
//! `FLORA_MODEL` does the same for SmolLM2.
#![cfg(unix)]

use std::collections::BTreeMap;
use std::path::{Path, PathBuf};
use std::process::Command;

use flora_toolchain::{lm_eval_from_environment, smollm2_from_environment};
use serde_json::Value;

use super::server::Server;
use super::serving::Tiny;

/// By adapter, of each item's answers the log-likelihood and whether the answer is the greedy text.
type Scores = BTreeMap<String, Vec<Vec<(f64, bool)>>>;

/// How far a sum of some ten log-probabilities may be from that in another order of sums.
const TOLERANCE: f64 = 2e-4;

/// The name that a server gives its base model here.
const BASE: &str = "base";

fn repository() -> PathBuf {
    Path::new(env!("CARGO_MANIFEST_DIR")).join("..")
}

fn golden(path: &str) -> PathBuf {
    repository().join("tests/golden").join(path)
}

#[test]
fn lm_eval_scores_the_tiny_model_with_each_kind_as_peft_does() {
    let tiny = Tiny::new();
    let own = ["llama_tiny/adapters/lora", "llama_tiny/adapters/hira", "trained/adapters/dora", "trained/adapters/ia3"];
    let zoo = std::fs::read_dir(golden("llama_zoo/adapters")).expect("golden adapters");
    let folders = own.into_iter().map(golden).chain(zoo.map(|entry| entry.expect("a folder").path()));
    let named = folders.map(|folder| {
        let name = folder.file_name().expect("a name").to_string_lossy().into_owned();
        format!("{name}={}", folder.display())
    });
    let fixed = ["--model", &tiny.model, "--served-name", BASE, "--port", "0", "--lora-modules"].map(str::to_owned);
    let server = Server::start(fixed.into_iter().chain(named));
    scored_as_recorded(&server, "tiny", 24);
}

#[test]
fn lm_eval_scores_smollm2_as_transformers_and_peft_do() {
    let Some(model) = smollm2() else { return };
    let adapters = golden("smollm2/adapters");
    let arguments =
        ["--model", &model, "--adapters", &adapters.display().to_string(), "--served-name", BASE, "--port", "0"];
    scored_as_recorded(&Server::start(arguments), "smollm2", 4);
}

/// The model's file; a note where there is none.
fn smollm2() -> Option<String> {
    let model = smollm2_from_environment().expect("FLORA_MODEL=required, but SmolLM2 can't be had");
    if model.is_none() {
        println!("NOT RUN: SmolLM2 was not fetched; FLORA_MODEL=required fetches it");
    }
    model.map(|path| path.display().to_string())
}

/// Has lm-eval ask for all that was recorded of a case, which is of so many models, and compares.
fn scored_as_recorded(server: &Server, case: &str, models: usize) {
    let python = lm_eval_from_environment().expect("FLORA_LM_EVAL=required, but lm-eval can't be had");
    let Some(python) = python else {
        println!("NOT RUN: lm-eval was not fetched; FLORA_LM_EVAL=required fetches it");
        return;
    };
    let folder = golden("log_likelihoods").join(case);
    let text = std::fs::read_to_string(folder.join("log_likelihoods.json")).expect("a golden file");
    let expected: Scores = serde_json::from_str(&text).expect("scores");
    assert_eq!(expected.len(), models, "of {case}");

    // What its libraries keep of data sets.
    let cache = tempfile::tempdir().expect("a temporary folder");
    let mut command = python.command();
    command.arg(concat!(env!("CARGO_MANIFEST_DIR"), "/tests/lm_eval_client.py"));
    command.arg(server.url()).arg(golden("log_likelihoods")).args(expected.keys()).current_dir(folder);
    command.env("HF_HOME", cache.path()).env("HF_HUB_OFFLINE", "1").env("TQDM_DISABLE", "1");
    // A proxy of this machine would be asked for its own loopback.
    command.env("NO_PROXY", "*").env("no_proxy", "*");
    let output = command.output().expect("Python starts");
    let said = String::from_utf8_lossy(&output.stdout);
    let found = said.lines().last().filter(|_| output.status.success());
    let found = found.unwrap_or_else(|| panic!("{said}\n{}", String::from_utf8_lossy(&output.stderr)));
    let found: Scores = serde_json::from_str(found).expect("scores");

    let mut worst = 0.0_f64;
    for (name, items) in &expected {
        assert_eq!(found[name].len(), items.len(), "items by {name}");
        for (index, (found, expected)) in found[name].iter().zip(items).enumerate() {
            assert_eq!(found.len(), expected.len(), "answers of item {index} by {name}");
            for (found, expected) in found.iter().zip(expected) {
                let off = (found.0 - expected.0).abs();
                assert!(
                    off <= TOLERANCE && found.1 == expected.1,
                    "item {index} by {name}: {found:?}, not {expected:?}"
                );
                worst = worst.max(off);
            }
        }
    }
    println!("{case}: {models} models, at most {worst:.1e} off");
}

/// A command that a page has typed in a shell, and what the page has it print.
struct Typed {
    command: String,
    prints: Option<String>,
}

/// The commands that begin with `curl` in the blocks of a page.
fn typed(page: &str) -> Vec<Typed> {
    let text = std::fs::read_to_string(repository().join(page)).expect("a page");
    let mut found = Vec::new();
    let mut lines = text.lines().peekable();
    let mut is_session = false;
    while let Some(line) = lines.next() {
        if let Some(language) = line.strip_prefix("```") {
            is_session = language == "console";
        }
        let shown = if is_session { line.strip_prefix("$ ") } else { Some(line) };
        let Some(command) = shown.filter(|line| line.starts_with("curl ")) else { continue };
        let mut command = command.to_owned();
        // A line goes on behind a backslash, and a quoted text over several lines.
        while command.ends_with('\\') || command.matches('\'').count() % 2 == 1 {
            command += "\n";
            command += lines.next().unwrap_or_else(|| panic!("{page} breaks off in: {command}"));
        }
        let prints = lines.peek().filter(|line| is_session && !line.starts_with("```")).map(|line| (*line).to_owned());
        found.push(Typed { command, prints });
    }
    found
}

/// Whether an answer is what a page shows of it, which ends in dots where fields were cut off.
fn has(answer: &Value, shown: &str) -> bool {
    let shown = shown.strip_suffix(",...").map_or_else(|| shown.to_owned(), |fields| format!("{fields}}}"));
    let shown: BTreeMap<String, Value> = serde_json::from_str(&shown).expect("JSON in a page");
    !shown.is_empty() && shown.iter().all(|(name, value)| answer[name] == *value)
}

#[test]
fn curl_prints_what_the_pages_say() {
    let Some(model) = smollm2() else { return };
    // The command of the README, with the model that it fetches, and a port that is free.
    let readme = std::fs::read_to_string(repository().join("README.md")).expect("a page");
    let served = readme.lines().find_map(|line| line.strip_prefix("$ flora serve ")).expect("a server in the README");
    let mut arguments = shlex::split(served).expect("words");
    for word in &mut arguments {
        if repository().join(&*word).is_dir() {
            *word = repository().join(&*word).display().to_string();
        }
    }
    if Command::new("curl").arg("--version").output().is_err() {
        println!("NOT RUN: there is no curl");
        return;
    }
    arguments.extend(["--model", &model, "--port", "0"].map(str::to_owned));
    let server = Server::start(arguments);

    for (page, count) in [("README.md", 1), ("docs/serving.md", 3)] {
        let typed = typed(page);
        assert_eq!(typed.len(), count, "commands in {page}");
        for Typed { command, prints } in typed {
            assert!(command.contains("localhost:8000"), "no address in: {command}");
            let command = command.replace("localhost:8000", &server.url());
            let output = Command::new("sh").args(["-c", &command]).env("NO_PROXY", "*").env("no_proxy", "*").output();
            let output = output.expect("a shell");
            let said = String::from_utf8_lossy(&output.stdout);
            assert!(output.status.success(), "{command}: {}", String::from_utf8_lossy(&output.stderr));
            let answer: Value =
                serde_json::from_str(&said).unwrap_or_else(|error| panic!("{command}: {error}: {said}"));
            match prints {
                // Whether fields keep their order depends on what a build has besides.
                Some(prints) => assert!(has(&answer, &prints), "{command}: {said}"),
                None => assert_eq!(answer["choices"].as_array().map(Vec::len), Some(1), "{command}: {said}"),
            }
        }
    }
}
