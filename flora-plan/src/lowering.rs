//! The legal ways to compute the parts of an adapted linear, as one table.

use std::collections::BTreeSet;

use flora_ir::algebra::{Core, NormalForm};
use serde::{Deserialize, Serialize};

/// The name of a lowering, in tables, files and on the command line: how a part of an adapter is computed. [`PartLowering`] says
/// which parts it computes.
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
    /// The matmul of the rows of the one adapter whose W_i is resident.
    Merged,
}

/// How scaled virtual rows are computed: [`Part::Multiplicative`].
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
pub enum MultiplicativeLowering {
    /// [`Lowering::Stacked`]
    Stacked,
    /// [`Lowering::OnChip`]
    OnChip,
    /// [`Lowering::Bmm`] over W_i in global memory.
    Bmm,
}

/// How the low-rank sum is computed: [`Part::Additive`].
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
pub enum AdditiveLowering {
    /// [`Lowering::Fused`]
    Fused,
    /// [`Lowering::Segmented`]
    Segmented,
    /// [`Lowering::Bmm`] over padded low-rank factors.
    Bmm,
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

/// A part with a lowering that computes it; no other pair of the two can be written down.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
pub enum PartLowering {
    /// Scaled virtual rows by themselves.
    Multiplicative(MultiplicativeLowering),
    /// The low-rank sum by itself.
    Additive(AdditiveLowering),
    /// The part, with the other one, by the resident W_i.
    Merged(Part),
}

/// A row of the table: a part with a lowering that computes it, and what that does.
#[derive(Clone, Copy, Debug)]
pub struct Row {
    /// The part and the lowering.
    pub computes: PartLowering,
    /// One line for people.
    pub summary: &'static str,
}

/// Every lowering of every part. A new lowering is a variant above and a row here; the compiler names the places that have to
/// think of it.
pub const TABLE: [Row; 8] = [
    Row {
        computes: PartLowering::Multiplicative(MultiplicativeLowering::Stacked),
        summary: "one GEMM over r virtual rows a token, scaled on load and reduced in the epilogue (Eq. 6)",
    },
    Row {
        computes: PartLowering::Multiplicative(MultiplicativeLowering::OnChip),
        summary: "one GEMM whose tiles of w0 become w0 ∘ (b_i a_i) where they are multiplied",
    },
    Row {
        computes: PartLowering::Multiplicative(MultiplicativeLowering::Bmm),
        summary: "W_i = w0 ∘ (b_i a_i) in global memory, then a batched matmul",
    },
    Row {
        computes: PartLowering::Merged(Part::Multiplicative),
        summary: "the matmul of the one adapter whose W_i is resident",
    },
    Row {
        computes: PartLowering::Additive(AdditiveLowering::Fused),
        summary: "one GEMM: shrink in its main loop, expand in its epilogue, the output written once",
    },
    Row {
        computes: PartLowering::Additive(AdditiveLowering::Segmented),
        summary: "base GEMM, then shrink and expand grouped by segment, ranks not padded",
    },
    Row {
        computes: PartLowering::Additive(AdditiveLowering::Bmm),
        summary: "base GEMM, then two batched matmuls padded to the largest rank (A.2)",
    },
    Row {
        computes: PartLowering::Merged(Part::Additive),
        summary: "the matmul of the one adapter whose W_i is resident",
    },
];

impl Row {
    /// The lowering.
    pub fn lowering(&self) -> Lowering {
        self.computes.lowering()
    }

    /// The part.
    pub fn part(&self) -> Part {
        self.computes.part()
    }
}

impl MultiplicativeLowering {
    /// In the table's order.
    pub const ALL: [Self; 3] = [Self::Stacked, Self::OnChip, Self::Bmm];

    /// Its name in the table.
    pub fn lowering(self) -> Lowering {
        match self {
            Self::Stacked => Lowering::Stacked,
            Self::OnChip => Lowering::OnChip,
            Self::Bmm => Lowering::Bmm,
        }
    }

    /// Whether W_i is made in global memory. It holds the additive part of its adapter, too.
    pub fn materialises(self) -> bool {
        match self {
            Self::Stacked | Self::OnChip => false,
            Self::Bmm => true,
        }
    }
}

impl AdditiveLowering {
    /// In the table's order.
    pub const ALL: [Self; 3] = [Self::Fused, Self::Segmented, Self::Bmm];

    /// Its name in the table.
    pub fn lowering(self) -> Lowering {
        match self {
            Self::Fused => Lowering::Fused,
            Self::Segmented => Lowering::Segmented,
            Self::Bmm => Lowering::Bmm,
        }
    }

    /// Whether the sums are added to rows that a launch before has written.
    pub fn adds_later(self) -> bool {
        match self {
            Self::Fused => false,
            Self::Segmented | Self::Bmm => true,
        }
    }
}

impl PartLowering {
    /// The lowering of that name, for this part; `None` where it doesn't compute it.
    pub fn find(part: Part, lowering: Lowering) -> Option<Self> {
        lowerings_of(part).map(|row| row.computes).find(|computes| computes.lowering() == lowering)
    }

