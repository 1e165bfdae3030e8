//! What the gradients of adapters' vectors take, and from where on tiles of G ∘ w0 are cheaper than row reductions: the counterpart of
//! Eq. 7 in training.

use serde::{Deserialize, Serialize};

use super::{PricedLayer, Regime};
use crate::gradient::GradientLowering;
use crate::schedule::AdapterGradient;

/// What computes gradients of vectors; each has its own seconds per MAC. A regime's rows are those of one adapter, its rank is how many
/// scales or low-rank pairs the adapter has.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash, PartialOrd, Ord, Serialize, Deserialize)]
#[serde(rename_all = "snake_case")]
pub enum GradientKernel {
    /// Scales, by row reductions of stacked products.
    Reduced,
    /// Scales, by tiles of G ∘ w0.
    Outer,
    /// Low-rank pairs.
    Pairs,
}

impl GradientKernel {
    /// Every kernel, with its name in files and reports.
    pub const TIMED: [(&'static str, Self); 3] =
        [("reduced", GradientKernel::Reduced), ("outer", GradientKernel::Outer), ("pairs", GradientKernel::Pairs)];

    /// That of a lowering.
    pub fn of(lowering: GradientLowering) -> Self {
        match lowering {
            GradientLowering::Reduced => Self::Reduced,
            GradientLowering::Outer => Self::Outer,
        }
    }

    /// The name in files and reports.
    pub fn name(self) -> &'static str {
        let [(reduced, _), (outer, _), (pairs, _)] = Self::TIMED;
        match self {
            Self::Reduced => reduced,
            Self::Outer => outer,
            Self::Pairs => pairs,
        }
    }
}

/// The gradients of some vectors of one adapter.
#[derive(Clone, Copy, Debug, PartialEq)]
pub struct GradientTerm {
    /// What computes them.
    pub kernel: GradientKernel,
    /// The point of the kernel's surface.
    pub regime: Regime,
    /// Multiply-accumulates.
    pub macs: u64,
    /// Bytes of global memory.
    pub bytes: u64,
}

impl GradientTerm {
    /// The gradients of scales of an adapter with so many rows.
    pub(super) fn of_scales(lowering: GradientLowering, layer: PricedLayer, rows: u64, scales: u64) -> Self {
        let weights = u64::from(layer.shape.d) * u64::from(layer.shape.k);
        let macs = (lowering.row().macs)(rows, scales).saturating_mul(weights);
        let bytes = layer.format.weight.bytes(layer.shape) + vector_bytes(layer, rows, scales);
        Self { kernel: GradientKernel::of(lowering), regime: regime(rows, scales), macs, bytes }
    }

    fn of_pairs(layer: PricedLayer, rows: u64, pairs: u64) -> Self {
        let vectors = u64::from(layer.shape.d) + u64::from(layer.shape.k);
        // Shrink and expand, and a product with x and one with g.
        let macs = 2 * rows.saturating_mul(pairs).saturating_mul(vectors);
        let bytes = vector_bytes(layer, rows, 2 * pairs);
        Self { kernel: GradientKernel::Pairs, regime: regime(rows, pairs), macs, bytes }
    }
}

fn regime(rows: u64, rank: u64) -> Regime {
    // Another adapter in the batch must not change a choice, so prices know of one alone.
    Regime { rows: rows.max(1) as f64, rank: rank.max(1) as f64, adapters: 1.0 }
}

/// Bytes of an adapter's rows of x and g, of its vectors and of their gradients in f32; every other vector is as wide as x, the others
/// as g.
fn vector_bytes(layer: PricedLayer, rows: u64, vectors: u64) -> u64 {
    let width = u64::from(layer.shape.d) + u64::from(layer.shape.k);
    let of_rows = layer.format.activations.bytes() * rows;
    let of_vectors = (layer.format.adapters.bytes() + 4) * vectors.div_ceil(2);
    (of_rows + of_vectors).saturating_mul(width)
}

/// The work on the gradients of a batch's vectors, as a schedule lays it out.
pub fn gradient_work(layer: PricedLayer, adapters: &[AdapterGradient]) -> Vec<GradientTerm> {
    let mut terms = Vec::new();
    for adapter in adapters {
        let (rows, scales) = (adapter.rows(), adapter.scales());
        if scales > 0 {
            terms.push(GradientTerm::of_scales(adapter.lowering, layer, rows, scales));
        }
        if adapter.low_rank.rank > 0 {
            terms.push(GradientTerm::of_pairs(layer, rows, u64::from(adapter.low_rank.rank)));
        }
    }
    terms
}

/// Eq. 7's counterpart for the gradients of scales: `reduced` takes n·t·cr for n scales and t rows, `outer` (t + 1 + n)·co, each for a
/// number of w0.
#[derive(Clone, Copy, Debug, PartialEq, Serialize)]
pub struct OuterIsCheaper {
    /// n·t·cr / ((t + 1 + n)·co); `outer` is the cheaper from 1 on.
    pub left: f64,
    /// The rows from which it is, (1 + n)·co / (n·cr − co), as far as both coefficients stay; `None` where it never is, as with one
    /// scale at equal coefficients.
    pub critical_rows: Option<f64>,
}

/// Evaluates it for an adapter with `scales` scales and `rows` rows. Coefficients in seconds per MAC.
pub fn outer_is_cheaper(rows: u64, scales: u64, of_reduced: f64, of_outer: f64) -> OuterIsCheaper {
    let (t, n) = (rows as f64, scales as f64);
    let gain = n * of_reduced - of_outer;
    OuterIsCheaper {
        left: n * t * of_reduced / ((t + 1.0 + n) * of_outer),
        critical_rows: (gain > 0.0).then(|| (1.0 + n) * of_outer / gain),
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn every_kernel_has_its_name() {
        assert!(GradientKernel::TIMED.iter().all(|(name, kernel)| kernel.name() == *name));
        assert_eq!(GradientKernel::of(GradientLowering::Outer), GradientKernel::Outer);
    }

    /// At equal coefficients the equation says what the table's products say.
    #[test]
    fn the_critical_rows_part_the_lowerings() {
        for scales in 1..70 {
            for rows in 1..300 {
                let OuterIsCheaper { left, critical_rows } = outer_is_cheaper(rows, scales, 1e-11, 1e-11);
                let is_outer = GradientLowering::cheapest(rows, scales) == GradientLowering::Outer;
                // Of two that cost the same, the table takes the first.
                assert!((left - 1.0).abs() < 1e-12 || (left > 1.0) == is_outer, "{rows} rows, {scales} scales");
                let beyond = critical_rows.is_some_and(|critical| rows as f64 > critical * (1.0 + 1e-12));
                let equal = critical_rows.is_some_and(|critical| (rows as f64 / critical - 1.0).abs() < 1e-12);
                assert!(equal || beyond == is_outer, "{rows} rows, {scales} scales: {critical_rows:?}");
            }
        }
        assert_eq!(outer_is_cheaper(9, 1, 1.0, 1.0).critical_rows, None);
        assert!(outer_is_cheaper(9, 1, 2.0, 1.0).critical_rows.is_some_and(|rows| rows == 2.0));
    }
}
