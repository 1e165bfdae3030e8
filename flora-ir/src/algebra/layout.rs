//! Which virtual rows a normal form has, and which of them have scales, before there are numbers. Folding, pricing and emitting
//! go by this one account, so that what is priced is what runs.

use super::{Core, FoldedAdapter, NormalForm, Term};
use crate::arena::Handle;
use crate::evaluate::{Bindings, evaluate_graph};
use crate::layer::{Node, Reduce};
use crate::types::{Dimension, Shape};

/// The vectors of a folded adapter without their numbers.
#[derive(Clone, Debug, Default, PartialEq, Eq, Hash)]
pub struct FoldedLayout {
    /// One for each of [`FoldedAdapter::virtual_rows`].
    pub virtual_rows: Vec<RowScales>,
    /// The length of [`FoldedAdapter::low_rank`].
    pub low_rank: usize,
}

/// Which scales a virtual row has.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Hash)]
pub struct RowScales {
    /// Whether a vector `[d]` scales the input.
    pub in_scale: bool,
    /// Whether a vector `[k]` scales the output.
    pub out_scale: bool,
}

impl FoldedLayout {
    /// Whether the virtual part is exactly x @ w0.
    pub fn is_plain(&self) -> bool {
        matches!(self.virtual_rows[..], [RowScales { in_scale: false, out_scale: false }])
    }
}

impl FoldedAdapter {
    /// Which vectors this adapter has.
    pub fn layout(&self) -> FoldedLayout {
        let scales = self
            .virtual_rows
            .iter()
            .map(|row| RowScales { in_scale: row.in_scale.is_some(), out_scale: row.out_scale.is_some() });
        FoldedLayout { virtual_rows: scales.collect(), low_rank: self.low_rank.len() }
    }
}

/// What terms become when they are folded, in the order of the folded vectors.
pub(crate) enum Folding<'a> {
    /// The base terms whose input is scaled by no vector: one virtual row, scaled by the sum of their scales
    /// unless the equation says that it is 1.
    SharedRow { terms: Vec<&'a Term>, out_scale: bool },
    /// A base term whose input is scaled by a vector. A scalar on the output goes into that vector.
    ScaledRow { term: &'a Term, out_scale: bool },
    /// A virtual row for each rank of the pair.
    RankRows { term: &'a Term, pair: Pair },
    /// A low-rank pair of vectors for each rank of the pair.
    LowRank { term: &'a Term, pair: Pair },
    /// A virtual row whose input or output is multiplied by a sparse matrix. A scale that isn't the virtual row's goes into that.
    Transformed { term: &'a Term, matrix: Handle<Node>, row: RowScales },
    /// Sparse matrices that x is multiplied by.
    Sparse { term: &'a Term, first: Handle<Node>, second: Option<Handle<Node>> },
}

/// The two factors of a term.
#[derive(Clone, Copy)]
pub(crate) struct Pair {
    /// `[d, r]`
    pub(crate) b: Handle<Node>,
    /// `[r, k]`
    pub(crate) a: Handle<Node>,
    pub(crate) reduce: Reduce,
}

impl NormalForm {
    /// What [`fold`](Self::fold) makes of the terms.
    pub(crate) fn foldings(&self) -> Vec<Folding<'_>> {
        let is_vector = |node: Handle<Node>| self.layer.type_of(node).shape != Shape::Scalar;
        let is_shared = |term: &&Term| term.core == Core::Base && !term.inner.is_some_and(is_vector);
        let shared: Vec<&Term> = self.terms.iter().filter(is_shared).collect();
        let out_scale = self.constant_sum(&shared) != Some(1.0);
        let first = (!shared.is_empty()).then_some(Folding::SharedRow { terms: shared, out_scale });
        let others = self.terms.iter().filter(|term| !is_shared(term)).map(|term| match term.core {
            Core::Base => Folding::ScaledRow { term, out_scale: term.outer.is_some_and(is_vector) },
            Core::Multiplicative { b, a, reduce } => Folding::RankRows { term, pair: Pair { b, a, reduce } },
            Core::Additive { b, a, reduce } => Folding::LowRank { term, pair: Pair { b, a, reduce } },
            Core::TransformedInputs(matrix) => {
                let row = RowScales { in_scale: false, out_scale: term.outer.is_some_and(is_vector) };
                Folding::Transformed { term, matrix, row }
            }
            Core::TransformedOutputs(matrix) => {
                let row = RowScales { in_scale: term.inner.is_some_and(is_vector), out_scale: false };
                Folding::Transformed { term, matrix, row }
            }
            Core::Sparse { first, second } => Folding::Sparse { term, first, second },
        });
        first.into_iter().chain(others).collect()
    }

    /// The sum of the scales of `terms`, where the equation itself writes all of them as numbers.
    fn constant_sum(&self, terms: &[&Term]) -> Option<f64> {
        let layer = self.layer.layer();
        let constant = |node: Option<Handle<Node>>| match node {
            None => Some(1.0),
            // A value that reads an operand can't be evaluated without one.
            Some(node) => match evaluate_graph(layer, &[node], &Bindings::new()).ok()?.first()?.data() {
                [scalar] => Some(*scalar),
                _ => None,
            },
        };
        terms.iter().map(|term| Some(constant(term.inner)? * constant(term.outer)?)).sum()
    }

    /// The vectors that [`fold`](Self::fold) gives of an adapter of rank `rank`. A pair whose rank the equation itself writes
    /// as a number has that rank; one of pairs has the product of theirs.
    pub fn layout(&self, rank: usize) -> FoldedLayout {
        let rank_of = |pair: Pair| match &self.layer.type_of(pair.b).shape {
            Shape::Matrix(_, columns) => extent(columns, rank),
            _ => rank,
        };
        let mut layout = FoldedLayout::default();
        for folding in self.foldings() {
            match folding {
                Folding::SharedRow { out_scale, .. } => {
                    layout.virtual_rows.push(RowScales { in_scale: false, out_scale });
                }
                Folding::ScaledRow { out_scale, .. } => {
                    layout.virtual_rows.push(RowScales { in_scale: true, out_scale });
                }
                Folding::RankRows { pair, .. } => {
                    let row = RowScales { in_scale: true, out_scale: true };
                    layout.virtual_rows.extend(std::iter::repeat_n(row, rank_of(pair)));
                }
                Folding::LowRank { pair, .. } => layout.low_rank = layout.low_rank.saturating_add(rank_of(pair)),
                Folding::Transformed { row, .. } => layout.virtual_rows.push(row),
                Folding::Sparse { .. } => {}
            }
        }
        layout
    }

    /// Whether the output of the base weight is scaled or transformed. For a layer with a bias it then has to be said what becomes
    /// of that.
    pub fn scales_base_output(&self) -> bool {
        self.terms.iter().any(|term| match term.core {
            Core::Base | Core::Multiplicative { .. } | Core::TransformedInputs(_) => term.outer.is_some(),
            Core::TransformedOutputs(_) => true,
            Core::Additive { .. } | Core::Sparse { .. } => false,
        })
    }
}

/// The extent of a dimension that is made of ranks, where a rank that has a name is `rank`.
fn extent(dimension: &Dimension, rank: usize) -> usize {
    match dimension {
        Dimension::Fixed(extent) => usize::try_from(*extent).unwrap_or(usize::MAX),
        Dimension::Product(first, second) => extent(first, rank).saturating_mul(extent(second, rank)),
        Dimension::Symbol(_) | Dimension::Tokens => rank,
    }
}
