//! W_i = w0 ∘ Σ_v in_v out_vᵀ + Σ_q shrink_q expand_qᵀ, made whole for the `bmm` lowering.

use flora_plan::schedule::{Materialised, MaterialisedAdapter, Scale};
use pulp::Simd;

use crate::frame::{Frame, PANEL_COLUMNS, panels};
use crate::kernel::{SLICE, strip_columns};
use crate::pack::{Vectors, Weight, pack_panel, strip_pitch};
use crate::values::Shared;
use crate::workspace::{Pool, Scratch};

/// What a weight is made of.
#[derive(Clone, Copy)]
pub(crate) struct Recipe<'a> {
    /// W0 `[d, k]`.
    pub(crate) weight: Weight<'a>,
    /// `[slots, d]`
    pub(crate) in_pool: Vectors<'a>,
    /// `[slots, k]`
    pub(crate) out_pool: Vectors<'a>,
    /// The virtual rows.
    pub(crate) scales: &'a [Scale],
    /// The first slots of the low-rank sum in both pools.
    pub(crate) shrink: u32,
    pub(crate) expand: u32,
    pub(crate) rank: u32,
}

impl<'a> Recipe<'a> {
    /// Of adapter `position` of a step.
    pub(crate) fn of(
        step: &'a Materialised,
        position: usize,
        weight: Weight<'a>,
        (in_pool, out_pool): (Vectors<'a>, Vectors<'a>),
    ) -> Self {
        let MaterialisedAdapter { first_scale, end_scale, shrink, expand, rank } = step.adapters[position];
        let scales = &step.scales[first_scale as usize..end_scale as usize];
        Self { weight, in_pool, out_pool, scales, shrink, expand, rank }
    }
}

/// Writes W_i to `out`, `[d, k]`.
pub(crate) fn make<S: Simd>(simd: S, recipe: Recipe<'_>, out: &mut [f32], scratches: &Pool<Scratch>) {
    let (d, k) = (recipe.in_pool.width, recipe.out_pool.width);
    let terms = recipe.scales.len() as u64 + u64::from(recipe.rank) + 1;
    let out = Shared::new(out);
    panels::<S>(k, PANEL_COLUMNS, terms * d as u64 * k as u64, |columns| {
        let frame = Frame { simd, in_pool: recipe.in_pool, out_pool: recipe.out_pool, columns };
        scratches.lend(|scratch| {
            for first in (0..d).step_by(SLICE) {
                slice(&frame, &recipe, first..(first + SLICE).min(d), out, scratch);
            }
        });
    });
}

fn slice<S: Simd>(
    frame: &Frame<'_, S>,
    recipe: &Recipe<'_>,
    depth: std::ops::Range<usize>,
    out: Shared<f32>,
    scratch: &mut Scratch,
) {
    let Scratch { panel, composed, inner, outer, row, .. } = scratch;
    let (strip, k) = (strip_columns::<S>(), recipe.out_pool.width);
    let panel = panel.floats(frame.strips() * strip_pitch::<S>());
    let columns = frame.columns.clone();
    pack_panel(frame.simd, recipe.weight, k, depth.clone(), columns, row.floats(frame.width()), panel);
    let composed = composed.floats(frame.strips() * strip_pitch::<S>());
    let strips = || panel.chunks_exact(strip_pitch::<S>());

    let factors = frame.factors(recipe.scales.iter().copied(), depth.clone(), (inner, outer, row));
    for (at, (weight, composed)) in strips().zip(composed.chunks_exact_mut(strip_pitch::<S>())).enumerate() {
        let len = depth.len() * strip;
        factors.compose(frame.simd, at, Some(&weight[..len]), &mut composed[..len]);
    }
    if recipe.rank > 0 {
        let ranks = (0..recipe.rank)
            .map(|rank| Scale { in_slot: recipe.shrink + rank + 1, out_slot: recipe.expand + rank + 1 });
        let factors = frame.factors(ranks, depth.clone(), (inner, outer, row));
        for (at, composed) in composed.chunks_exact_mut(strip_pitch::<S>()).enumerate() {
            factors.compose(frame.simd, at, None, &mut composed[..depth.len() * strip]);
        }
    }
    for (at, composed) in composed.chunks_exact(strip_pitch::<S>()).enumerate() {
        let first = frame.columns.start + at * strip;
        let columns = strip.min(frame.columns.end - first);
        for (depth, composed) in depth.clone().zip(composed.chunks_exact(strip)) {
            // SAFETY: W_i outlives the call, and no other task has these columns.
            unsafe { out.slice(depth * k + first, columns) }.copy_from_slice(&composed[..columns]);
        }
    }
}
