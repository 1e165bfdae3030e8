//! From a verified equation to the one form that every lowering computes.

mod compose;
mod derivation;
mod fold;
mod layout;
mod normalize;
mod obstacle;
mod pattern;
mod read;
pub mod rules;
mod sparse_parts;

pub use compose::ComposeError;
pub use derivation::{Derivation, Step};
pub use fold::FoldError;
pub use layout::{FoldedLayout, RowScales};
pub(crate) use layout::{Folding, Pair};
pub use normalize::{MAX_STEPS, Normalized, normalize};
pub use obstacle::{NormalizeError, Obstacle};
pub use read::MAX_TERMS;
pub use rules::{Rule, rules};
pub use sparse_parts::{SparseParts, SparseProduct};

use std::collections::BTreeSet;

use crate::arena::Handle;
use crate::layer::{Activation, Node, Operand, Reduce};
use crate::verify::VerifiedLayer;

/// What every adapted linear layer is rewritten to: y = φ(Σ terms + offset + bias) + residual. Every `Handle<Node>` points into
/// `layer` and depends on adapters, base weight and constants alone, never on the input or the residual, so it is computed
/// once, when an adapter is loaded.
#[derive(Clone, Debug)]
pub struct NormalForm {
    /// The rewritten layer that the handles point into.
    pub layer: VerifiedLayer,
    /// x, `[tokens, d]`.
    pub input: Handle<Operand>,
    /// w0, `[d, k]`.
    pub base_weight: Handle<Operand>,
    /// What is summed.
    pub terms: Vec<Term>,
    /// The vectors `[k]` and numbers that each adapter adds to its rows, a bias of its own: their sum.
    pub offset: Vec<Handle<Node>>,
    /// A shared vector `[k]`.
    pub bias: Option<Handle<Operand>>,
    /// φ
    pub activation: Activation,
    /// A row for each token, `[tokens, k]`.
    pub residual: Option<Handle<Operand>>,
}

/// What becomes of the sum of the terms before it is written, once: φ(sum + bias) + residual.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Hash)]
pub struct Epilogue {
    /// Whether a shared vector `[k]` is added.
    pub bias: bool,
    /// φ
    pub activation: Activation,
    /// Whether a matrix `[tokens, k]` is added after φ.
    pub residual: bool,
}

impl Epilogue {
    /// Whether the sum is written as it is.
    pub fn is_identity(self) -> bool {
        self == Self::default()
    }
}

/// One summand: `outer ∘ core(inner ∘ x)`.
#[derive(Clone, Debug, PartialEq)]
pub struct Term {
    /// A vector `[d]` or scalar that scales the input; `None` is 1.
    pub inner: Option<Handle<Node>>,
    /// A vector `[k]` or scalar that scales the output; `None` is 1.
    pub outer: Option<Handle<Node>>,
    /// What maps `[tokens, d]` to `[tokens, k]`.
    pub core: Core,
}

/// The linear map of a [`Term`].
#[derive(Clone, Copy, Debug, PartialEq)]
pub enum Core {
    /// x @ w0
    Base,
    /// Σ_r (or mean_r) a_r ∘ ((b_r ∘ x) @ w0), Eq. 5.
    Multiplicative {
        /// `[d, r]`
        b: Handle<Node>,
        /// `[r, k]`
        a: Handle<Node>,
        /// Sum or mean over the rank.
        reduce: Reduce,
    },
    /// (x @ b) @ a, paper A.2.
    Additive {
        /// `[d, r]`
        b: Handle<Node>,
        /// `[r, k]`
        a: Handle<Node>,
        /// Sum or mean over the rank.
        reduce: Reduce,
    },
    /// (x @ t) @ w0, t `[d, d]` sparse. No other term reads x but sparse ones.
    TransformedInputs(Handle<Node>),
    /// (x @ w0) @ t, t `[k, k]` sparse. No other term reads x but sparse ones.
    TransformedOutputs(Handle<Node>),
    /// x @ first, or (x @ first) @ second, both sparse.
    Sparse {
        /// `[d, k]`, or `[d, q]` before a second.
        first: Handle<Node>,
        /// `[q, k]`
        second: Option<Handle<Node>>,
    },
}

