//! Rotary position embedding in Hugging Face's order: pair i of a head is (i, i + size/2).

use std::ops::Range;

use burn::tensor::{Int, Tensor};
use flora_burn::{BurnDevice, FloraBackend, TensorError};
use flora_host::decoder::Heads;
use flora_plan::layer::Element;

use crate::operations::RotaryConfig;

/// Cosines and sines `[positions, size / 2]` of every position that a model knows.
#[derive(Clone, Debug)]
pub(crate) struct RotaryTable<B: FloraBackend> {
    cosines: Tensor<B, 2>,
    sines: Tensor<B, 2>,
}

/// Those of a step's rows.
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

impl<B: FloraBackend> RotaryTable<B> {
    /// Angles position · base^(−2i/size), taken in f64.
    pub(crate) fn new(
        device: &BurnDevice<B>,
        RotaryConfig { positions, base }: RotaryConfig,
        size: usize,
        element: Element,
    ) -> Result<Self, TensorError> {
        let half = size / 2;
        let table = |function: fn(f64) -> f64| {
            let angle = |position: usize, pair: usize| position as f64 * base.powf(-2.0 * pair as f64 / size as f64);
            let rows = (0..positions).flat_map(|position| (0..half).map(move |pair| (position, pair)));
            let values: Vec<f32> = rows.map(|(position, pair)| function(angle(position, pair)) as f32).collect();
            device.upload(&values, [positions, half], element)
        };
        Ok(Self { cosines: table(f64::cos)?, sines: table(f64::sin)? })
    }

    /// The rows at these positions.
    pub(crate) fn rows(&self, positions: Tensor<B, 1, Int>, heads: Heads) -> RotaryRows<B> {
        let rows = |table: &Tensor<B, 2>| table.clone().select(0, positions.clone()).unsqueeze_dim::<3>(1);
        let (cosines, sines) = (rows(&self.cosines), rows(&self.sines));
        let cosines = Tensor::cat(vec![cosines.clone(), cosines], 2);
        let sines = Tensor::cat(vec![sines.clone().neg(), sines], 2);
        let turn = |heads: usize| Turn {
            cosines: cosines.clone().repeat_dim(1, heads),
            sines: sines.clone().repeat_dim(1, heads),
        };
        RotaryRows { queries: turn(heads.queries), keys: turn(heads.keys) }
    }
}

impl<B: FloraBackend> RotaryRows<B> {
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
