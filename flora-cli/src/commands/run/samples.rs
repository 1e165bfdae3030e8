//! What a run makes up where nothing is given: adapters of every kind, a mixed batch, inputs. All from one seed.

use std::collections::BTreeMap;
use std::hash::{DefaultHasher, Hash, Hasher};
use std::path::Path;

use flora::prelude::*;
use flora_checkpoint::{AdapterFolder, AdapterKind, AdapterKinds, AdapterModule, Operand};
use rayon::prelude::*;

use super::weights::Module;
use crate::commands::error::CommandError;

/// A stream of numbers that depends on the seed and on what it is for, not on what was drawn before.
pub(crate) struct Random(fastrand::Rng);

impl Random {
    pub(crate) fn new(seed: u64, purpose: &[&str]) -> Self {
        let mut hasher = DefaultHasher::new();
        (seed, purpose).hash(&mut hasher);
        Self(fastrand::Rng::with_seed(hasher.finish()))
    }

    /// `count` numbers, uniform in centre ± half_width.
    pub(crate) fn around(&mut self, centre: f32, half_width: f32, count: usize) -> Vec<f32> {
        (0..count).map(|_| centre + half_width * (2.0 * self.0.f32() - 1.0)).collect()
    }
}

/// Elements of a matrix; the extents are those of a file that holds it, or of a table here.
pub(super) fn product(rows: usize, columns: usize) -> usize {
    rows.saturating_mul(columns)
}

/// One row of `x` is as large as what a norm before the projection leaves: mean 0, variance 1.
pub(super) fn input(seed: u64, path: &str, rows: usize, d: usize) -> Vec<f32> {
    Random::new(seed, &["input", path]).around(0.0, 3.0f32.sqrt(), product(rows, d))
}

/// A made-up adapter.
struct Sample {
    name: &'static str,
    layer: &'static str,
    rank: usize,
    /// LoRA's s.
    scale: f32,
}

const fn sample(name: &'static str, layer: &'static str, rank: usize, scale: f32) -> Sample {
    Sample { name, layer, rank, scale }
}

/// Every kind, ranks 1 to 16. LoRA's scale is α/r with α = 2r, and α/√r for the rank-stabilised ones.
const SAMPLES: [Sample; 20] = [
    sample("lora-1", "lora", 1, 2.0),
    sample("lora-2", "lora", 2, 2.0),
    sample("lora-5", "lora", 5, 2.0),
    sample("lora-8", "lora", 8, 2.0),
    sample("rslora-4", "lora", 4, 4.0),
    sample("rslora-16", "lora", 16, 4.0),
    sample("dora-2", "dora", 2, 2.0),
    sample("dora-8", "dora", 8, 2.0),
    sample("ia3", "ia3", 0, 1.0),
    sample("ia3-feedforward", "ia3_feedforward", 0, 1.0),
    sample("hira-1", "hira", 1, 1.0),
    sample("hira-3", "hira", 3, 1.0),
    sample("hira-8", "hira", 8, 1.0),
    sample("flora-1", "flora", 1, 1.0),
    sample("flora-2", "flora", 2, 1.0),
    sample("flora-4", "flora", 4, 1.0),
    sample("flora-7", "flora", 7, 1.0),
    sample("flora-16", "flora", 16, 1.0),
    sample("flora-mean-2", "flora_mean", 2, 1.0),
    sample("flora-mean-6", "flora_mean", 6, 1.0),
];

/// Writes an adapter folder of every row of the table into `folder`.
pub(super) fn write_adapters(folder: &Path, modules: &[Module], seed: u64) -> Result<(), CommandError> {
    SAMPLES.par_iter().try_for_each(|sample| {
        let adapted = modules.iter().map(|module| (module.path.clone(), adapter_module(sample, module, seed)));
        let adapter = AdapterFolder::new(sample.name, kind_of(sample.layer)?, adapted.collect());
        adapter.write(folder)?;
        Ok(())
    })
}

