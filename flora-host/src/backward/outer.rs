//! The gradients of scales by tiles of M = G ∘ W0, where G = xᵀ g over an adapter's rows:
//!
//! ```text
//! out_v = Mᵀ in_v        in_v = M out_v
//! ```
//!
//! A task owns some inputs of an adapter and goes over the strips of the weight: it makes a strip of M as an `on_chip` segment makes
//! one of W_i, with the rows of the batch as its terms, multiplies it by the in-vectors of all scales, turns it, and multiplies it by
//! the out-vectors. So M costs one product however many scales there are, and is never whole in memory. Sums over inputs are kept
//! apart for each task, of which a layer has a fixed number, and added in their order.

use std::ops::Range;

use flora_plan::gradient::GradientLowering;
use flora_plan::schedule::AdapterGradient;
use pulp::Simd;
use rayon::prelude::*;

use super::Inputs;
use crate::buffer::Buffer;
use crate::call_memory::{GradientMemory, OuterAdapter};
use crate::fetch::{Ahead, Pieces};
use crate::kernel::{Columns, Compose, Form, MOST_TILE_ROWS, tile_rows};
use crate::layout::{SLICE, STRIP, X_PITCH};
use crate::pack::Vectors;
use crate::partition::{even_part, even_tiles};
use crate::scratch::Scratch;
use crate::tiles::{StripPart, Tiles};
use crate::transpose::transpose;
use crate::values::Shared;
use crate::vectorise::vectorised;

/// Inputs of a tile of M, in strips: a first-level cache's share.
const TILE_STRIPS: usize = 3;

/// Rows that a tile of M is made of at a time. Fixed, because its bits depend on it.
const ROWS: usize = 192;

/// The most tasks that share the inputs.
const MOST_TASKS: usize = 32;

/// Strips of M that are turned before they are multiplied: a product of fewer columns is hardly worth its call. They are within one
/// slice. Fixed, because sums depend on it.
const TURNED: usize = 4;

/// Floats of [`STRIP`] inputs of them.
const TURNED_LEN: usize = TURNED * STRIP * STRIP;

/// Floats from one in-vector's sums to the next's: not a multiple of the cache's period.
const PITCH: usize = TILE_STRIPS * STRIP + 16;

/// Floats of partial sums, beyond which adapters take turns.
const GROUP_FLOATS: usize = 1 << 20;

/// What all adapters of a layer share.
#[derive(Clone, Copy)]
struct Extents {
    d: usize,
    k: usize,
    strips: usize,
    slices: usize,
    tasks: usize,
    /// Floats from one out-vector's sums to the next's.
    pitch: usize,
}

impl Extents {
    fn of(d: usize, k: usize) -> Self {
        let strips = k.div_ceil(STRIP);
        let tasks = d.div_ceil(STRIP).div_ceil(TILE_STRIPS).min(MOST_TASKS);
        Self { d, k, strips, slices: k.div_ceil(SLICE), tasks, pitch: strips * STRIP + 16 }
    }

    /// The inputs of a task.
    fn inputs(&self, task: usize) -> Range<usize> {
        let strips = even_part(self.d.div_ceil(STRIP), self.tasks, task);
        strips.start * STRIP..self.d.min(strips.end * STRIP)
    }
}

/// What a group's memory has to hold.
#[derive(Clone, Copy, Default)]
struct Sizes {
    strips: usize,
    vectors: usize,
    partial: usize,
}

/// Writes the gradients of in-scales `[in_vectors, d]` and of out-scales `[out_vectors, k]`, of the adapters whose lowering this is.
pub(super) fn scales<S: Simd>(
    inputs: &Inputs<'_, S>,
    adapters: &[AdapterGradient],
    (in_gradients, out_gradients): (&mut [f32], &mut [f32]),
    memory: &mut GradientMemory,
) {
    let extents = Extents::of(inputs.x.width, inputs.g.width);
    let mut next = 0;
    while next < adapters.len() {
        let GradientMemory { strips, vectors, partial, group, .. } = memory;
        let sizes;
        (next, sizes) = gather(adapters, next, extents, group);
        let strips = strips.floats(sizes.strips);
        let vectors = vectors.floats(sizes.vectors);
        let partial = partial.floats(sizes.partial);
        for own in group.iter() {
            pack(inputs, extents, &adapters[own.at], own, (strips, vectors));
        }
        let (in_shared, partial_shared) = (Shared::new(in_gradients), Shared::new(partial));
        let tiles = TileSums { inputs, extents, strips, vectors, in_gradients: in_shared, partial: partial_shared };
        (0..group.len() * extents.tasks).into_par_iter().for_each(|at| {
            let own = &group[at / extents.tasks];
            inputs.scratches.lend(|scratch| tiles.run(&adapters[own.at], own, at % extents.tasks, scratch));
        });
        for own in group.iter() {
            add_up(inputs.simd, extents, &adapters[own.at], &partial[own.partial..], out_gradients);
        }
    }
}

