//! Rotary position embedding in Hugging Face's order: pair i of a head is (i, i + size/2).

use burn::tensor::{Int, Tensor, TensorData};
use flora_burn::{FloraBackend, Target, TensorError};
use flora_codegen::layer::Element;

/// Cosines and sines `[positions, size / 2]` of every position that a model knows.
#[derive(Clone, Debug)]
pub(crate) struct RotaryTable<B: FloraBackend> {
    cosines: Tensor<B, 2>,
    sines: Tensor<B, 2>,
}

/// Those of a step's rows, `[rows, 1, size / 2]`.
#[derive(Clone, Debug)]
pub(crate) struct RotaryRows<B: FloraBackend> {
    cosines: Tensor<B, 3>,
    sines: Tensor<B, 3>,
}

impl<B: FloraBackend> RotaryTable<B> {
    /// Angles position · base^(−2i/size), taken in f64.
    pub(crate) fn new(
        target: &Target<B>,
        positions: usize,
        size: usize,
        base: f64,
        element: Element,
    ) -> Result<Self, TensorError> {
        let half = size / 2;
        let table = |function: fn(f64) -> f64| {
            let angle = |position: usize, pair: usize| position as f64 * base.powf(-2.0 * pair as f64 / size as f64);
            let rows = (0..positions).flat_map(|position| (0..half).map(move |pair| (position, pair)));
            let values: Vec<f32> = rows.map(|(position, pair)| function(angle(position, pair)) as f32).collect();
            target.upload(&values, [positions, half], element)
        };
        Ok(Self { cosines: table(f64::cos)?, sines: table(f64::sin)? })
    }

    /// The rows at these positions.
    pub(crate) fn rows(&self, positions: &[usize]) -> RotaryRows<B> {
        let index: Vec<i32> = positions.iter().map(|position| *position as i32).collect();
        let index = Tensor::<B, 1, Int>::from_data(TensorData::from(&index[..]), &self.cosines.device());
        let rows = |table: &Tensor<B, 2>| table.clone().select(0, index.clone()).unsqueeze_dim(1);
        RotaryRows { cosines: rows(&self.cosines), sines: rows(&self.sines) }
    }
}

impl<B: FloraBackend> RotaryRows<B> {
    /// Rotates x `[rows, heads, size]`.
    pub(crate) fn rotate(&self, x: Tensor<B, 3>) -> Tensor<B, 3> {
        let [rows, heads, size] = x.dims();
        let half = size / 2;
        let first = x.clone().slice([0..rows, 0..heads, 0..half]);
        let second = x.slice([0..rows, 0..heads, half..size]);
        let (cosines, sines) = (self.cosines.clone(), self.sines.clone());
        let turned = first.clone() * cosines.clone() - second.clone() * sines.clone();
        Tensor::cat(vec![turned, second * cosines + first * sines], 2)
    }
}
