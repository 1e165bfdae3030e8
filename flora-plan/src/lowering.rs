//! The legal ways to compute the parts of an adapted linear, as one table.

use flora_ir::algebra::NormalForm;
use serde::{Deserialize, Serialize};

/// How one part of an adapter is computed.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash, PartialOrd, Ord, Serialize, Deserialize)]
#[serde(rename_all = "snake_case")]
pub enum Lowering {
    /// Paper Eq. 6: one GEMM over virtual rows.
    Stacked,
    /// W_i made tile by tile where it is multiplied, never in global memory.
    OnChip,
    /// A batched matmul: over W_i made in global memory (multiplicative), or over padded low-rank factors (additive, A.2).
    Bmm,
    /// LoRA inside the base GEMM: shrink in its main loop, expand in its epilogue.
    Fused,
    /// Shrink and expand grouped by segment, ranks not padded.
    Segmented,
    /// One adapter owns the batch and its W_i is resident.
    Merged,
}

/// A part of a folded adapter that is lowered by itself.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash, Serialize, Deserialize)]
#[serde(rename_all = "snake_case")]
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
}

/// Every lowering of every part. A new lowering is a row here, its work in `cost/work.rs`, a step of the schedule, and kernels.
pub const TABLE: [Row; 8] = [
    Row {
        lowering: Lowering::Stacked,
        part: Part::Multiplicative,
        summary: "one GEMM over r virtual rows a token, scaled on load and reduced in the epilogue (Eq. 6)",
    },
    Row {
        lowering: Lowering::OnChip,
        part: Part::Multiplicative,
        summary: "one GEMM whose tiles of w0 become w0 ∘ (b_i a_i) where they are multiplied",
    },
    Row {
        lowering: Lowering::Bmm,
        part: Part::Multiplicative,
        summary: "W_i = w0 ∘ (b_i a_i) in global memory, then a batched matmul",
    },
    Row {
        lowering: Lowering::Merged,
        part: Part::Multiplicative,
        summary: "the matmul of the one adapter whose W_i is resident",
    },
    Row {
        lowering: Lowering::Fused,
        part: Part::Additive,
        summary: "one GEMM: shrink in its main loop, expand in its epilogue, the output written once",
    },
    Row {
        lowering: Lowering::Segmented,
        part: Part::Additive,
        summary: "base GEMM, then shrink and expand grouped by segment, ranks not padded",
    },
    Row {
        lowering: Lowering::Bmm,
        part: Part::Additive,
        summary: "base GEMM, then two batched matmuls padded to the largest rank (A.2)",
    },
    Row {
        lowering: Lowering::Merged,
        part: Part::Additive,
        summary: "the matmul of the one adapter whose W_i is resident",
    },
];

impl Lowering {
    /// The name in the command line, plans and errors.
    pub fn name(self) -> &'static str {
        match self {
            Lowering::Stacked => "stacked",
            Lowering::OnChip => "on_chip",
            Lowering::Bmm => "bmm",
            Lowering::Fused => "fused",
            Lowering::Segmented => "segmented",
            Lowering::Merged => "merged",
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
pub fn parts_of(linear: &NormalForm) -> Vec<Part> {
    // Of rank 0 the pairs would be missing.
    let layout = linear.layout(1);
    let multiplicative = !layout.virtual_rows.is_empty() && !layout.is_plain();
    let parts = [(multiplicative, Part::Multiplicative), (layout.low_rank > 0, Part::Additive)];
    parts.into_iter().filter_map(|(has, part)| has.then_some(part)).collect()
}
