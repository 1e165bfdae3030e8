//! W_i = w0 ∘ Σ_v in_v out_vᵀ + Σ_q shrink_q expand_qᵀ, made whole for the `bmm` lowering.

use std::ops::Range;

use flora_plan::schedule::{Materialised, MaterialisedAdapter, Scale};
use pulp::Simd;

use crate::factors::Factors;
use crate::frame::Frame;
use crate::layout::{SLICE, STRIP};
use crate::pack::Vectors;
use crate::partition::{PANEL_COLUMNS, panels};
use crate::pool::Pool;
use crate::scratch::Scratch;
use crate::terms::Terms;
use crate::values::Shared;
use crate::weight::Strips;

/// What a weight is made of.
#[derive(Clone, Copy)]
pub(crate) struct Recipe<'a> {
    /// W0 `[d, k]`.
    pub(crate) weight: Strips<'a>,
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
        weight: Strips<'a>,
        (in_pool, out_pool): (Vectors<'a>, Vectors<'a>),
    ) -> Self {
        let MaterialisedAdapter { first_scale, end_scale, shrink, expand, rank } = step.adapters[position];
        let scales = &step.scales[first_scale as usize..end_scale as usize];
        Self { weight, in_pool, out_pool, scales, shrink, expand, rank }
    }
}

/// Writes the strips of W_i to `out`.
pub(crate) fn make<S: Simd>(simd: S, recipe: Recipe<'_>, out: &mut [f32], scratches: &Pool<Scratch>) {
    let (d, k) = (recipe.in_pool.width, recipe.out_pool.width);
    let terms = recipe.scales.len() as u64 + u64::from(recipe.rank) + 1;
    let out = Shared::new(out);
    panels((k, PANEL_COLUMNS), 1, terms * d as u64 * k as u64, |columns, _| {
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
    depth: Range<usize>,
    out: Shared<f32>,
    scratch: &mut Scratch,
) {
    let Scratch { decoded, inner, outer, row, .. } = scratch;
    let ranks =
        (0..recipe.rank).map(|rank| Scale { in_slot: recipe.shrink + rank + 1, out_slot: recipe.expand + rank + 1 });
    let scales = recipe.scales.iter().copied();
    let product = Terms::of(scales.clone(), 0);
    let sum = Terms::of(ranks.clone(), product.end());
    let gathered = scales.chain(ranks);
    let factors = Factors::gather(frame, gathered, sum.end(), depth.clone(), (inner, outer, row));
    for strip in 0..frame.strips() {
        let at = frame.columns.start / STRIP + strip;
        let weight = recipe.weight.read(frame.simd, at, depth.clone(), decoded);
        // SAFETY: W_i outlives the call, and no other task has these columns.
        let made = unsafe { out.slice((at * recipe.in_pool.width + depth.start) * STRIP, weight.len()) };
        factors.compose(frame.simd, &product, (strip, 0..depth.len()), Some(weight), made);
        if recipe.rank > 0 {
            factors.compose(frame.simd, &sum, (strip, 0..depth.len()), None, made);
        }
    }
}