/// The next adapters of this lowering, as many as fit; returns the position after them.
fn gather(
    adapters: &[AdapterGradient],
    first: usize,
    extents: Extents,
    group: &mut Vec<OuterAdapter>,
) -> (usize, Sizes) {
    group.clear();
    let mut sizes = Sizes::default();
    for (at, adapter) in adapters.iter().enumerate().skip(first) {
        if adapter.lowering != GradientLowering::Outer {
            continue;
        }
        let partial = extents.tasks * adapter.out_scales.len() * extents.pitch;
        if !group.is_empty() && sizes.partial + partial > GROUP_FLOATS {
            return (at, sizes);
        }
        let rows = adapter.rows() as usize;
        let Sizes { strips, vectors, partial: before } = sizes;
        group.push(OuterAdapter { at, rows, strips, vectors, partial: before });
        sizes = Sizes {
            strips: strips + extents.strips * rows * STRIP,
            vectors: vectors + extents.slices * adapter.in_scales.len() * X_PITCH,
            partial: before + partial,
        };
    }
    (adapters.len(), sizes)
}

/// Packs an adapter's rows of g and its out-vectors.
fn pack<S: Simd>(
    inputs: &Inputs<'_, S>,
    extents: Extents,
    adapter: &AdapterGradient,
    own: &OuterAdapter,
    (strips, vectors): (&mut [f32], &mut [f32]),
) {
    let Extents { k, .. } = extents;
    let strips = &mut strips[own.strips..][..extents.strips * own.rows * STRIP];
    strips.par_chunks_exact_mut(own.rows * STRIP).enumerate().for_each(|(strip, out)| {
        let columns = strip * STRIP..k.min((strip + 1) * STRIP);
        for (row, out) in adapter.row_indices().zip(out.chunks_exact_mut(STRIP)) {
            let (numbers, padding) = out.split_at_mut(columns.len());
            inputs.g.widen(row as usize, columns.start, numbers);
            padding.fill(0.0);
        }
    });
    let slice = adapter.in_scales.len() * X_PITCH;
    if slice == 0 {
        return;
    }
    for (at, out) in vectors[own.vectors..][..extents.slices * slice].chunks_exact_mut(slice).enumerate() {
        let columns = at * SLICE..k.min((at + 1) * SLICE);
        for (partner, out) in adapter.in_scales.iter().zip(out.chunks_exact_mut(X_PITCH)) {
            partner_vector(inputs.layer.out_pool, *partner, columns.start, &mut out[..columns.len()]);
        }
    }
}

/// The numbers of a partner from `first` on; slots count from 1, 0 is ones.
fn partner_vector(pool: Vectors<'_>, slot: u32, first: usize, out: &mut [f32]) {
    match slot.checked_sub(1) {
        Some(slot) => pool.widen(slot as usize, first, out),
        None => out.fill(1.0),
    }
}

/// Floats from one packed row to the next on the widest instruction set: a cache line.
const MOST_PITCH: usize = MOST_TILE_ROWS.next_power_of_two();

/// How an adapter's rows of x lie within the inputs of a tile of M: `[tiles, rows, pitch]`, where a tile is as many inputs as have
/// their sums in registers, so that a product reads one line after the other.
#[derive(Clone, Copy)]
struct PackedRows {
    inputs: usize,
    rows: usize,
    /// Inputs in registers.
    most: usize,
    pitch: usize,
}

impl PackedRows {
    fn of<S: Simd>(inputs: usize, rows: usize) -> Self {
        Self { inputs, rows, most: tile_rows::<S>(), pitch: tile_rows::<S>().next_power_of_two() }
    }

    fn tiles(self) -> impl Iterator<Item = Range<usize>> {
        even_tiles(self.inputs, self.most)
    }

    fn len(self) -> usize {
        self.inputs.div_ceil(self.most) * self.rows * self.pitch
    }

