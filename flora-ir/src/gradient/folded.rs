//! The gradients of a folded adapter, in f64: what kernels must give, and the reference that they are held against.

use crate::algebra::{FoldError, FoldedAdapter, FoldedLayout, RankOne, RowScales, VirtualRow};
use crate::evaluate::{Value, activation_derivative};
use crate::layer::Activation;

/// ∂L/∂ of each vector of a [`FoldedAdapter`], summed over the rows of its segment.
#[derive(Clone, Debug, Default, PartialEq)]
pub struct FoldedGradient {
    /// One for each of [`FoldedAdapter::virtual_rows`].
    pub virtual_rows: Vec<VirtualRowGradient>,
    /// One for each of [`FoldedAdapter::low_rank`].
    pub low_rank: Vec<RankOneGradient>,
}

/// The gradients of a virtual row's scales; `None` where it has no scale.
#[derive(Clone, Debug, Default, PartialEq)]
pub struct VirtualRowGradient {
    /// `[d]`, Σ_rows x ∘ ((out ∘ g) @ w0ᵀ)
    pub in_scale: Option<Vec<f64>>,
    /// `[k]`, Σ_rows g ∘ ((in ∘ x) @ w0)
    pub out_scale: Option<Vec<f64>>,
}

/// The gradients of a low-rank pair of vectors.
#[derive(Clone, Debug, Default, PartialEq)]
pub struct RankOneGradient {
    /// `[d]`, xᵀ (g · expand)
    pub shrink: Vec<f64>,
    /// `[k]`, (x · shrink)ᵀ g
    pub expand: Vec<f64>,
}

/// The gradients of one segment's rows. That of a residual is the output's own.
#[derive(Clone, Debug, PartialEq)]
pub struct LinearGradient {
    /// dx, `[t, d]`
    pub input: Value,
    /// Σ_rows g, `[k]`
    pub bias: Value,
    /// The adapter's.
    pub adapter: FoldedGradient,
}

impl FoldedLayout {
    /// The layout of the adjoint: in- and out-scales exchanged.
    #[must_use]
    pub fn adjoint(&self) -> Self {
        let exchanged = |row: &RowScales| RowScales { in_scale: row.out_scale, out_scale: row.in_scale };
        Self { virtual_rows: self.virtual_rows.iter().map(exchanged).collect(), low_rank: self.low_rank }
    }
}

impl FoldedAdapter {
    /// The adapter that gives dx over w0ᵀ: the same numbers, with the vectors of input and output exchanged. So a device that holds
    /// this adapter's vectors in its two pools holds those of the adjoint.
    #[must_use]
    pub fn adjoint(&self) -> Self {
        let row = |row: &VirtualRow| VirtualRow { in_scale: row.out_scale.clone(), out_scale: row.in_scale.clone() };
        let pair = |pair: &RankOne| RankOne { shrink: pair.expand.clone(), expand: pair.shrink.clone() };
        Self {
            virtual_rows: self.virtual_rows.iter().map(row).collect(),
            low_rank: self.low_rank.iter().map(pair).collect(),
            sparse: self.sparse.adjoint(),
        }
    }

