//! The legal ways to compute an adapted linear, as one table, and the work that each costs.

use flora_ir::algebra::{AdaptedLinear, Core};
use serde::{Deserialize, Serialize};

use crate::batch::{BatchShape, LayerShape};
use crate::cost::{Kernel, Work};

/// How one part of an adapter is computed.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash, PartialOrd, Ord, Serialize, Deserialize)]
#[serde(rename_all = "snake_case")]
pub enum Lowering {
    /// Paper Eq. 6: one GEMM over virtual rows.
    Stacked,
    /// A batched matmul: over W_i made in global memory (multiplicative), or over padded low-rank factors (additive, A.2).
    Bmm,
    /// Shrink and expand grouped by segment, ranks not padded.
    Segmented,
}

/// A part of a folded adapter that is lowered by itself.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
pub enum Part {
    /// Virtual rows with scales: fLoRA, HiRA, IA3.
    Multiplicative,
    /// The low-rank sum: LoRA, DoRA.
    Additive,
}

/// A row of the table: a lowering, the part that it computes, and what it does.
#[derive(Clone, Copy, Debug)]
pub struct Row {
    /// The lowering.
    pub lowering: Lowering,
    /// The part.
    pub part: Part,
    /// One line for people.
    pub summary: &'static str,
    /// The work of this part of a batch.
    pub work: fn(LayerShape, &BatchShape) -> Work,
}

/// Every lowering of every part. A new lowering is a row here, a step of the schedule, and its kernels.
pub const TABLE: [Row; 4] = [
    Row {
        lowering: Lowering::Stacked,
        part: Part::Multiplicative,
        summary: "one GEMM over r virtual rows a token, scaled on load and reduced in the epilogue (Eq. 6)",
        work: stacked_work,
    },
    Row {
        lowering: Lowering::Bmm,
        part: Part::Multiplicative,
        summary: "W_i = w0 ∘ (b_i a_i) in global memory, then a batched matmul",
        work: materialised_work,
    },
    Row {
        lowering: Lowering::Segmented,
        part: Part::Additive,
        summary: "base GEMM, then shrink and expand grouped by segment, ranks not padded",
        work: segmented_work,
    },
    Row {
        lowering: Lowering::Bmm,
        part: Part::Additive,
        summary: "base GEMM, then two batched matmuls padded to the largest rank (A.2)",
        work: low_rank_bmm_work,
    },
];

impl Lowering {
    /// The name in the command line, plans and errors.
    pub fn name(self) -> &'static str {
        match self {
            Lowering::Stacked => "stacked",
            Lowering::Bmm => "bmm",
            Lowering::Segmented => "segmented",
        }
    }

    /// The lowering of that name.
    pub fn from_name(name: &str) -> Option<Self> {
        TABLE.iter().map(|row| row.lowering).find(|lowering| lowering.name() == name)
    }
}

impl std::fmt::Display for Lowering {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.pad(self.name())
    }
}

/// The rows of [`TABLE`] that compute `part`.
pub fn lowerings_of(part: Part) -> impl Iterator<Item = &'static Row> {
    TABLE.iter().filter(move |row| row.part == part)
}

/// The parts that an adapter of this form has. Empty for a plain linear.
pub fn parts_of(linear: &AdaptedLinear) -> Vec<Part> {
    let scaled = |term: &flora_ir::algebra::Term| term.inner.is_some() || term.outer.is_some();
    let base = linear.terms.iter().filter(|term| matches!(term.core, Core::Base));
    let multiplicative = linear.terms.iter().any(|term| matches!(term.core, Core::Multiplicative { .. }))
        || base.clone().any(scaled)
        || base.count() > 1;
    let additive = linear.terms.iter().any(|term| matches!(term.core, Core::Additive { .. }));
    let mut parts = Vec::new();
    if multiplicative {
        parts.push(Part::Multiplicative);
    }
    if additive {
        parts.push(Part::Additive);
    }
    parts
}

const F32: u64 = 4;

/// The GEMM over the rows that need no scale: base rows, and the base part of LoRA rows.
pub(crate) fn plain_work(shape: LayerShape, batch: &BatchShape) -> Work {
    gemm(Kernel::Matmul, shape, batch.plain_rows, batch.plain_rows)
}

fn gemm(kernel: Kernel, shape: LayerShape, rows: u64, regime: u64) -> Work {
    if rows == 0 {
        return Work::default();
    }
    let (d, k) = (u64::from(shape.d), u64::from(shape.k));
    Work::launches(1).and(kernel, regime, rows * d * k, F32 * (d * k + rows * (d + k)))
}

fn stacked_work(shape: LayerShape, batch: &BatchShape) -> Work {
    let group = &batch.multiplicative;
    let (d, k) = (u64::from(shape.d), u64::from(shape.k));
    let mut work = gemm(Kernel::Stacked, shape, group.tokens_times_width, group.tokens_times_width);
    work.add_bytes(F32 * group.widths * (d + k));
    work
}

fn materialised_work(shape: LayerShape, batch: &BatchShape) -> Work {
    let group = &batch.multiplicative;
    let (d, k) = (u64::from(shape.d), u64::from(shape.k));
    let padded = group.adapters * group.longest;
    Work::launches(4)
        .and(
            Kernel::Materialise,
            group.widths / group.adapters.max(1),
            (group.widths + group.adapters) * d * k,
            F32 * (group.adapters + 1) * d * k,
        )
        .and(Kernel::Bmm, group.longest, padded * d * k, F32 * (group.adapters * d * k + padded * (d + k)))
        .and(Kernel::Move, 0, 0, F32 * 2 * (padded * d + padded * k))
}

fn segmented_work(shape: LayerShape, batch: &BatchShape) -> Work {
    let group = &batch.additive;
    let (d, k) = (u64::from(shape.d), u64::from(shape.k));
    Work::launches(2).and(
        Kernel::Segmented,
        group.longest,
        group.tokens_times_width * (d + k),
        F32 * (group.tokens * (d + 2 * k) + group.widths * (d + k) + 2 * group.tokens_times_width),
    )
}

fn low_rank_bmm_work(shape: LayerShape, batch: &BatchShape) -> Work {
    let group = &batch.additive;
    let (d, k) = (u64::from(shape.d), u64::from(shape.k));
    let padded = group.adapters * group.longest;
    let ranks = group.adapters * group.largest_width;
    Work::launches(6)
        .and(
            Kernel::LowRankBmm,
            group.longest,
            padded * group.largest_width * (d + k),
            F32 * (padded * (d + k) + ranks * (d + k) + 2 * padded * group.largest_width),
        )
        .and(Kernel::Move, 0, 0, F32 * 2 * (padded * d + ranks * (d + k)) + F32 * 3 * padded * k)
}