    /// The lowering.
    pub fn lowering(self) -> Lowering {
        match self {
            Self::Multiplicative(lowering) => lowering.lowering(),
            Self::Additive(lowering) => lowering.lowering(),
            Self::Merged(_) => Lowering::Merged,
        }
    }

    /// The part.
    pub fn part(self) -> Part {
        match self {
            Self::Multiplicative(_) => Part::Multiplicative,
            Self::Additive(_) => Part::Additive,
            Self::Merged(part) => part,
        }
    }
}

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
        TABLE.iter().map(Row::lowering).find(|lowering| lowering.name() == name)
    }
}

impl std::fmt::Display for Lowering {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.pad(self.name())
    }
}

impl std::fmt::Display for MultiplicativeLowering {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        self.lowering().fmt(f)
    }
}

impl std::fmt::Display for AdditiveLowering {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        self.lowering().fmt(f)
    }
}

/// The rows of [`TABLE`] that compute `part`.
pub fn lowerings_of(part: Part) -> impl Iterator<Item = &'static Row> {
    TABLE.iter().filter(move |row| row.part() == part)
}

/// The parts that an adapter of this form has. Empty for a plain linear.
pub fn parts_of(linear: &NormalForm) -> Vec<Part> {
    // Of rank 0 the pairs would be missing.
    let layout = linear.layout(1);
    let multiplicative = !layout.virtual_rows.is_empty() && !layout.is_plain();
    let parts = [(multiplicative, Part::Multiplicative), (layout.low_rank > 0, Part::Additive)];
    parts.into_iter().filter_map(|(has, part)| has.then_some(part)).collect()
}

/// What an adapter's sparse matrices do to its rows beside the launch over the base weight. There is one way to compute each, the
/// processor's, and it costs the same under every plan: a multiply-add an entry and row.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash, PartialOrd, Ord, Serialize, Deserialize)]
#[serde(rename_all = "snake_case")]
pub enum SparsePass {
    /// x @ t, before the launch.
    Inputs,
    /// y @ t, behind it.
    Outputs,
    /// x @ s, added to what it gives.
    Added,
}

impl SparsePass {
    /// What explanations call each.
    pub const NAME: &'static str = "sparse";

    /// One line for people.
    pub fn summary(self) -> &'static str {
        match self {
            SparsePass::Inputs => "x @ t by the entries of t, before the base GEMM",
            SparsePass::Outputs => "y @ t by the entries of t, after the base GEMM",
            SparsePass::Added => "x @ s by the entries of s, added to the base GEMM",
        }
    }
}

/// The passes of an adapter of this form, each once.
pub fn sparse_passes_of(linear: &NormalForm) -> BTreeSet<SparsePass> {
    let pass = |core| match core {
        Core::TransformedInputs(_) => Some(SparsePass::Inputs),
        Core::TransformedOutputs(_) => Some(SparsePass::Outputs),
        Core::Sparse { .. } => Some(SparsePass::Added),
        Core::Base | Core::Multiplicative { .. } | Core::Additive { .. } => None,
    };
    linear.terms.iter().filter_map(|term| pass(term.core)).collect()
}

#[cfg(test)]
mod tests {
    use super::*;

    /// The lowerings of a part in the table's order, and those that its enum has.
    #[test]
    fn the_table_has_every_lowering_once() {
        let of = |part| lowerings_of(part).map(|row| row.computes).collect::<Vec<_>>();
        let multiplicative = MultiplicativeLowering::ALL.map(PartLowering::Multiplicative);
        assert_eq!(
            of(Part::Multiplicative),
            [&multiplicative[..], &[PartLowering::Merged(Part::Multiplicative)]].concat()
        );
        let additive = AdditiveLowering::ALL.map(PartLowering::Additive);
        assert_eq!(of(Part::Additive), [&additive[..], &[PartLowering::Merged(Part::Additive)]].concat());
        assert_eq!(of(Part::Multiplicative).len() + of(Part::Additive).len(), TABLE.len());
    }

    /// `ALL` has every variant: a new one is a compile error here first.
    #[test]
    fn all_are_all() {
        let multiplicative = |lowering| match lowering {
            MultiplicativeLowering::Stacked => 0,
            MultiplicativeLowering::OnChip => 1,
            MultiplicativeLowering::Bmm => 2,
        };
        assert_eq!(MultiplicativeLowering::ALL.map(multiplicative), [0, 1, 2]);
        let additive = |lowering| match lowering {
            AdditiveLowering::Fused => 0,
            AdditiveLowering::Segmented => 1,
            AdditiveLowering::Bmm => 2,
        };
        assert_eq!(AdditiveLowering::ALL.map(additive), [0, 1, 2]);
    }

    #[test]
    fn a_name_is_found_for_the_parts_that_it_computes() {
        for row in &TABLE {
            assert_eq!(Lowering::from_name(row.lowering().name()), Some(row.lowering()));
            assert_eq!(PartLowering::find(row.part(), row.lowering()), Some(row.computes));
        }
        assert_eq!(PartLowering::find(Part::Additive, Lowering::Stacked), None);
        assert_eq!(PartLowering::find(Part::Multiplicative, Lowering::Segmented), None);
    }
}
