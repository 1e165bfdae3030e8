//! What the engine is given besides a schedule and its rows.

use flora_plan::layer::Epilogue;

use crate::pack::Vectors;
use crate::values::Values;
use crate::weight::{Strips, Weight};

/// What a layer computes with, apart from the batch.
#[derive(Clone, Copy, Debug)]
pub struct Operands<'a> {
    /// W0 `[d, k]`.
    pub weight: &'a Weight,
    /// `[k]`; needed where the epilogue adds it.
    pub bias: Option<&'a [f32]>,
    /// In-scales and shrink vectors of all adapters, `[slots, d]`.
    pub in_pool: Values<'a>,
    /// Out-scales and expand vectors of all adapters, `[slots, k]`.
    pub out_pool: Values<'a>,
    /// What follows the products.
    pub epilogue: Epilogue,
    /// W_i `[d, k]` of the adapter that a `Merged` step names.
    pub merged: Option<&'a Weight>,
}

/// A layer as passes read it, or its adjoint.
#[derive(Clone, Copy)]
pub(crate) struct Layer<'a> {
    pub(crate) weight: Strips<'a>,
    pub(crate) merged: Option<Strips<'a>>,
    /// `[slots, d]`
    pub(crate) in_pool: Vectors<'a>,
    /// `[slots, k]`
    pub(crate) out_pool: Vectors<'a>,
}

impl<'a> Operands<'a> {
    pub(crate) fn layer(&self) -> Layer<'a> {
        let shape = self.weight.shape();
        Layer {
            weight: self.weight.strips(),
            merged: self.merged.map(Weight::strips),
            in_pool: Vectors::dense(self.in_pool, shape.d as usize),
            out_pool: Vectors::dense(self.out_pool, shape.k as usize),
        }
    }
}

impl Layer<'_> {
    /// The layer over the transposed weight, with the pools exchanged: it gives the gradient of the input.
    pub(crate) fn adjoint(self) -> Self {
        Self {
            weight: self.weight.transposed(),
            merged: self.merged.map(Strips::transposed),
            in_pool: self.out_pool,
            out_pool: self.in_pool,
        }
    }
}