    fn pack(self, x: Vectors<'_>, rows: impl Iterator<Item = u32>, first: usize, out: &mut [f32]) {
        // What is copied beyond a tile's inputs is not read.
        let mut numbers = [0.0; TILE_STRIPS * STRIP + MOST_PITCH];
        for (at, row) in rows.enumerate() {
            x.widen(row as usize, first, &mut numbers[..self.inputs]);
            for (tile, inputs) in self.tiles().enumerate() {
                let (numbers, out) = (&numbers[inputs.start..], &mut out[(tile * self.rows + at) * self.pitch..]);
                // Of a length that the compiler knows, a copy is an instruction or two.
                match (self.pitch, numbers.first_chunk::<MOST_PITCH>(), out.first_chunk_mut::<MOST_PITCH>()) {
                    (MOST_PITCH, Some(numbers), Some(out)) => *out = *numbers,
                    _ => out[..self.pitch].copy_from_slice(&numbers[..self.pitch]),
                }
            }
        }
    }

    /// A strip of M `[inputs, STRIP]`, of these rows, those of g `[rows, STRIP]` and a strip of W0.
    fn compose<S: Simd>(
        self,
        simd: S,
        (packed, g): (&[f32], &[f32]),
        weight: &[f32],
        out: &mut [f32],
        ahead: Pieces<'_>,
    ) {
        let tiles = self.inputs.div_ceil(self.most) * self.rows.div_ceil(ROWS);
        let mut ahead = Ahead::new(ahead, tiles);
        let is_whole = self.rows <= ROWS;
        if !is_whole {
            out.fill(0.0);
        }
        for (first, g) in (0..self.rows).step_by(ROWS).zip(g.chunks(ROWS * STRIP)) {
            for (tile, inputs) in self.tiles().enumerate() {
                ahead.fetch();
                let numbers = inputs.start * STRIP..inputs.end * STRIP;
                Compose {
                    inner: &packed[(tile * self.rows + first) * self.pitch..],
                    pitch: self.pitch,
                    outer: g,
                    terms: g.len() / STRIP,
                    offset: 0.0,
                    weight: is_whole.then_some(&weight[numbers.clone()]),
                    out: &mut out[numbers],
                }
                .run(simd);
            }
        }
        if !is_whole {
            vectorised(
                simd,
                #[inline(always)]
                || out.iter_mut().zip(weight).for_each(|(out, weight)| *out *= weight),
            );
        }
    }
}

/// The tasks of a group.
struct TileSums<'a, S> {
    inputs: &'a Inputs<'a, S>,
    extents: Extents,
    strips: &'a [f32],
    vectors: &'a [f32],
    /// `[in_vectors, d]`
    in_gradients: Shared<f32>,
    partial: Shared<f32>,
}

