//! The second half of the low-rank sum, y += h @ a: within the pass over the base weight where it is fused, and after it where it isn't.

use std::ops::Range;

use flora_plan::schedule::LowRankRows;
use pulp::{Simd, WithSimd};

use crate::buffer::Buffer;
use crate::factors::scatter;
use crate::fetch::{Ahead, Pieces};
use crate::frame::Frame;
use crate::kernel::{Columns, Form, tile_columns, tile_rows};
use crate::layout::{SLICE, STRIP, X_PITCH};
use crate::pack::Vectors;
use crate::partition::{PANEL_COLUMNS, even_tiles, panels};
use crate::pool::Pool;
use crate::scratch::Scratch;
use crate::tiles::{StripPart, Tiles};
use crate::values::{Shared, Values};

/// Rows whose outputs are fetched, added to and put back at a time, and that share the expand vectors' strips.
const EXPANDED_ROWS: usize = 256;

/// Adds the low-rank sums of the batch's rows `range` to sums of theirs, `pitch` apart. `hidden` holds the h of one run after the
/// other's.
pub(crate) fn expand_rows<S: Simd>(
    frame: &Frame<'_, S>,
    (runs, mut hidden): (&[LowRankRows], &[f32]),
    range: &Range<usize>,
    (sums, pitch): (&mut [f32], usize),
    scratch: &mut Scratch,
) {
    for run in runs {
        let (run_hidden, rest) = hidden.split_at(run.rows as usize * run.rank as usize);
        hidden = rest;
        let first = run.first_row as usize;
        let rows = first.max(range.start)..(first + run.rows as usize).min(range.end);
        if !rows.is_empty() {
            let run_hidden = &run_hidden[(rows.start - first) * run.rank as usize..];
            let sums = &mut sums[(rows.start - range.start) * pitch..];
            expand(frame, run, (rows.len(), run_hidden), (sums, pitch), scratch);
        }
    }
}

/// Adds h @ a to `rows` rows of sums, `pitch` apart. `hidden` begins with the first row's.
fn expand<S: Simd>(
    frame: &Frame<'_, S>,
    run: &LowRankRows,
    (rows, hidden): (usize, &[f32]),
    (sums, pitch): (&mut [f32], usize),
    Scratch { x, outer, row, places, .. }: &mut Scratch,
) {
    let rank = run.rank as usize;
    places.clear();
    places.extend((0..rows).map(|row| row * pitch));
    let x = x.floats(rows * X_PITCH);
    for first in (0..rank).step_by(SLICE) {
        let ranks = first..(first + SLICE).min(rank);
        for (x, hidden) in x.chunks_exact_mut(X_PITCH).zip(hidden.chunks_exact(rank)) {
            x[..ranks.len()].copy_from_slice(&hidden[ranks.clone()]);
        }
        let tiles = Tiles { x, form: Form::Floats, depth: ranks.len(), places, scales: None };
        let slot = (run.expand as usize + first) * frame.out_pool.width;
        // Vectors that a single tile needs are read where they lie, but for the strip that isn't whole.
        let (in_place, whole) = match frame.out_pool.values {
            Values::F32(values) if rows <= tile_rows::<S>() => {
                (values.get(slot + frame.columns.start..).unwrap_or_default(), frame.columns.len() / STRIP)
            }
            _ => (&[][..], 0),
        };
        let packed = outer.floats((frame.strips() - whole) * ranks.len() * STRIP);
        if whole < frame.strips() {
            let row = row.floats(frame.width());
            for (at, slot) in ranks.clone().enumerate() {
                frame.out_vector(run.expand + slot as u32 + 1, row);
                scatter(&row[whole * STRIP..], at, ranks.len(), packed);
            }
        }
        for strip in 0..frame.strips() {
            let weight = match strip.checked_sub(whole) {
                None => Columns { values: &in_place[strip * STRIP..], pitch: frame.out_pool.width },
                Some(at) => Columns { values: &packed[at * ranks.len() * STRIP..], pitch: STRIP },
            };
            let strip = StripPart { weight, depth: 0..ranks.len(), column: strip * STRIP, ahead: Pieces::default() };
            tiles.multiply(frame.simd, &strip, &mut [], sums);
        }
    }
}

/// The same for a strip of the rows `range`, all at once: where every row has a run of its own, calls for each strip of each would take
/// longer than what they do. `ahead` are the columns that are needed next.
pub(crate) fn expand_strip<S: Simd>(
    frame: &Frame<'_, S>,
    (runs, hidden): (&[LowRankRows], &[f32]),
    range: &Range<usize>,
    ahead: Range<usize>,
    sums: &mut [[f32; STRIP]],
    widened: &mut Buffer,
) {
    frame.simd.vectorize(ExpandStrip {
        out_pool: frame.out_pool,
        columns: &frame.columns,
        runs,
        hidden,
        range,
        ahead,
        sums,
        widened,
    });
}

/// [`expand_strip`]
struct ExpandStrip<'a> {
    out_pool: Vectors<'a>,
    columns: &'a Range<usize>,
    runs: &'a [LowRankRows],
    hidden: &'a [f32],
    range: &'a Range<usize>,
    ahead: Range<usize>,
    /// From the range's first row on.
    sums: &'a mut [[f32; STRIP]],
    widened: &'a mut Buffer,
}

