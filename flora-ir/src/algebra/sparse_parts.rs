//! What an adapter does with sparse matrices beside the vectors that kernels read: it transforms the rows that the base weight gets,
//! or those that it gives, or adds products of its own.

use super::fold::{FoldError, wrong};
use crate::sparse::SparseMatrix;

/// The sparse matrices of a [`FoldedAdapter`](super::FoldedAdapter).
#[derive(Clone, Debug, Default, PartialEq)]
pub struct SparseParts {
    /// `[d, d]`: virtual rows and low-rank pairs read x @ this instead of x.
    pub inputs: Option<SparseMatrix>,
    /// `[k, k]`: their sum y becomes y @ this.
    pub outputs: Option<SparseMatrix>,
    /// Products of x itself that are added to that.
    pub added: Vec<SparseProduct>,
}

/// x @ first, or (x @ first) @ second.
#[derive(Clone, Debug, PartialEq)]
pub struct SparseProduct {
    /// `[d, k]`, or `[d, q]` before a second.
    pub first: SparseMatrix,
    /// `[q, k]`
    pub second: Option<SparseMatrix>,
}

impl SparseProduct {
    /// The matrices, in the order in which a row meets them.
    pub fn factors(&self) -> impl Iterator<Item = &SparseMatrix> {
        std::iter::once(&self.first).chain(&self.second)
    }

    /// What is added to the outputs of a row x `[d]`, in f64.
    pub fn times_row(&self, x: &[f64]) -> Vec<f64> {
        let first = self.first.times_row(x);
        self.second.as_ref().map_or(first.clone(), |second| second.times_row(&first))
    }
}

impl SparseParts {
    /// Whether there are none.
    pub fn is_empty(&self) -> bool {
        self.matrices().next().is_none()
    }

    /// All of them.
    pub fn matrices(&self) -> impl Iterator<Item = &SparseMatrix> {
        self.inputs.iter().chain(&self.outputs).chain(self.added.iter().flat_map(SparseProduct::factors))
    }

    /// Their entries: the multiply-adds of a row.
    pub fn entries(&self) -> usize {
        self.matrices().map(SparseMatrix::entries).sum()
    }

    /// Bytes in memory.
    pub fn bytes(&self) -> usize {
        self.matrices().map(SparseMatrix::bytes).sum()
    }

    /// The same with every matrix as `change` makes it.
    #[must_use]
    pub fn map(&self, change: impl Fn(&SparseMatrix) -> SparseMatrix) -> Self {
        let product = |product: &SparseProduct| SparseProduct {
            first: change(&product.first),
            second: product.second.as_ref().map(&change),
        };
        Self {
            inputs: self.inputs.as_ref().map(&change),
            outputs: self.outputs.as_ref().map(&change),
            added: self.added.iter().map(product).collect(),
        }
    }

    /// Those of the adapter that gives dx over w0ᵀ.
    pub(crate) fn adjoint(&self) -> Self {
        let transposed = |matrix: &Option<SparseMatrix>| matrix.as_ref().map(SparseMatrix::transposed);
        let product = |SparseProduct { first, second }: &SparseProduct| match second {
            None => SparseProduct { first: first.transposed(), second: None },
            Some(second) => SparseProduct { first: second.transposed(), second: Some(first.transposed()) },
        };
        Self {
            inputs: transposed(&self.outputs),
            outputs: transposed(&self.inputs),
            added: self.added.iter().map(product).collect(),
        }
    }

    /// Whether the matrices fit a base weight `[d, k]`.
    pub(super) fn check(&self, d: usize, k: usize) -> Result<(), FoldError> {
        let fits = |what, matrix: &SparseMatrix, expected: [usize; 2]| match matrix.shape() == expected {
            true => Ok(()),
            false => Err(wrong(what, &matrix.shape(), &expected)),
        };
        self.inputs.iter().try_for_each(|matrix| fits("what transforms the inputs", matrix, [d, d]))?;
        self.outputs.iter().try_for_each(|matrix| fits("what transforms the outputs", matrix, [k, k]))?;
        self.added.iter().try_for_each(|SparseProduct { first, second }| {
            let inner = second.as_ref().map_or(k, |second| second.shape()[0]);
            fits("a sparse matrix", first, [d, inner])?;
            second.iter().try_for_each(|second| fits("a second sparse matrix", second, [inner, k]))
        })
    }
}
