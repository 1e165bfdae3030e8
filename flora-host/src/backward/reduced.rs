//! The gradients of scales by row reductions, for adapters of few rows or of a single scale:
//!
//! ```text
//! out_v = Σ_rows g ∘ ((in_v ∘ x) @ w0)        in_v = Σ_rows x ∘ ((out_v ∘ g) @ w0ᵀ)
//! ```
//!
//! One pass over the weight multiplies the stacked rows of all such adapters, and their products are reduced panel by panel.

use flora_plan::gradient::GradientLowering;
use flora_plan::schedule::{AdapterGradient, ScheduledRow};
use pulp::Simd;

use super::Inputs;
use crate::call_memory::{GradientMemory, Lent};
use crate::gemm;
use crate::kernel::Form;
use crate::operands::Layer;
use crate::pack::Vectors;
use crate::partition::{PANEL_COLUMNS, panels};
use crate::pass::{Pass, Rows};
use crate::values::{Shared, Sink};
use crate::vectorise::vectorised;

/// The scales of one side of a layer.
#[derive(Clone, Copy)]
struct Side<'a> {
    /// What multiplies `rows`: the layer for out-scales, its adjoint for in-scales.
    layer: Layer<'a>,
    /// Rows that the scales' partners multiply.
    rows: Vectors<'a>,
    /// What the products are multiplied by.
    others: Vectors<'a>,
    /// For each scale the slot of its partner.
    partners: fn(&AdapterGradient) -> &[u32],
    /// The first of the adapter's gradients.
    first: fn(&AdapterGradient) -> u32,
}

/// The adapters whose lowering this is.
fn of_lowering(adapters: &[AdapterGradient]) -> impl Iterator<Item = &AdapterGradient> {
    adapters.iter().filter(|adapter| adapter.lowering == GradientLowering::Reduced)
}

/// The gradients of out-scales, `[out_vectors, k]`.
pub(super) fn out_scales<S: Simd>(
    inputs: &Inputs<'_, S>,
    adapters: &[AdapterGradient],
    gradients: &mut [f32],
    lent: &mut Lent,
) {
    let side = Side {
        layer: inputs.layer,
        rows: inputs.x,
        others: inputs.g,
        partners: |adapter| &adapter.out_scales,
        first: |adapter| adapter.first_out,
    };
    side.run(inputs, adapters, gradients, lent);
}

/// The gradients of in-scales, `[in_vectors, d]`.
pub(super) fn in_scales<S: Simd>(
    inputs: &Inputs<'_, S>,
    adapters: &[AdapterGradient],
    gradients: &mut [f32],
    lent: &mut Lent,
) {
    let side = Side {
        layer: inputs.layer.adjoint(),
        rows: inputs.g,
        others: inputs.x,
        partners: |adapter| &adapter.in_scales,
        first: |adapter| adapter.first_in,
    };
    side.run(inputs, adapters, gradients, lent);
}

impl Side<'_> {
    fn run<S: Simd>(
        &self,
        inputs: &Inputs<'_, S>,
        adapters: &[AdapterGradient],
        gradients: &mut [f32],
        lent: &mut Lent,
    ) {
        let Lent { rows, gradient: GradientMemory { products, sources, .. }, .. } = lent;
        rows.clear();
        sources.clear();
        for adapter in of_lowering(adapters) {
            for partner in (self.partners)(adapter) {
                for row in adapter.row_indices() {
                    rows.push(ScheduledRow { row: sources.len() as u32, in_slot: *partner, out_slot: 0, last: 1 });
                    sources.push(row);
                }
            }
        }
        if rows.is_empty() {
            return;
        }
        let width = self.others.width;
        let products = products.floats(rows.len() * width);
        let pass = Pass {
            // Gradients are exact but for the rounding of their sums.
            form: Form::Floats,
            weight: self.layer.weight,
            x: self.rows,
            in_pool: self.layer.in_pool,
            out_pool: self.layer.out_pool,
            rows: Rows { sources, ..Rows::plain(rows) },
            hidden: &[],
            finish: None,
            sink: Sink::F32(Shared::new(products)).rows(width),
        };
        gemm::run(inputs.simd, pass, inputs.scratches);
        self.reduce(inputs, adapters, products, gradients);
    }

    /// Adds each scale's products by the other rows to its gradient.
    fn reduce<S: Simd>(
        &self,
        inputs: &Inputs<'_, S>,
        adapters: &[AdapterGradient],
        products: &[f32],
        gradients: &mut [f32],
    ) {
        let width = self.others.width;
        let gradients = Shared::new(gradients);
        panels((width, PANEL_COLUMNS), 1, products.len() as u64, |columns, _| {
            inputs.scratches.lend(|scratch| {
                let other = scratch.row.floats(columns.len());
                let mut products = products.chunks_exact(width);
                for adapter in of_lowering(adapters) {
                    for scale in 0..(self.partners)(adapter).len() {
                        let first = ((self.first)(adapter) as usize + scale) * width + columns.start;
                        // SAFETY: the gradients outlive the call, and no other task has these columns.
                        let gradient = unsafe { gradients.slice(first, columns.len()) };
                        for (row, product) in adapter.row_indices().zip(products.by_ref()) {
                            self.others.widen(row as usize, columns.start, other);
                            add_products(inputs.simd, gradient, other, &product[columns.clone()]);
                        }
                    }
                }
            });
        });
    }
}

fn add_products<S: Simd>(simd: S, sums: &mut [f32], one: &[f32], other: &[f32]) {
    vectorised(
        simd,
        #[inline(always)]
        || sums.iter_mut().zip(one).zip(other).for_each(|((sum, one), other)| *sum += one * other),
    );
}
