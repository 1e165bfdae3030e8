//! What a step of training costs: losses and gradients of SmolLM2-135M in tokens a second, with adapters of rank 16 of queries and
//! keys, for one and eight sequences of 128 tokens, bases as the file has them and in f32, with and without room for intermediate
//! results. Medians of a few rounds in which the kinds take turns. Arguments choose by the words of a row: `lora f32 1x128`.
//! `FLORA_MODEL=required` fetches the model.

use std::time::Instant;

use flora_adapters::BaseForm;
use flora_checkpoint::Model;
use flora_ir::algebra::{FoldedAdapter, RankOne, VirtualRow};
use flora_model::{TrainOptions, TrainedModel};
use flora_plan::layer::LayerShape;
use flora_train::{JobId, TrainSegment, Trainee};

const RANK: usize = 16;
const LENGTH: usize = 128;
const ROUNDS: usize = 3;

/// An adapter of a layer.
type Fold = fn(LayerShape) -> FoldedAdapter;

const KINDS: [(&str, Fold); 4] = [("lora", lora), ("flora", flora), ("hira", hira), ("ia3", ia3)];

fn vector(width: u32) -> Vec<f32> {
    (0..width).map(|at| 0.02 * (at % 7) as f32 - 0.06).collect()
}

fn row(shape: LayerShape) -> VirtualRow {
    VirtualRow { in_scale: Some(vector(shape.d)), out_scale: Some(vector(shape.k)) }
}

fn lora(shape: LayerShape) -> FoldedAdapter {
    let pair = || RankOne { shrink: vector(shape.d), expand: vector(shape.k) };
    let low_rank = (0..RANK).map(|_| pair()).collect();
    FoldedAdapter { virtual_rows: vec![VirtualRow::default()], low_rank, ..FoldedAdapter::default() }
}

fn flora(shape: LayerShape) -> FoldedAdapter {
    FoldedAdapter { virtual_rows: (0..RANK).map(|_| row(shape)).collect(), ..FoldedAdapter::default() }
}

fn hira(shape: LayerShape) -> FoldedAdapter {
    let base = [VirtualRow::default()];
    FoldedAdapter {
        virtual_rows: base.into_iter().chain(flora(shape).virtual_rows).collect(),
        ..FoldedAdapter::default()
    }
}

fn ia3(shape: LayerShape) -> FoldedAdapter {
    let row = VirtualRow { in_scale: None, out_scale: Some(vector(shape.k)) };
    FoldedAdapter { virtual_rows: vec![row], ..FoldedAdapter::default() }
}

/// Whether the arguments name one of these words, or nothing of their kind.
fn is_chosen(word: &str, all: &[&str]) -> bool {
    let mut named = std::env::args().skip(1).filter(|argument| all.contains(&argument.as_str())).peekable();
    named.peek().is_none() || named.any(|argument| argument == word)
}

const BASES: [(&str, BaseForm); 2] = [("f32", BaseForm::F32), ("stored", BaseForm::Stored)];
const KEPT: [(&str, u64); 2] = [("all", u64::MAX), ("inputs", 0)];
/// Each with the jobs of its sequences.
const BATCHES: [(&str, &[u32]); 3] = [("1x128", &[0]), ("8x128", &[0; 8]), ("8jobs", &[0, 1, 2, 3, 4, 5, 6, 7])];

fn main() {
    let found = flora_toolchain::smollm2_from_environment().expect("SmolLM2 can't be had");
    let Some(path) = found else {
        println!("NOT RUN: SmolLM2 was not fetched; FLORA_MODEL=required fetches it");
        return;
    };
    let model = Model::open(&path).expect("the model");
    let device = flora_devices::host();
    println!("{}\nbase    kept      kind   batch      step     tokens/s", device.info().name);
    for (base, form) in BASES.into_iter().filter(|(name, _)| is_chosen(name, &BASES.map(|(name, _)| name))) {
        for (kept, activation_bytes) in
            KEPT.into_iter().filter(|(name, _)| is_chosen(name, &KEPT.map(|(name, _)| name)))
        {
            let options = TrainOptions { base: form, activation_bytes };
            let mut trained = TrainedModel::load(&device, &model, options).expect("a decoder");
            measure(&mut trained, &format!("{base:<7} {kept:<8}"));
        }
    }
}

fn measure(trained: &mut TrainedModel, about: &str) {
    let layers = trained.layers().iter().enumerate();
    let adapted = layers.filter(|(_, layer)| layer.path.ends_with("q_proj") || layer.path.ends_with("k_proj"));
    let adapted: Vec<_> = adapted.map(|(at, layer)| (at, layer.shape)).collect();
    let kinds: Vec<_> = KINDS.into_iter().filter(|(name, _)| is_chosen(name, &KINDS.map(|(name, _)| name))).collect();
    for (kind, (_, fold)) in kinds.iter().enumerate() {
        for job in 0..8 {
            let layers: Vec<_> = adapted.iter().map(|(at, shape)| (*at, fold(*shape))).collect();
            trained.place(JobId((8 * kind + job) as u32), &layers).expect("room");
        }
    }
    for (batch, jobs) in BATCHES.into_iter().filter(|(name, _)| is_chosen(name, &BATCHES.map(|(name, _)| name))) {
        let mut times = vec![Vec::new(); kinds.len()];
        for round in 0..=ROUNDS {
            for (kind, times) in times.iter_mut().enumerate() {
                let tokens: Vec<u32> = (0..LENGTH).map(|at| ((at * 37 + round) % 49_000) as u32).collect();
                let targets: Vec<_> = tokens.iter().map(|token| Some(*token)).collect();
                let segment = |job: &u32| {
                    let job = Some(JobId(8 * kind as u32 + job));
                    TrainSegment { job, tokens: &tokens, targets: &targets }
                };
                let segments: Vec<_> = jobs.iter().map(segment).collect();
                let start = Instant::now();
                drop(trained.gradients(&segments).expect("it runs"));
                if round > 0 {
                    times.push(start.elapsed().as_secs_f64());
                }
            }
        }
        for ((kind, _), mut times) in kinds.iter().zip(times) {
            times.sort_by(f64::total_cmp);
            let seconds = times[times.len() / 2];
            let speed = (jobs.len() * LENGTH) as f64 / seconds;
            println!("{about} {kind:>6}  {batch:>6}  {:>7.0} ms  {speed:>8.0}", seconds * 1e3);
        }
    }
}
