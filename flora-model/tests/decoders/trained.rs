//! Twenty steps of training against PEFT and PyTorch (`tests/golden/training.py`), by every base that the model can be kept in.

use std::path::Path;
use std::sync::Arc;

use flora_adapters::Layers;
use flora_checkpoint::{AdapterFolder, AdapterRequest, Model};
use flora_model::{TrainOptions, TrainedModel};
use flora_train::data::{Document, Excess};
use flora_train::{
    AdamW, Dataset, Decay, Ending, Evaluation, Happened, JobOptions, Length, NewJob, Places, Start, Trainer, Warmup,
};
use serde::Deserialize;

use crate::served::golden;
use crate::{device, is_host};

pub(crate) const KINDS: [&str; 5] = ["lora", "dora", "ia3", "hira", "flora"];

/// Longer than any of the golden sequences.
const SEQUENCE_LENGTH: usize = 64;
/// Of the model that the golden files are of.
const VOCABULARY: u32 = 173;

#[derive(Deserialize)]
struct Sequences {
    options: Options,
    sequences: Vec<Sequence>,
}

#[derive(Deserialize)]
struct Options {
    steps: u64,
    warmup: u64,
    rate: f64,
    weight_decay: f64,
    largest_norm: f64,
}

#[derive(Deserialize)]
struct Sequence {
    tokens: Vec<u32>,
    learnt_from: usize,
}

/// What PyTorch gave in f64, and how far its f32 is from that, root mean square.
#[derive(Deserialize)]
pub(crate) struct Steps {
    losses: Vec<f64>,
    norms: Vec<f64>,
    rounding_of_losses: f64,
    rounding_of_norms: f64,
    pub(crate) rounding_of_weights: f64,
}

fn read<T: serde::de::DeserializeOwned>(path: &Path) -> T {
    serde_json::from_slice(&std::fs::read(path).expect("a golden file")).expect("JSON as the script writes it")
}

/// Of a kind's golden job.
pub(crate) fn steps(kind: &str) -> Steps {
    read(&golden("training").join(kind).join("steps.json"))
}

/// The golden sequences, as what a model of so many tokens learns from.
pub(crate) fn data(vocabulary: u32) -> Dataset {
    let Sequences { sequences, .. } = read(&golden("training").join("sequences.json"));
    let documents = sequences.iter().map(|own| {
        let (context, learnt) = own.tokens.split_at(own.learnt_from);
        let mut document = Document::new(Excess::Dropped);
        document.push(context.iter().map(|token| token % vocabulary), false);
        document.push(learnt.iter().map(|token| token % vocabulary), true);
        document
    });
    Dataset::new(&documents.collect::<Vec<_>>(), SEQUENCE_LENGTH).expect("sequences")
}

pub(crate) fn job(kind: &str, layers: &Layers) -> NewJob {
    let folder = golden("training");
    let Sequences { options, .. } = read(&folder.join("sequences.json"));
    let begin = AdapterFolder::open(&folder.join(kind).join("start"), layers.kinds()).expect("an adapter of PEFT");
    let options = JobOptions {
        name: kind.to_owned(),
        // The adapter to begin with has all of this.
        adapter: AdapterRequest {
            layer: kind.to_owned(),
            rank: None,
            alpha: None,
            targets: Vec::new(),
            options: serde_json::Map::new(),
        },
        start: Start::Default,
        seed: 1,
        learning_rate: options.rate,
        decay: Decay::Cosine,
        warmup: Warmup::Steps(options.warmup),
        length: Length::Steps(options.steps),
        sequence_length: SEQUENCE_LENGTH,
        batch: 8,
        accumulation: 1,
        optimizer: AdamW { weight_decay: options.weight_decay, ..AdamW::default() },
        largest_norm: Some(options.largest_norm),
        evaluation: Evaluation { every: 1, patience: None, least_gain: 0.0 },
        save_every: None,
    };
    let data = Arc::new(data(VOCABULARY));
    NewJob { options, data, held_out: None, begin: Some(begin), places: Places::default() }
}

pub(crate) fn rms(differences: impl Iterator<Item = f64>) -> f64 {
    let (sum, count) = differences.fold((0.0, 0), |(sum, count), own| (sum + own * own, count + 1));
    (sum / f64::from(count.max(1))).sqrt()
}

#[test]
fn twenty_steps_follow_peft_and_pytorch() {
    if !is_host() {
        // Training is the host's.
        return;
    }
    let layers = Layers::builtin().expect("the built-in kinds");
    let model = Model::open(&golden("llama_tiny").join("model")).expect("a golden model");
    let trained = TrainedModel::load(&device(), &model, TrainOptions::default()).expect("a decoder");
    // All five share every batch.
    let mut trainer = Trainer::new(trained, 5 * 8 * 64);
    for kind in KINDS {
        trainer.add(job(kind, &layers), Path::new("trained.rs"), &layers).expect("a job");
    }
    let mut found = std::collections::BTreeMap::<String, Vec<(f64, f64)>>::new();
    while !trainer.is_idle() {
        for event in trainer.step() {
            if let Happened::Step { loss, norm, .. } = event.what {
                found.entry(event.job).or_default().push((loss, norm));
            }
        }
    }
    for ended in trainer.take_ended() {
        let kind = ended.name.as_str();
        assert_eq!(ended.reason, Ending::Complete, "{kind}");
        let folder = golden("training").join(kind);
        let steps = steps(kind);
        let own = &found[kind];
        assert_eq!(own.len(), steps.losses.len(), "{kind}");
        let losses = rms(own.iter().zip(&steps.losses).map(|((loss, _), expected)| loss - expected));
        let norms = rms(own.iter().zip(&steps.norms).map(|((_, norm), expected)| norm / expected - 1.0));
        let end = AdapterFolder::open(&folder.join("end"), layers.kinds()).expect("an adapter of PEFT");
        let made = ended.adapter.folder(kind);
        assert!(made.modules.keys().eq(end.modules.keys()), "{kind}");
        let mut off = Vec::new();
        for (path, module) in &made.modules {
            for (name, operand) in &module.operands {
                let expected = &end.modules[path].operands[name];
                assert_eq!(operand.shape, expected.shape, "{kind} {path} {name}");
                let pairs = operand.values.iter().zip(&expected.values);
                off.extend(pairs.map(|(own, expected)| f64::from(*own) - f64::from(*expected)));
            }
        }
        let weights = rms(off.into_iter());
        for (what, own, rounding) in [
            ("losses", losses, steps.rounding_of_losses),
            ("norms", norms, steps.rounding_of_norms),
            ("weights", weights, steps.rounding_of_weights),
        ] {
            println!("{kind}: {what} are off by {own:.2e}, PyTorch's in f32 by {rounding:.2e}");
            // Two programs that round in f32 are both off by rounding, and each step carries on what the ones before were off by: four
            // standard deviations of such a walk, of which PyTorch's own is one draw.
            assert!(own < 4.0 * rounding, "{kind}: {what} are off by {own:.2e}, and rounding by {rounding:.2e}");
        }
    }
}

