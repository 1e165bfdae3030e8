//! The gradients of low-rank pairs: expand_q = (x · shrink_q)ᵀ g and shrink_q = (g · expand_q)ᵀ x. Both shrink an adapter's rows as the
//! forward pass does, and expand the turned result by the other rows.

use flora_plan::schedule::{AdapterGradient, LowRankRows};
use pulp::Simd;

use super::Inputs;
use crate::call_memory::{GradientMemory, Lent};
use crate::pack::Vectors;
use crate::{expand, shrink};

/// The pairs of one side of a layer.
#[derive(Clone, Copy)]
struct Side<'a> {
    /// Rows that are shrunk,
    rows: Vectors<'a>,
    /// by vectors of this pool.
    pool: Vectors<'a>,
    /// What their products are multiplied by.
    others: Vectors<'a>,
    /// An adapter's first vector in the pool.
    slot: fn(&AdapterGradient) -> u32,
    /// The first of its gradients.
    first: fn(&AdapterGradient) -> u32,
}

/// Adds those of expand vectors, `[out_vectors, k]`.
pub(super) fn expand<S: Simd>(
    inputs: &Inputs<'_, S>,
    adapters: &[AdapterGradient],
    gradients: &mut [f32],
    lent: &mut Lent,
) {
    let side = Side {
        rows: inputs.x,
        pool: inputs.layer.in_pool,
        others: inputs.g,
        slot: |adapter| adapter.low_rank.shrink,
        first: |adapter| adapter.first_out + adapter.out_scales.len() as u32,
    };
    side.add(inputs, adapters, gradients, lent);
}

/// Adds those of shrink vectors, `[in_vectors, d]`.
pub(super) fn shrink<S: Simd>(
    inputs: &Inputs<'_, S>,
    adapters: &[AdapterGradient],
    gradients: &mut [f32],
    lent: &mut Lent,
) {
    let side = Side {
        rows: inputs.g,
        pool: inputs.layer.out_pool,
        others: inputs.x,
        slot: |adapter| adapter.low_rank.expand,
        first: |adapter| adapter.first_in + adapter.in_scales.len() as u32,
    };
    side.add(inputs, adapters, gradients, lent);
}

impl Side<'_> {
    fn add<S: Simd>(
        &self,
        inputs: &Inputs<'_, S>,
        adapters: &[AdapterGradient],
        gradients: &mut [f32],
        lent: &mut Lent,
    ) {
        let Lent { hidden, shrinks, runs, gradient, .. } = lent;
        let GradientMemory { turned, runs: products, .. } = gradient;
        runs.clear();
        products.clear();
        for adapter in adapters.iter().filter(|adapter| adapter.low_rank.rank > 0) {
            let (shrink, rank, first_row) = ((self.slot)(adapter), adapter.low_rank.rank, (self.first)(adapter));
            for run in &adapter.runs {
                runs.push(LowRankRows { first_row: run.first_row, rows: run.rows, shrink, expand: 0, rank });
                // The rows are now what is summed over.
                products.push(LowRankRows { first_row, rows: rank, shrink: 0, expand: run.first_row, rank: run.rows });
            }
        }
        if runs.is_empty() {
            return;
        }
        let hidden = hidden.floats(shrink::tasks(runs, shrinks));
        shrink::shrink(inputs.simd, (self.rows, None), self.pool, shrinks, hidden, inputs.scratches);
        let turned = turned.floats(hidden.len());
        let mut first = 0;
        for run in runs.iter() {
            let (rows, rank) = (run.rows as usize, run.rank as usize);
            let (hidden, turned) = (&hidden[first..first + rows * rank], &mut turned[first..first + rows * rank]);
            for (row, hidden) in hidden.chunks_exact(rank).enumerate() {
                hidden.iter().zip(turned.chunks_exact_mut(rows)).for_each(|(number, turned)| turned[row] = *number);
            }
            first += rows * rank;
        }
        let pools = (self.pool, self.others);
        expand::expand_all(inputs.simd, pools, products, turned, gradients, inputs.scratches);
    }
}