/// The kind of adapter whose modules are of a built-in layer.
fn kind_of(layer: &str) -> Result<AdapterKind, CommandError> {
    let kinds = AdapterKinds::builtin();
    kinds.kind_of_layer(layer).ok_or_else(|| {
        let known = kinds.descriptions().flat_map(|kind| &kind.layers).map(|layer| layer.name.as_str());
        CommandError::UnknownLayer { name: layer.to_owned(), known: known.collect::<Vec<_>>().join(", ") }
    })
}

fn adapter_module(sample: &Sample, module: &Module, seed: u64) -> AdapterModule {
    let &Sample { name, rank, scale, .. } = sample;
    let &Module { d, k, has_bias, .. } = module;
    // PEFT's output form would scale a bias too, which isn't supported.
    let layer = if sample.layer == "ia3" && has_bias { "ia3_feedforward" } else { sample.layer };
    made_up(&mut Random::new(seed, &["adapter", name, &module.path]), (layer, rank, scale), d, k)
}

/// A module's part of an adapter of this built-in layer, rank and LoRA's s.
pub(crate) fn made_up(
    random: &mut Random,
    (layer, rank, scale): (&'static str, usize, f32),
    d: usize,
    k: usize,
) -> AdapterModule {
    let mut operand = |shape: Vec<usize>, centre: f32, half_width: f32| {
        let count = shape.iter().fold(1, |count, extent| product(count, *extent));
        Operand { shape, values: random.around(centre, half_width, count) }
    };
    let narrow = 1.0 / (d as f32).sqrt();
    // What an adapter is like after a little training: near the base layer, and for fLoRA b @ a near ones (§4).
    let operands = match layer {
        "lora" | "dora" => {
            let mut operands = BTreeMap::from([
                ("b", operand(vec![d, rank], 0.0, narrow)),
                ("a", operand(vec![rank, k], 0.0, 0.05)),
                ("s", Operand { shape: Vec::new(), values: vec![scale] }),
            ]);
            if layer == "dora" {
                operands.insert("m", operand(vec![k], 1.0, 0.5));
            }
            operands
        }
        "hira" => BTreeMap::from([("b", operand(vec![d, rank], 0.0, 0.3)), ("a", operand(vec![rank, k], 0.0, 0.3))]),
        "flora" | "flora_mean" => {
            let share = if layer == "flora_mean" { 1.0 } else { 1.0 / rank as f32 };
            BTreeMap::from([("b", operand(vec![d, rank], 1.0, 0.1)), ("a", operand(vec![rank, k], share, 0.1 * share))])
        }
        "ia3_feedforward" => BTreeMap::from([("l", operand(vec![d], 1.0, 0.1))]),
        _ => BTreeMap::from([("l", operand(vec![k], 1.0, 0.1))]),
    };
    let operands = operands.into_iter().map(|(name, operand): (&str, Operand)| (name.to_owned(), operand)).collect();
    AdapterModule { layer: layer.to_owned(), rank, operands }
}

/// Rows of the 32 requests: most decode one token, ten bring a prompt.
const ROWS: [u32; 32] =
    [1, 1, 1, 33, 1, 1, 7, 1, 1, 1, 24, 1, 1, 48, 1, 1, 5, 1, 1, 12, 1, 1, 1, 17, 1, 1, 20, 1, 1, 9, 1, 64];

/// A batch of 32 requests: every adapter and the base in turn, in a shuffled order.
pub(super) fn batch<'a>(names: impl Iterator<Item = &'a str>, seed: u64) -> Batch {
    let mut choices: Vec<Option<&str>> = names.map(Some).chain([None]).collect();
    let Random(mut order) = Random::new(seed, &["batch"]);
    let mut adapters = Vec::new();
    while adapters.len() < ROWS.len() {
        order.shuffle(&mut choices);
        adapters.extend_from_slice(&choices);
    }
    Batch::new(adapters.into_iter().zip(ROWS))
}
