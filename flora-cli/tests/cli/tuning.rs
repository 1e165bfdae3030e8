//! `flora tune` and `flora bench planner`: what is kept and what is said, never how long it took.

use std::path::{Path, PathBuf};
use std::process::Stdio;

use serde_json::Value;

use super::command::{answer, command, stderr};

fn tune(config: &Path) -> std::process::Command {
    let mut tune = command(config);
    tune.args(["tune", "--effort", "least", "--device", "host", "--json"]);
    tune
}

fn tuned(config: &Path, more: &[&str]) -> Value {
    let output = tune(config).args(more).output().expect("the binary starts");
    assert!(output.status.success(), "{}", stderr(&output));
    serde_json::from_slice(&output.stdout).expect("JSON")
}

fn file(answer: &Value) -> PathBuf {
    answer["path"].as_str().expect("a path").into()
}

#[test]
fn a_damaged_tuning_file_is_reported_and_replaced() {
    let config = tempfile::tempdir().expect("a temporary folder");
    let path = file(&tuned(config.path(), &[]));
    let whole = std::fs::read_to_string(&path).expect("it was written");
    let foreign = whole.replace("\"device\": \"", "\"device\": \"not ");
    let future = whole.replace("\"schema\": 5", "\"schema\": 4000");
    let negative = whole.replacen("\"seconds_per_mac\": [", "\"seconds_per_mac\": [\n-1.0,", 1);
    for (wrong, said) in [
        ("{", "not a tuning file"),
        (&whole[..whole.len() / 2], "not a tuning file"),
        (&foreign, "measured for not"),
        (&future, "schema 4000"),
        (&negative, "not a tuning file"),
    ] {
        std::fs::write(&path, wrong).expect("a writable folder");
        let plan = command(config.path())
            .args(["plan", "--ranks", "1", "--device", "host"])
            .output()
            .expect("the binary starts");
        assert!(plan.status.success() && stderr(&plan).contains(said), "{said}: {}", stderr(&plan));
        let again = tune(config.path()).output().expect("the binary starts");
        assert!(stderr(&again).contains(said) && stderr(&again).contains("it will be replaced"), "{}", stderr(&again));
        assert!(flora_plan::cost::DeviceCoefficients::read(&path).is_ok(), "{said}");
    }
}

#[test]
fn formats_are_kept_beside_one_another() {
    let config = tempfile::tempdir().expect("a temporary folder");
    let formats = |answer: &Value| -> Vec<String> {
        let read = flora_plan::cost::DeviceCoefficients::read(&file(answer)).expect("it is whole");
        read.formats.into_keys().collect()
    };
    assert_eq!(formats(&tuned(config.path(), &[])), ["f32/f32/f32"]);
    let both = ["f32/f32/f32", "f32/f32/q4_0"];
    let quantised = tuned(config.path(), &["--weight", "q4_0"]);
    assert_eq!(formats(&quantised), both);
    assert_eq!(quantised["coefficients"]["formats"].as_object().map(serde_json::Map::len), Some(1));
    assert_eq!(formats(&tuned(config.path(), &["--weight", "f32,q4_0"])), both);
}

#[test]
fn two_processes_that_tune_at_once_leave_a_whole_file() {
    let config = tempfile::tempdir().expect("a temporary folder");
    let start = |weight: &str| {
        let mut tune = tune(config.path());
        tune.args(["--weight", weight]).stdout(Stdio::piped()).stderr(Stdio::piped()).spawn().expect("it starts")
    };
    let running: Vec<_> = ["f32", "q8_0", "q4_0", "f32"].map(start).into_iter().collect();
    let mut paths = Vec::new();
    for child in running {
        let output = child.wait_with_output().expect("it ends");
        assert!(output.status.success(), "{}", stderr(&output));
        paths.push(file(&serde_json::from_slice(&output.stdout).expect("JSON")));
    }
    let read = flora_plan::cost::DeviceCoefficients::read(&paths[0]).expect("it is whole");
    let names: Vec<_> = read.formats.into_keys().collect();
    assert_eq!(names, ["f32/f32/f32", "f32/f32/q4_0", "f32/f32/q8_0"]);
    // Nothing is left over but the lock.
    assert_eq!(std::fs::read_dir(config.path()).expect("a folder").count(), 2);
}

#[test]
fn every_batch_has_a_choice_and_a_regret() {
    let arguments = ["bench", "planner", "--points", "6", "--rounds", "1", "--longest", "5", "--json"];
    let answered = answer(arguments);
    let number = |value: &Value| value.as_f64().expect("a number");
    let results = answered["results"].as_array().expect("an array");
    assert!(answered["points"] == 6 && results.len() == 6);
    for result in results {
        let candidates = result["candidates"].as_array().expect("an array");
        let of = |name: &Value| {
            let own = candidates.iter().find(|candidate| candidate["lowering"] == *name);
            number(&own.unwrap_or_else(|| panic!("{name} is a candidate of {result}"))["seconds"])
        };
        let (chosen, fastest) = (of(&result["chosen"]), of(&result["fastest"]));
        assert!(candidates.len() >= 2 && fastest <= chosen, "{result}");
        assert!((number(&result["regret"]) - (chosen / fastest - 1.0)).abs() < 1e-9, "{result}");
        assert!(candidates.iter().all(|candidate| number(&candidate["predicted_seconds"]) > 0.0), "{result}");
    }
    let regrets = results.iter().map(|result| number(&result["regret"]));
    assert!((number(&answered["mean_regret"]) - regrets.clone().sum::<f64>() / 6.0).abs() < 1e-9);
    assert_eq!(number(&answered["max_regret"]), regrets.fold(0.0, f64::max));
    assert!((0.0..=1.0).contains(&number(&answered["top1"])) && number(&answered["p95_regret"]) >= 0.0);
}
