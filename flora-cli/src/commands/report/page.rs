//! What the page says, before it is laid out: plain data that the inputs are turned into and nothing else is asked for.

use flora_plan::cost::FitError;

use crate::commands::bench::paper::{Coordinates, Crossing, Curves, Record};
use crate::commands::bench::serving_answer::Answer;

/// Everything on the page; what wasn't given is empty.
#[derive(Clone, Debug, Default, PartialEq)]
pub(super) struct Page {
    /// The cost model's coefficients.
    pub(super) model: Option<Model>,
    /// The paper's analysis, a panel for every layer, batch and choice of types.
    pub(super) paper: Vec<PaperPanel>,
    /// The planner's choices held against measurements.
    pub(super) planner: Vec<Regret>,
    /// The serving experiments.
    pub(super) serving: Vec<Answer>,
}

/// What `flora tune` measured.
#[derive(Clone, Debug, PartialEq)]
pub(super) struct Model {
    /// The device's fingerprint.
    pub(super) device: String,
    /// The version that measured.
    pub(super) flora: String,
    /// c0
    pub(super) seconds_per_launch: f64,
    pub(super) launch_spread: f64,
    /// The effective bandwidth.
    pub(super) bytes_per_second: f64,
    pub(super) bandwidth_spread: f64,
    pub(super) formats: Vec<Format>,
}

/// The kernels for one choice of types.
#[derive(Clone, Debug, PartialEq)]
pub(super) struct Format {
    /// activations/adapters/weight
    pub(super) name: String,
    pub(super) kernels: Vec<KernelPoints>,
    /// How far predictions were off on batches that the points weren't made from.
    pub(super) error: Option<FitError>,
}

/// The measured points of a kernel.
#[derive(Clone, Debug, PartialEq)]
pub(super) struct KernelPoints {
    /// As the tuning file has it.
    pub(super) name: String,
    /// Whether its MACs are those of rows by W0 or W_i; those of other kernels are of low-rank sums, timed as what they add.
    pub(super) multiplies_weight: bool,
    pub(super) points: Vec<Point>,
}

/// A measured point of a kernel; a coordinate that its time doesn't depend on is `None`.
#[derive(Clone, Debug, PartialEq)]
pub(super) struct Point {
    /// Rows of the batch, or of an adapter.
    pub(super) rows: u64,
    pub(super) rank: Option<u64>,
    /// Adapters in the batch.
    pub(super) adapters: Option<u64>,
    /// √(d·k) of the layer.
    pub(super) extent: u64,
    pub(super) seconds_per_mac: f64,
    /// Multiply-accumulates for each byte of global memory.
    pub(super) macs_per_byte: f64,
    /// (largest − smallest) / median over the passes.
    pub(super) spread: f64,
}

/// Throughput against rank at one layer.
#[derive(Clone, Debug, PartialEq)]
pub(super) struct PaperPanel {
    pub(super) coordinates: Coordinates,
    pub(super) base_seconds: f64,
    /// As measured, the base GEMM's too.
    pub(super) records: Vec<Record>,
    pub(super) measured: Curves,
    /// What the cost model says.
    pub(super) prediction: Prediction,
}

/// What the cost model says of a panel.
#[derive(Clone, Debug, PartialEq)]
pub(super) enum Prediction {
    /// Nothing, for this reason.
    None(&'static str),
    /// Times, and Eq. 7.
    Of { curves: Curves, eq7: CriticalRank },
}

/// Eq. 7 solved for the rank, within the ranks that were measured.
#[derive(Clone, Copy, Debug, PartialEq)]
pub(super) struct CriticalRank {
    /// Up to which fLoRA by `stacked` is cheaper than LoRA by `bmm`.
    pub(super) rank: Crossing,
    /// Seconds per MAC of batched low-rank matmuls of that rank.
    pub(super) c1: f64,
    /// Seconds per MAC of the base GEMM.
    pub(super) c2: f64,
}

/// What `flora bench planner` measured. A regret is a share: 0.03 is 3 % slower than the fastest candidate.
#[derive(Clone, Debug, PartialEq, serde::Deserialize)]
pub(super) struct Regret {
    pub(super) device: String,
    pub(super) format: String,
    pub(super) points: u64,
    /// The share of points at which the chosen lowering is the fastest.
    pub(super) top1: f64,
    pub(super) mean_regret: f64,
    pub(super) p95_regret: f64,
    pub(super) max_regret: f64,
    /// |predicted / measured − 1| of the chosen plans, where it was asked for.
    pub(super) median_error: Option<f64>,
    /// The worst results, worst first.
    pub(super) worst: Vec<Choice>,
    pub(super) results: Vec<Choice>,
}

/// A point of the planner's grid.
#[derive(Clone, Debug, PartialEq, serde::Deserialize)]
pub(super) struct Choice {
    pub(super) d: u32,
    pub(super) k: u32,
    pub(super) tokens: u32,
    pub(super) segments: u32,
    pub(super) rank: u32,
    pub(super) adapter: String,
    /// Whether segments have adapters in common.
    pub(super) shared: bool,
    /// Distinct ones, where that is known.
    pub(super) adapters: Option<u32>,
    pub(super) chosen: String,
    pub(super) fastest: String,
    pub(super) regret: f64,
    pub(super) candidates: Vec<Candidate>,
}

/// A lowering at a point of the planner's grid.
#[derive(Clone, Debug, PartialEq, serde::Deserialize)]
pub(super) struct Candidate {
    pub(super) lowering: String,
    pub(super) predicted_seconds: f64,
    pub(super) seconds: f64,
}
