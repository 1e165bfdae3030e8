//! What the engine is given besides a schedule and its rows.

use flora_plan::layer::Epilogue;

use crate::values::Values;
use crate::weight::Weight;

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