    /// The gradients of [`apply`](Self::apply) for ∂L/∂y = `output`, `[t, k]`, by plain loops in f64.
    ///
    /// # Errors
    /// [`FoldError::WrongShape`] when a tensor or a vector of the adapter doesn't fit the others; an adapter with sparse matrices.
    pub fn gradient(
        &self,
        x: &Value,
        w0: &Value,
        bias: Option<&Value>,
        activation: Activation,
        output: &Value,
    ) -> Result<LinearGradient, FoldError> {
        if !self.sparse.is_empty() {
            return Err(FoldError::SparseGradient { layer: "an adapter".to_owned() });
        }
        let sum = self.apply(x, w0, bias, Activation::Identity)?;
        if output.shape() != sum.shape() {
            let (found, expected) = (output.shape().to_vec(), sum.shape().to_vec());
            return Err(FoldError::WrongShape { what: "the output's gradient", found, expected });
        }
        // `apply` has looked at the shapes.
        let (&[tokens, d], &[_, k]) = (x.shape(), w0.shape()) else { return Err(no_matrix(x)) };
        let slopes = sum.data().iter().map(|sum| activation_derivative(activation, *sum));
        let g: Vec<f64> = slopes.zip(output.data()).map(|(slope, output)| slope * output).collect();
        let mut gradient = Sums { d, k, x: x.data(), w0: w0.data(), g: &g, dx: vec![0.0; tokens * d] };
        let virtual_rows = self.virtual_rows.iter().map(|row| gradient.virtual_row(row)).collect();
        let low_rank = self.low_rank.iter().map(|pair| gradient.rank_one(pair)).collect();
        let input = Value::matrix(tokens, d, gradient.dx)?;
        let bias = Value::vector((0..k).map(|column| g.iter().skip(column).step_by(k.max(1)).sum()).collect());
        Ok(LinearGradient { input, bias, adapter: FoldedGradient { virtual_rows, low_rank } })
    }
}

fn no_matrix(x: &Value) -> FoldError {
    FoldError::WrongShape { what: "x", found: x.shape().to_vec(), expected: vec![0, 0] }
}

/// One run of [`FoldedAdapter::gradient`].
struct Sums<'a> {
    d: usize,
    k: usize,
    /// `[t, d]`
    x: &'a [f64],
    /// `[d, k]`
    w0: &'a [f64],
    /// `[t, k]`
    g: &'a [f64],
    /// `[t, d]`, what the rows so far give.
    dx: Vec<f64>,
}

impl Sums<'_> {
    fn virtual_row(&mut self, row: &VirtualRow) -> VirtualRowGradient {
        let scale = |scales: &Option<Vec<f32>>, index: usize| scales.as_ref().map_or(1.0, |s| f64::from(s[index]));
        let (mut d_in, mut d_out) = (vec![0.0; self.d], vec![0.0; self.k]);
        let rows = self.x.chunks(self.d.max(1)).zip(self.g.chunks(self.k.max(1)));
        for ((x, g), dx) in rows.zip(self.dx.chunks_mut(self.d.max(1))) {
            for (input, x) in x.iter().enumerate() {
                let weights = &self.w0[input * self.k..][..self.k];
                let scaled = scale(&row.in_scale, input) * x;
                let mut back = 0.0;
                for (output, (g, weight)) in g.iter().zip(weights).enumerate() {
                    d_out[output] += g * scaled * weight;
                    back += scale(&row.out_scale, output) * g * weight;
                }
                d_in[input] += x * back;
                dx[input] += scale(&row.in_scale, input) * back;
            }
        }
        VirtualRowGradient {
            in_scale: row.in_scale.as_ref().map(|_| d_in),
            out_scale: row.out_scale.as_ref().map(|_| d_out),
        }
    }

    fn rank_one(&mut self, RankOne { shrink, expand }: &RankOne) -> RankOneGradient {
        let (mut d_shrink, mut d_expand) = (vec![0.0; self.d], vec![0.0; self.k]);
        let dot = |vector: &[f32], row: &[f64]| vector.iter().zip(row).map(|(v, x)| f64::from(*v) * x).sum::<f64>();
        let rows = self.x.chunks(self.d.max(1)).zip(self.g.chunks(self.k.max(1)));
        for ((x, g), dx) in rows.zip(self.dx.chunks_mut(self.d.max(1))) {
            let (shrunk, back) = (dot(shrink, x), dot(expand, g));
            d_shrink.iter_mut().zip(x).for_each(|(sum, x)| *sum += x * back);
            d_expand.iter_mut().zip(g).for_each(|(sum, g)| *sum += g * shrunk);
            dx.iter_mut().zip(shrink).for_each(|(dx, shrink)| *dx += back * f64::from(*shrink));
        }
        RankOneGradient { shrink: d_shrink, expand: d_expand }
    }
}
