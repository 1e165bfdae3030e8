//! Adapters that training made, where they are used: flora's serving gives the logits that the trainer learnt with, and those of PEFT,
//! which loads them (`tests/golden/trained.py`).

use std::path::Path;

use flora_adapters::{BaseForm, Layers};
use flora_checkpoint::{AdapterFolder, Model};
use flora_engine::{Decoder, SequenceId};
use flora_model::{TrainOptions, TrainedModel};
use flora_train::{Adapter, EndedJob, Ending, JobId, NewJob, Places, TrainSegment, Trainee, Trainer};

use crate::golden::{check, prefill};
use crate::served::{Files, Served, golden, load_model};
use crate::trained::{KINDS, job, rms, steps};
use crate::{device, is_host};

/// Those that PEFT has.
const OF_PEFT: [&str; 4] = ["lora", "dora", "ia3", "hira"];

fn model() -> Model {
    Model::open(&golden("llama_tiny").join("model")).expect("a golden model")
}

fn load_trained(base: BaseForm) -> TrainedModel {
    let options = TrainOptions { base, ..TrainOptions::default() };
    TrainedModel::load(&device(), &model(), options).expect("a decoder")
}

/// The golden jobs, trained to their ends, with their adapters in `folder`.
fn train(base: BaseForm, folder: &Path) -> Vec<EndedJob> {
    let layers = Layers::builtin().expect("the built-in kinds");
    let mut trainer = Trainer::new(load_trained(base), 5 * 8 * 64);
    for kind in KINDS {
        let places = Places { adapters: Some(folder.to_owned()), state: None };
        let job = NewJob { places, ..job(kind, &layers) };
        trainer.add(job, Path::new("trained_served.rs"), &layers).expect("a job");
    }
    while !trainer.is_idle() {
        trainer.step();
    }
    let ended = trainer.take_ended();
    assert!(ended.len() == KINDS.len() && ended.iter().all(|job| job.reason == Ending::Complete));
    ended
}

/// The golden model in this form, with the adapters of a folder.
fn served(base: BaseForm, adapters: &Path) -> Served {
    let (model, outputs) = (golden("llama_tiny").join("model"), golden("trained").join("outputs"));
    load_model("trained", &Files { model, outputs, adapters: adapters.to_owned(), base })
}

/// ln p of every token after `tokens`, as the trainer has it.
fn learnt(trained: &mut TrainedModel, tokens: &[u32], vocabulary: usize) -> Vec<f64> {
    let after = |token: u32| {
        let before = (1..tokens.len()).map(|_| None);
        before.chain([Some(token)]).collect::<Vec<_>>()
    };
    let targets: Vec<_> = (0..vocabulary as u32).map(after).collect();
    let segment = |targets| TrainSegment { job: Some(JobId(0)), tokens, targets };
    let segments: Vec<_> = targets.iter().map(|targets| segment(targets)).collect();
    trained.losses(&segments).expect("losses").iter().map(|loss| -loss.nats).collect()
}

/// ln p of every token, by its logits.
fn normalised(logits: &[f32]) -> Vec<f64> {
    let sum: f64 = logits.iter().map(|logit| f64::from(*logit).exp()).sum();
    logits.iter().map(|logit| f64::from(*logit) - sum.ln()).collect()
}

fn farthest(one: &[f64], other: &[f64]) -> f64 {
    assert_eq!(one.len(), other.len());
    one.iter().zip(other).map(|(one, other)| (one - other).abs()).fold(0.0, f64::max)
}

#[test]
fn what_was_trained_is_served_with_the_logits_that_it_was_trained_with() {
    if !is_host() {
        // Training is the host's.
        return;
    }
    // With 8 bits a norm of DoRA is that of the rounded weight, on both sides.
    for base in [BaseForm::Stored, BaseForm::Int8] {
        let folder = tempfile::tempdir().expect("a temporary folder");
        let mut trained = load_trained(base);
        let mut served = served(base, folder.path());
        for EndedJob { name, adapter, .. } in train(base, folder.path()) {
            let place = |trained: &mut TrainedModel, adapter: &Adapter| {
                trained.place(JobId(0), &adapter.fold().expect("finite numbers")).expect("it fits");
            };
            place(&mut trained, &adapter);
            let own = served.adapter(&name);
            for tokens in [&[17, 4, 170, 31, 4, 99, 2][..], &[88, 1, 23]] {
                let sequence = SequenceId(0);
                let logits = prefill(&mut served, sequence, Some(own), tokens, 4);
                served.decoder.release(sequence);
                let base = prefill(&mut served, sequence, None, tokens, 4);
                served.decoder.release(sequence);
                let largest = logits.iter().fold(0.0f32, |largest, logit| largest.max(logit.abs()));
                // A logit's rounding, and that of what normalises it, which is no more.
                let allowed = 2.0 * f64::from(served.rounding * largest);
                let learnt = learnt(&mut trained, tokens, served.vocabulary());
                let off = farthest(&learnt, &normalised(&logits));
                assert!(off <= allowed, "{name}: off by {off}, {allowed} allowed");
                let changed = farthest(&learnt, &normalised(&base));
                assert!(changed > 100.0 * allowed, "{name}: the adapter changes {changed} alone");
                println!("{name}: off by {:.3} of what is allowed, the adapter changes {changed:.3}", off / allowed);
            }
        }
    }
}

#[test]
fn peft_computes_the_same_with_what_was_trained() {
    if !is_host() {
        // Training is the host's.
        return;
    }
    let layers = Layers::builtin().expect("the built-in kinds");
    let open = |folder: &Path| AdapterFolder::open(folder, layers.kinds()).expect("an adapter");
    let folder = tempfile::tempdir().expect("a temporary folder");
    train(BaseForm::Stored, folder.path());
    let adapters = golden("trained").join("adapters");
    let mut served = served(BaseForm::Stored, &adapters);
    for kind in OF_PEFT {
        // The adapter that PEFT loaded is the one that training makes, but for the order of sums on another machine.
        let (found, kept) = (open(&folder.path().join(kind)), open(&adapters.join(kind)));
        assert!(found.modules.keys().eq(kept.modules.keys()), "{kind}");
        let mut off = Vec::new();
        for (path, module) in &found.modules {
            for (name, operand) in &module.operands {
                let expected = &kept.modules[path].operands[name].values;
                off.extend(operand.values.iter().zip(expected).map(|(own, kept)| f64::from(*own) - f64::from(*kept)));
            }
        }
        let (off, rounding) = (rms(off.into_iter()), steps(kind).rounding_of_weights);
        assert!(off < 4.0 * rounding, "{kind}: off by {off:.2e}, and rounding by {rounding:.2e}");
        check(&mut served, kind);
    }
}

#[test]
#[ignore = "writes the adapters that tests/golden/trained.py takes into the folder FLORA_TRAINED"]
fn write_what_training_makes() {
    let folder = std::env::var_os("FLORA_TRAINED").expect("FLORA_TRAINED names a folder");
    train(BaseForm::Stored, Path::new(&folder));
}