impl Core {
    /// What it reads that is known when an adapter is loaded.
    pub(crate) fn values(self) -> impl Iterator<Item = Handle<Node>> {
        let [first, second] = match self {
            Core::Base => [None, None],
            Core::Multiplicative { b, a, .. } | Core::Additive { b, a, .. } => [Some(b), Some(a)],
            Core::TransformedInputs(matrix) | Core::TransformedOutputs(matrix) => [Some(matrix), None],
            Core::Sparse { first, second } => [Some(first), second],
        };
        first.into_iter().chain(second)
    }
}

impl NormalForm {
    /// What becomes of the sum of the terms.
    pub fn epilogue(&self) -> Epilogue {
        Epilogue { bias: self.bias.is_some(), activation: self.activation, residual: self.residual.is_some() }
    }

    /// The scales and factors of all terms, each node once, in the order of the arena: what [`fold`](Self::fold) evaluates
    /// when an adapter is loaded.
    pub fn load_time_values(&self) -> Vec<Handle<Node>> {
        Vec::from_iter(BTreeSet::from_iter(self.values_of_terms().chain(self.offset.iter().copied())))
    }

    /// The scales and factors of all terms.
    pub(crate) fn values_of_terms(&self) -> impl Iterator<Item = Handle<Node>> {
        self.terms.iter().flat_map(|term| term.inner.into_iter().chain(term.outer).chain(term.core.values()))
    }

    /// Whether adapters multiply rows by sparse matrices.
    pub fn is_sparse(&self) -> bool {
        let is_sparse =
            |core| matches!(core, Core::TransformedInputs(_) | Core::TransformedOutputs(_) | Core::Sparse { .. });
        self.terms.iter().any(|term| is_sparse(term.core))
    }

    /// Whether a load-time value depends on w0, as DoRA's norm does: only then does [`fold`](Self::fold) need it bound.
    pub fn reads_base_weight(&self) -> bool {
        let layer = self.layer.layer();
        self.load_time_values().into_iter().any(|value| layer.depends_on(value, self.base_weight))
    }
}

/// An adapter in the form the kernels read, every scale, mean and norm folded in, for one base weight `[d, k]`:
///
/// ```text
/// y = φ( Σ_v out_v ∘ ((in_v ∘ x) @ w0)  +  Σ_q (x · shrink_q) expand_q  +  bias )  +  residual
/// ```
///
/// Where it has [`SparseParts`], the two sums read x @ inputs, become sum @ outputs, and the products of x are added to that.
#[derive(Clone, Debug, Default, PartialEq)]
pub struct FoldedAdapter {
    /// One GEMM row each per token. A base row has one without scales; IA3 one with a scale; fLoRA of rank r has r; HiRA r + 1.
    pub virtual_rows: Vec<VirtualRow>,
    /// The additive low-rank part; its length is the rank.
    pub low_rank: Vec<RankOne>,
    /// What rows are multiplied by beside that. No kernel reads it.
    pub sparse: SparseParts,
}

/// `out ∘ ((in ∘ x) @ w0)`
#[derive(Clone, Debug, Default, PartialEq)]
pub struct VirtualRow {
    /// `[d]`, or `None` for all ones.
    pub in_scale: Option<Vec<f32>>,
    /// `[k]`, or `None` for all ones.
    pub out_scale: Option<Vec<f32>>,
}

/// `(x · shrink) expand`
#[derive(Clone, Debug, PartialEq)]
pub struct RankOne {
    /// `[d]`
    pub shrink: Vec<f32>,
    /// `[k]`
    pub expand: Vec<f32>,
}
