//! Rotary position embedding in Hugging Face's order: pair i of a head is (i, i + size/2).

use std::ops::Range;

use burn::tensor::Tensor;
use flora_burn::{BurnDevice, FloraBackend, TensorError};
use flora_host::decoder::{Heads, RotaryFrequencies};
use flora_plan::layer::Element;

/// What turns a step's queries and keys.
#[derive(Clone, Debug)]
pub(crate) struct RotaryRows<B: FloraBackend> {
    queries: Turn<B>,
    keys: Turn<B>,
}

/// Cosines and sines `[rows, heads, size]`, the same for every head and for both halves but for the sign of the first's sines: a
/// product of equal shapes is quicker than one that repeats an operand, and every layer of a step takes it.
#[derive(Clone, Debug)]
struct Turn<B: FloraBackend> {
    cosines: Tensor<B, 3>,
    sines: Tensor<B, 3>,
}

impl<B: FloraBackend> RotaryRows<B> {
    /// Angles are taken on the processor, in f64: a step needs them once, for all layers.
    pub(crate) fn new(
        device: &BurnDevice<B>,
        frequencies: &RotaryFrequencies,
        positions: &[usize],
        heads: Heads,
        element: Element,
    ) -> Result<Self, TensorError> {
        let rows = frequencies.rows(positions);
        let upload = |values: &[f32]| -> Result<Tensor<B, 3>, TensorError> {
            device.upload(values, [positions.len(), 1, rows.pairs()], element)
        };
        let (cosines, sines) = (upload(rows.cosines())?, upload(rows.sines())?);
        let cosines = Tensor::cat(vec![cosines.clone(), cosines], 2);
        let sines = Tensor::cat(vec![sines.clone().neg(), sines], 2);
        let turn = |heads: usize| Turn {
            cosines: cosines.clone().repeat_dim(1, heads),
            sines: sines.clone().repeat_dim(1, heads),
        };
        Ok(Self { queries: turn(heads.queries), keys: turn(heads.keys) })
    }

    /// Rotates queries and keys, `[rows, their heads, size]` each.
    pub(crate) fn rotate(&self, queries: Tensor<B, 3>, keys: Tensor<B, 3>) -> (Tensor<B, 3>, Tensor<B, 3>) {
        (self.queries.of(queries), self.keys.of(keys))
    }
}

impl<B: FloraBackend> Turn<B> {
    /// (a, b) becomes (a · cos − b · sin, b · cos + a · sin).
    fn of(&self, x: Tensor<B, 3>) -> Tensor<B, 3> {
        let [rows, heads, size] = x.dims();
        let half = |columns: Range<usize>| x.clone().slice([0..rows, 0..heads, columns]);
        let swapped = Tensor::cat(vec![half(size / 2..size), half(0..size / 2)], 2);
        x * self.cosines.clone() + swapped * self.sines.clone()
    }
}
