//! `jobs.toml`: what it says is what a job is told, and mistakes are named with their line or job.

use flora_train::jobs_file::{DescribedJob, HeldOut, parse_jobs};
use flora_train::{Decay, Length, Start, Warmup};
use proptest::prelude::*;
use std::path::{Path, PathBuf};

const FILE: &str = r#"
[defaults]
kind = "lora"
rank = 4
targets = ["q_proj", "k_proj"]
data = "data/racket"
extensions = ["rkt"]
held_out = 0.1
learning_rate = 1e-3
schedule = "cosine"
warmup_fraction = 0.05
steps = 300
batch = 8

[[job]]
name = "lora"
alpha = 8
options = { use_rslora = true, rank_pattern = { "layers.0.*" = 8 } }

[[job]]
name = "flora"
kind = "flora_mean"
rank = 1
start = "reference"
learning_rate = 8e-3
epochs = 2
warmup_steps = 10
held_out = ["other/a.jsonl", "/b.jsonl"]
largest_norm = 1.0
patience = 3
seed = 7
"#;

fn jobs(text: &str) -> Result<Vec<DescribedJob>, String> {
    parse_jobs(Path::new("runs/jobs.toml"), text).map_err(|error| error.to_string())
}

#[test]
fn a_job_says_what_differs_from_the_defaults() {
    let [lora, flora] = &jobs(FILE).expect("two jobs")[..] else { panic!("two jobs") };
    let own = &lora.options;
    assert_eq!(
        (&own.name[..], &own.adapter.layer[..], own.adapter.rank, own.adapter.alpha),
        ("lora", "lora", Some(4), Some(8.0))
    );
    assert_eq!(own.adapter.options["rank_pattern"]["layers.0.*"], 8);
    assert_eq!(
        (own.length, own.warmup, own.decay, own.batch),
        (Length::Steps(300), Warmup::Fraction(0.05), Decay::Cosine, 8)
    );
    assert_eq!(lora.data.paths, [PathBuf::from("runs/data/racket")]);
    assert_eq!((&lora.data.extensions[..], &lora.held_out), (&["rkt".to_owned()][..], &HeldOut::Fraction(0.1)));
    let own = &flora.options;
    assert_eq!(
        (own.length, own.warmup, own.start, own.seed),
        (Length::Epochs(2), Warmup::Steps(10), Start::Reference, 7)
    );
    assert_eq!((own.learning_rate, own.largest_norm, own.evaluation.patience), (8e-3, Some(1.0), Some(3)));
    let HeldOut::Sources(sources) = &flora.held_out else { panic!("{:?}", flora.held_out) };
    assert_eq!(sources.paths, [PathBuf::from("runs/other/a.jsonl"), PathBuf::from("/b.jsonl")]);
}

#[test]
fn mistakes_are_named_by_line_or_job() {
    for (old, new, words) in [
        ("batch = 8", "batches = 8", "line 13"),
        ("rank = 4", "rank = \"4\"", "line 4"),
        ("schedule = \"cosine\"", "schedule = \"cosin\"", "`constant`, `linear`, `cosine`"),
        ("name = \"flora\"", "", "the job `number 2` has no `name`"),
        ("name = \"flora\"", "name = \"lora\"", "the job `lora` has the name of another one"),
        ("learning_rate = 1e-3", "", "the job `lora` has no `learning_rate`"),
        ("steps = 300", "", "`steps` or `epochs`"),
        ("epochs = 2", "epochs = 2\nsteps = 3", "the job `flora` has both `steps` and `epochs`"),
        ("held_out = 0.1", "held_out = 1.5", "between 0 and 1"),
        ("learning_rate = 8e-3", "learning_rate = -1.0", "`learning_rate` = -1"),
        ("[[job]]", "[[jobs]]", "unknown field `jobs`"),
    ] {
        assert!(FILE.contains(old), "{old}");
        let message = jobs(&FILE.replacen(old, new, 1)).expect_err(new);
        assert!(message.contains("runs/jobs.toml") && message.contains(words), "{message} has no {words}");
    }
    assert!(jobs("").expect_err("no jobs").contains("no `[[job]]`"));
}

proptest! {
    #[test]
    fn mutated_files_are_jobs_or_an_error(at in 0..FILE.len(), byte in 0u8..128, cut in 0..FILE.len()) {
        let mut bytes = FILE.as_bytes().to_vec();
        bytes[at] = byte;
        bytes.truncate(FILE.len() - cut / 2);
        let _ = jobs(&String::from_utf8_lossy(&bytes));
    }
}