/// Jobs of every layer, of ranks, modules, lengths and cuts of their own.
fn mixed(count: usize) -> Vec<NewJob> {
    const LAYERS: [(&str, bool); 6] =
        [("lora", true), ("dora", true), ("ia3", false), ("hira", true), ("flora", true), ("flora_mean", true)];
    let mut random = fastrand::Rng::with_seed(31);
    let targets = [&["q_proj", "k_proj"][..], &["all-linear"], &["down_proj"], &["v_proj", "gate_proj"]];
    let job = |index: usize| {
        let (layer, has_rank) = LAYERS[index % LAYERS.len()];
        let sequence_length = random.usize(7..30);
        let documents: Vec<Document> = (0..random.usize(3..7))
            .map(|_| {
                let mut document = Document::new(Excess::Continued);
                document.push((0..random.usize(4..45)).map(|_| random.u32(0..173)), true);
                document
            })
            .collect();
        let options = JobOptions {
            name: format!("{layer}-{index}"),
            adapter: AdapterRequest {
                layer: layer.to_owned(),
                rank: has_rank.then(|| random.usize(1..9)),
                alpha: None,
                targets: targets[random.usize(0..targets.len())].iter().map(|name| (*name).to_owned()).collect(),
                options: serde_json::Map::new(),
            },
            start: Start::Default,
            seed: index as u64,
            learning_rate: 0.01,
            decay: Decay::Linear,
            warmup: Warmup::Steps(0),
            length: Length::Steps(3),
            sequence_length,
            batch: random.usize(1..4),
            accumulation: random.u32(1..3),
            optimizer: AdamW::default(),
            largest_norm: Some(1.0),
            evaluation: Evaluation { every: 2, patience: None, least_gain: 0.0 },
            save_every: Some(1),
        };
        let data = Arc::new(Dataset::new(&documents, sequence_length).expect("sequences"));
        NewJob { options, held_out: Some(data.clone()), data, begin: None, places: Places::default() }
    };
    (0..count).map(job).collect()
}

/// The bits of each job's parameters once all are over, by name.
fn parameters(trainer: &mut Trainer<TrainedModel>) -> std::collections::BTreeMap<String, Vec<Vec<u32>>> {
    while !trainer.is_idle() {
        trainer.step();
    }
    let bits = |values: &[f32]| values.iter().map(|value| value.to_bits()).collect();
    let of = |ended: flora_train::EndedJob| {
        assert!(ended.name == "wild" || ended.reason == Ending::Complete, "{}: {}", ended.name, ended.reason);
        (ended.name, ended.adapter.parameters().map(|own| bits(&own.values.values)).collect())
    };
    trainer.take_ended().into_iter().map(of).collect()
}

#[test]
fn a_job_has_the_same_bits_alone_with_31_others_and_after_an_interruption() {
    if !is_host() {
        // Training is the host's.
        return;
    }
    let layers = Layers::builtin().expect("the built-in kinds");
    let model = Model::open(&golden("llama_tiny").join("model")).expect("a golden model");
    let trainer = || {
        let trained = TrainedModel::load(&device(), &model, TrainOptions::default()).expect("a decoder");
        Trainer::new(trained, 300)
    };
    let add = |trainer: &mut Trainer<TrainedModel>, job: NewJob| {
        trainer.add(job, Path::new("trained.rs"), &layers).expect("a job");
    };
    let jobs = mixed(31);
    let mut together = trainer();
    let mut wild = jobs[4].clone();
    // Its first step makes numbers that f32 holds and their products are not.
    wild.options = JobOptions { name: "wild".to_owned(), learning_rate: 1e30, largest_norm: None, ..wild.options };
    add(&mut together, wild);
    jobs.iter().for_each(|job| add(&mut together, job.clone()));
    let together = parameters(&mut together);
    assert_eq!(together.len(), 32);
    for job in jobs {
        let name = job.options.name.clone();
        let folder = tempfile::tempdir().expect("a temporary folder");
        let state = Some(folder.path().join("state.safetensors"));
        let job = NewJob { places: Places { adapters: None, state }, ..job };
        // Killed after some batches, and gone on from what was saved.
        let mut killed = trainer();
        add(&mut killed, job.clone());
        (0..2).for_each(|_| drop(killed.step()));
        let mut alone = trainer();
        add(&mut alone, job);
        assert_eq!(parameters(&mut alone)[&name], together[&name], "{name}");
    }
}