impl<S: Simd> TileSums<'_, S> {
    /// One task of an adapter.
    fn run(&self, adapter: &AdapterGradient, own: &OuterAdapter, task: usize, scratch: &mut Scratch) {
        let Extents { pitch, .. } = self.extents;
        let outs = adapter.out_scales.len();
        // SAFETY: the sums outlive the group's tasks, and these are the task's own.
        let out_sums = unsafe { self.partial.slice(own.partial + task * outs * pitch, outs * pitch) };
        out_sums.fill(0.0);
        scratch.scale_places.clear();
        scratch.scale_places.extend((0..outs).map(|scale| scale * pitch));
        scratch.places.clear();
        scratch.places.extend((0..adapter.in_scales.len()).map(|scale| scale * PITCH));
        let all = self.extents.inputs(task);
        for first in all.clone().step_by(TILE_STRIPS * STRIP) {
            let inputs = first..all.end.min(first + TILE_STRIPS * STRIP);
            self.tile(adapter, own, inputs, out_sums, scratch);
        }
    }

    /// The inputs of one tile: all of their in-scales' gradients, and their share of the out-scales'.
    fn tile(
        &self,
        adapter: &AdapterGradient,
        own: &OuterAdapter,
        inputs: Range<usize>,
        out_sums: &mut [f32],
        scratch: &mut Scratch,
    ) {
        let Scratch { decoded, composed, x: packed, inner, sums, products, places, scale_places, .. } = scratch;
        let Inputs { simd, layer, x: rows, .. } = *self.inputs;
        let (outs, ins) = (adapter.out_scales.len(), adapter.in_scales.len());
        let x = PackedRows::of::<S>(inputs.len(), own.rows);
        let packed = packed.floats(x.len());
        x.pack(rows, adapter.row_indices(), inputs.start, packed);
        let partners = inner.floats(outs * X_PITCH);
        for (partner, out) in adapter.out_scales.iter().zip(partners.chunks_exact_mut(X_PITCH)) {
            partner_vector(layer.in_pool, *partner, inputs.start, &mut out[..inputs.len()]);
        }
        let in_sums = sums.floats(ins * PITCH);
        in_sums.fill(0.0);
        let by_inputs =
            Tiles { x: partners, form: Form::Floats, depth: inputs.len(), places: scale_places, scales: None };
        for strip in 0..self.extents.strips {
            let weight = layer.weight.read(simd, strip, inputs.clone(), decoded);
            let tile = composed.floats(weight.len());
            let outer = &self.strips[own.strips + strip * own.rows * STRIP..][..own.rows * STRIP];
            let next = strip + 1;
            let stored = || layer.weight.stored(next, inputs.clone());
            let ahead = if next < self.extents.strips { stored() } else { Pieces::default() };
            x.compose(simd, (packed, outer), weight, tile, ahead);
            let weight = Columns { values: tile, pitch: STRIP };
            let (column, ahead) = (strip * STRIP, Pieces::default());
            let part = StripPart { weight, depth: 0..inputs.len(), column, ahead };
            by_inputs.multiply(simd, &part, &mut [], out_sums);
            if ins > 0 {
                self.add_turned(own, ins, strip, (tile, products), (places, in_sums));
            }
        }
        for (scale, sums) in in_sums.chunks_exact(PITCH).enumerate() {
            let first = (adapter.first_in as usize + scale) * self.extents.d + inputs.start;
            // SAFETY: the gradients outlive the group's tasks, and no other has these inputs of this adapter.
            let gradient = unsafe { self.in_gradients.slice(first, inputs.len()) };
            gradient.copy_from_slice(&sums[..inputs.len()]);
        }
    }

    /// Turns a strip's tile of M `[inputs, STRIP]`, and adds the products with the out-vectors once there are [`TURNED`] strips.
    fn add_turned(
        &self,
        own: &OuterAdapter,
        ins: usize,
        strip: usize,
        (tile, turned): (&[f32], &mut Buffer),
        (places, in_sums): (&[usize], &mut [f32]),
    ) {
        let Extents { k, strips, .. } = self.extents;
        let simd = self.inputs.simd;
        let columns = strip / TURNED * TURNED * STRIP..k.min((strip + 1) * STRIP);
        let first = strip % TURNED * STRIP;
        let blocks = tile.chunks(STRIP * STRIP);
        let turned = turned.floats(blocks.len() * TURNED_LEN);
        for (block, turned) in blocks.zip(turned.chunks_exact_mut(TURNED_LEN)) {
            transpose(simd, block, &mut turned[first * STRIP..columns.len() * STRIP]);
        }
        if strip % TURNED + 1 < TURNED && strip + 1 < strips {
            return;
        }
        let slice = columns.start / SLICE * ins * X_PITCH;
        let vectors = &self.vectors[own.vectors + slice..][..ins * X_PITCH];
        let x = &vectors[columns.start % SLICE..];
        let by_columns = Tiles { x, form: Form::Floats, depth: columns.len(), places, scales: None };
        for (at, turned) in turned.chunks_exact(TURNED_LEN).enumerate() {
            let (weight, column) = (Columns { values: turned, pitch: STRIP }, at * STRIP);
            let part = StripPart { weight, depth: 0..columns.len(), column, ahead: Pieces::default() };
            by_columns.multiply(simd, &part, &mut [], in_sums);
        }
    }
}

/// Adds the tasks' sums of an adapter to its gradients, in the order of the inputs.
fn add_up<S: Simd>(simd: S, extents: Extents, adapter: &AdapterGradient, partial: &[f32], gradients: &mut [f32]) {
    let Extents { k, pitch, tasks, .. } = extents;
    let outs = adapter.out_scales.len();
    let own = &mut gradients[adapter.first_out as usize * k..][..outs * k];
    own.par_chunks_exact_mut(k).enumerate().for_each(|(scale, gradient)| {
        for task in 0..tasks {
            let sums = &partial[(task * outs + scale) * pitch..][..k];
            vectorised(
                simd,
                #[inline(always)]
                || gradient.iter_mut().zip(sums).for_each(|(gradient, sum)| *gradient += sum),
            );
        }
    });
}