impl WithSimd for ExpandStrip<'_> {
    type Output = ();

    #[inline(always)]
    fn with_simd<S: Simd>(self, simd: S) {
        let Self { out_pool, columns, runs, mut hidden, range, ahead, sums, widened } = self;
        for run in runs {
            let (first, count, rank) = (run.first_row as usize, run.rows as usize, run.rank as usize);
            let (run_hidden, rest) = hidden.split_at(count * rank);
            hidden = rest;
            let rows = first.max(range.start)..(first + count).min(range.end);
            if rows.is_empty() {
                continue;
            }
            let hidden = &run_hidden[(rows.start - first) * rank..(rows.end - first) * rank];
            let sums = &mut sums[rows.start - range.start..rows.end - range.start];
            for ranks in (0..rank).step_by(SLICE).map(|first| first..rank.min(first + SLICE)) {
                let slots = run.expand as usize + ranks.start..run.expand as usize + ranks.end;
                Ahead::new(out_pool.pieces(slots.clone(), ahead.clone()), 1).fetch();
                let vectors = strip_of(out_pool, slots, columns, widened);
                let hidden = |row: usize| &hidden[row * rank..][ranks.clone()];
                let whole = rows.len() / EXPANDED_TOGETHER * EXPANDED_TOGETHER;
                let (many, single) = sums.split_at_mut(whole);
                for (at, sums) in many.chunks_exact_mut(EXPANDED_TOGETHER).enumerate() {
                    let hidden = std::array::from_fn(|row| hidden(at * EXPANDED_TOGETHER + row));
                    add::<S, EXPANDED_TOGETHER>(simd, hidden, vectors, sums);
                }
                for (at, sums) in single.chunks_exact_mut(1).enumerate() {
                    add::<S, 1>(simd, [hidden(whole + at)], vectors, sums);
                }
            }
        }
    }
}
/// The columns of some vectors as a strip, where they lie or widened.
#[inline(always)]
fn strip_of<'b>(
    pool: Vectors<'b>,
    slots: Range<usize>,
    columns: &Range<usize>,
    widened: &'b mut Buffer,
) -> Columns<'b> {
    match pool.values {
        Values::F32(values) if columns.len() == STRIP => {
            Columns { values: &values[slots.start * pool.pitch + columns.start..], pitch: pool.pitch }
        }
        _ => {
            let widened = widened.floats(slots.len() * STRIP);
            for (slot, out) in slots.zip(widened.chunks_exact_mut(STRIP)) {
                let (numbers, padding) = out.split_at_mut(columns.len());
                pool.widen(slot, columns.start, numbers);
                padding.fill(0.0);
            }
            Columns { values: widened, pitch: STRIP }
        }
    }
}

/// Adds the products of rows of h with a strip of expand vectors to the rows' sums.
#[inline(always)]
fn add<S: Simd, const ROWS: usize>(simd: S, hidden: [&[f32]; ROWS], vectors: Columns<'_>, sums: &mut [[f32; STRIP]]) {
    for column in (0..STRIP).step_by(tile_columns::<S>()) {
        let mut products = [[simd.splat_f32s(0.0); 2]; ROWS];
        for at in 0..hidden[0].len() {
            let vector = S::as_simd_f32s(&vectors.values[at * vectors.pitch + column..][..tile_columns::<S>()]).0;
            for (products, hidden) in products.iter_mut().zip(hidden) {
                let hidden = simd.splat_f32s(hidden[at]);
                products[0] = simd.mul_add_e_f32s(hidden, vector[0], products[0]);
                products[1] = simd.mul_add_e_f32s(hidden, vector[1], products[1]);
            }
        }
        for (sums, products) in sums.iter_mut().zip(products) {
            let sums = S::as_mut_simd_f32s(&mut sums[column..column + tile_columns::<S>()]).0;
            sums[0] = simd.add_f32s(sums[0], products[0]);
            sums[1] = simd.add_f32s(sums[1], products[1]);
        }
    }
}

/// Rows of a run that share the loads of its expand vectors.
const EXPANDED_TOGETHER: usize = 4;

/// Adds h @ a to outputs `[tokens, k]` that are in memory already; `hidden` holds the h of one run after the other's.
pub(crate) fn expand_all<S: Simd>(
    simd: S,
    (in_pool, out_pool): (Vectors<'_>, Vectors<'_>),
    runs: &[LowRankRows],
    hidden: &[f32],
    outputs: &mut [f32],
    scratches: &Pool<Scratch>,
) {
    let k = out_pool.width;
    let outputs = Shared::new(outputs);
    panels((k, PANEL_COLUMNS), 1, hidden.len() as u64 * k as u64, |columns, _| {
        let frame = Frame { simd, in_pool, out_pool, columns: columns.clone() };
        scratches.lend(|scratch| {
            let mut buffer = std::mem::take(&mut scratch.sums);
            let mut hidden = hidden;
            for run in runs {
                let (run_hidden, rest) = hidden.split_at(run.rows as usize * run.rank as usize);
                hidden = rest;
                for Range { start: first, end } in even_tiles(run.rows as usize, EXPANDED_ROWS) {
                    let rows = end - first;
                    let sums = buffer.floats(rows * frame.pitch());
                    // SAFETY: the outputs outlive the call, and no other task has these columns.
                    let output = |row: usize| unsafe {
                        outputs.slice((run.first_row as usize + first + row) * k + columns.start, columns.len())
                    };
                    for (at, sums) in sums.chunks_exact_mut(frame.pitch()).enumerate() {
                        sums[..columns.len()].copy_from_slice(output(at));
                    }
                    let rows_hidden = &run_hidden[first * run.rank as usize..];
                    expand(&frame, run, (rows, rows_hidden), (sums, frame.pitch()), scratch);
                    for (at, sums) in sums.chunks_exact(frame.pitch()).enumerate() {
                        output(at).copy_from_slice(&sums[..columns.len()]);
                    }
                }
            }
            scratch.sums = buffer;
        });
    });
}
