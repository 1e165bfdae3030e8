//! One pass over a base weight for rows of every kind, panel of columns by panel of columns.
//!
//! A task owns a panel of columns. For every slice of the depth it decodes the panel of W0 once, into the second-level cache, and
//! uses it for all rows of the block: tiles of virtual rows multiply it as it is, and every `on_chip` segment first turns each
//! strip into its own W_i. The outputs of the block stay in cache until their low-rank sum and epilogue are applied, and are
//! written once. Tasks share nothing, so the order of every sum is fixed.

use std::ops::Range;

use flora_plan::schedule::{LowRankRows, OnChipSegment, Scale, VirtualRow};
use pulp::Simd;

use crate::finish::Finish;
use crate::frame::{Frame, PANEL_COLUMNS, blocks, even_tiles, panels};
use crate::kernel::{MOST_TILE_ROWS, Multiply, NO_SCALES, OutScales, SLICE, Strip, X_PITCH, strip_columns, tile_rows};
use crate::low_rank::expand;
use crate::pack::{Vectors, Weight, fetch_row, pack_panel, pack_rows, strip_pitch};
use crate::strips::{Strips, Tile};
use crate::values::{Sink, Values};
use crate::workspace::{Buffer, Pool, Scratch};

/// The rows of a pass; the fields are those of [`Gemm`](flora_plan::schedule::Gemm).
#[derive(Clone, Copy, Default)]
pub(crate) struct Rows<'a> {
    pub(crate) rows: &'a [VirtualRow],
    pub(crate) segments: &'a [OnChipSegment],
    pub(crate) scales: &'a [Scale],
    pub(crate) low_rank: &'a [LowRankRows],
}

impl<'a> Rows<'a> {
    /// Virtual rows alone.
    pub(crate) fn plain(rows: &'a [VirtualRow]) -> Self {
        Self { rows, ..Self::default() }
    }
}

/// The most rows that can read the weight where it lies. Few rows are quicker so than by packing the weight: packing waits for
/// memory, a sweep multiplies meanwhile. Measured at d = k = 2048: 1.6 times as fast at 16 rows, 1.2 at 32, 1.02 at 96 and 128, and
/// no longer at 160, where the products don't stay in cache. Tuning says up to how many rows a sweep is worth it on a processor.
pub(crate) const MOST_SWEPT_ROWS: usize = 128;

/// Columns of a panel for so many rows: at most a page of each of the weight's, and products that stay in cache.
fn swept_columns(rows: usize) -> usize {
    (32768 / rows.max(1)).clamp(PANEL_COLUMNS, 1024)
}

/// What a pass reads and writes.
#[derive(Clone, Copy)]
pub(crate) struct Pass<'a> {
    pub(crate) weight: Weight<'a>,
    /// `[tokens, d]`
    pub(crate) x: Vectors<'a>,
    /// `[slots, d]`
    pub(crate) in_pool: Vectors<'a>,
    /// `[slots, k]`
    pub(crate) out_pool: Vectors<'a>,
    pub(crate) rows: Rows<'a>,
    /// x @ b of every row of `rows.low_rank`, one run after the other.
    pub(crate) hidden: &'a [f32],
    /// `None`: the sums are written as they are.
    pub(crate) finish: Option<Finish<'a>>,
    /// `[tokens, k]`
    pub(crate) sink: Sink,
    /// Virtual rows up to which the weight is read where it lies, at most [`MOST_SWEPT_ROWS`].
    pub(crate) swept_rows: usize,
}

/// Runs a pass.
pub(crate) fn run<S: Simd>(simd: S, pass: Pass<'_>, scratches: &Pool<Scratch>) {
    let k = pass.out_pool.width;
    let rows: u64 =
        pass.rows.rows.len() as u64 + pass.rows.segments.iter().map(|segment| u64::from(segment.rows)).sum::<u64>();
    let macs = rows * pass.x.width as u64 * k as u64;
    let rows = pass.rows;
    let in_place = rows.segments.is_empty() && rows.rows.len() <= pass.swept_rows && pass.weight.floats().is_some();
    let widest = if in_place { swept_columns(rows.rows.len()) } else { PANEL_COLUMNS };
    panels::<S>(k, widest, macs, |columns| {
        let frame = Frame { simd, in_pool: pass.in_pool, out_pool: pass.out_pool, columns };
        scratches.lend(|scratch| Panel { frame, pass: &pass }.run(scratch));
    });
}

/// A panel of a pass.
struct Panel<'a, S> {
    frame: Frame<'a, S>,
    pass: &'a Pass<'a>,
}

/// The rows of a block.
struct Block<'a> {
    /// Of the batch.
    range: Range<usize>,
    rows: &'a [VirtualRow],
    segments: &'a [OnChipSegment],
}

impl<'a> Block<'a> {
    fn of(gemm: Rows<'a>, range: Range<usize>) -> Self {
        let before = |end: usize| gemm.rows.partition_point(|row| (row.row as usize) < end);
        let ends_before = |segment: &OnChipSegment| segment.first_row as usize + segment.rows as usize <= range.start;
        let first = gemm.segments.partition_point(ends_before);
        let last = gemm.segments.partition_point(|segment| (segment.first_row as usize) < range.end);
        Self {
            rows: &gemm.rows[before(range.start)..before(range.end)],
            segments: &gemm.segments[first..last.max(first)],
            range,
        }
    }

    /// Whether its rows are few enough to read the weight once, and where it lies.
    fn sweeps(&self, swept_rows: usize) -> bool {
        self.segments.is_empty() && self.rows.len() <= swept_rows
    }

    fn rows_of(&self, segment: &OnChipSegment) -> Range<usize> {
        clip(segment.first_row, segment.rows, &self.range)
    }
}

/// The part of a run of rows that lies in a block.
fn clip(first: u32, rows: u32, range: &Range<usize>) -> Range<usize> {
    let (first, end) = (first as usize, first as usize + rows as usize);
    first.clamp(range.start, range.end)..end.clamp(range.start, range.end)
}

impl<S: Simd> Panel<'_, S> {
    fn run(&self, scratch: &mut Scratch) {
        let gemm = self.pass.rows;
        let last_row = gemm.rows.last().map_or(0, |row| row.row as usize + 1);
        let last_segment = gemm.segments.last().map_or(0, |segment| segment.first_row as usize + segment.rows as usize);
        let end = last_row.max(last_segment);
        for range in blocks(end) {
            let block = Block::of(gemm, range);
            if block.rows.is_empty() && block.segments.is_empty() {
                continue;
            }
            let sums = block.range.len() * self.frame.width();
            scratch.sums.floats(sums).fill(0.0);
            for depth in (0..self.pass.x.width).step_by(SLICE) {
                self.slice(&block, depth..(depth + SLICE).min(self.pass.x.width), scratch);
            }
            self.add_low_rank(&block, scratch);
            self.write(&block, scratch);
        }
    }

    /// Adds the products of one slice of the depth.
    fn slice(&self, block: &Block<'_>, depth: Range<usize>, scratch: &mut Scratch) {
        let Scratch { panel, row, x, scales, sums, products, .. } = scratch;
        let (k, strip) = (self.pass.out_pool.width, strip_columns::<S>());
        // Rows of a single tile need the weight once, and read it where it lies: all but the strip that isn't whole.
        let (in_place, whole) = match self.pass.weight.floats() {
            Some(values) if block.sweeps(self.pass.swept_rows) => (
                values.get(depth.start * k + self.frame.columns.start..).unwrap_or_default(),
                self.frame.columns.len() / strip,
            ),
            _ => (&[][..], 0),
        };
        let packed = panel.floats((self.frame.strips() - whole) * strip_pitch::<S>());
        if whole < self.frame.strips() {
            let columns = self.frame.columns.start + whole * strip..self.frame.columns.end;
            let row = row.floats(self.frame.width());
            pack_panel(self.frame.simd, self.pass.weight, k, depth.clone(), columns, row, packed);
        }
        let (mut places, mut scale_places) = ([0; MOST_SWEPT_ROWS], [NO_SCALES; MOST_SWEPT_ROWS]);
        let width = self.frame.width();
        let most = if block.sweeps(self.pass.swept_rows) { MOST_SWEPT_ROWS } else { tile_rows::<S>() };
        let strips = Strips { in_place, pitch: k, whole, packed, strip_pitch: strip_pitch::<S>(), columns: width };
        for tile in even_tiles(block.rows.len(), most) {
            // The next tile's operands are fetched a few at a time while this one is multiplied.
            let share = (tile.len() + 1).div_ceil(self.frame.strips());
            let mut next = block.rows[tile.end..].iter().take(tile.len() + 1);
            let rows = &block.rows[tile];
            let x = x.floats(rows.len() * X_PITCH);
            let sources = rows.iter().map(|row| (row.row, row.in_slot));
            pack_rows(self.frame.simd, self.pass.x, self.pass.in_pool, sources, depth.clone(), x);
            let scales = self.out_scales(rows, scales, &mut scale_places);
            let sums = sums.floats(block.range.len() * width);
            for (place, row) in places.iter_mut().zip(rows) {
                *place = (row.row as usize - block.range.start) * width;
            }
            let tile = Tile { x, depth: depth.len(), places: &places[..rows.len()], scales, sums };
            strips.multiply(self.frame.simd, tile, products, || {
                for row in next.by_ref().take(share) {
                    fetch_row(self.pass.x, self.pass.in_pool, (row.row, row.in_slot), &depth);
                    self.frame.fetch_out_vector(row.out_slot);
                }
            });
        }
        for segment in block.segments {
            self.segment(block, segment, depth.clone(), scratch);
        }
    }

    /// The out-scales of a tile's rows, and where each row's begin: in the pool if their numbers can be read there, else in `copies`.
    fn out_scales<'s>(
        &'s self,
        rows: &[VirtualRow],
        copies: &'s mut Buffer,
        places: &'s mut [usize; MOST_SWEPT_ROWS],
    ) -> Option<OutScales<'s>> {
        if rows.iter().all(|row| row.out_slot == 0) {
            return None;
        }
        let Range { start, end } = self.frame.columns;
        let pool = self.pass.out_pool;
        let (width, places) = (self.frame.width(), &mut places[..rows.len()]);
        let values = match pool.values {
            // Whole strips alone, because a strip that isn't would be read beyond the vector's end.
            Values::F32(values) if end - start == width => {
                for (place, row) in places.iter_mut().zip(rows) {
                    *place = row.out_slot.checked_sub(1).map_or(NO_SCALES, |slot| slot as usize * pool.width + start);
                }
                values
            }
            _ => {
                let copies = copies.floats(rows.len() * width);
                for (at, ((place, row), copy)) in
                    places.iter_mut().zip(rows).zip(copies.chunks_exact_mut(width)).enumerate()
                {
                    *place = if row.out_slot > 0 { at * width } else { NO_SCALES };
                    if row.out_slot > 0 {
                        self.frame.out_vector(row.out_slot, copy);
                    }
                }
                copies
            }
        };
        Some(OutScales { values, places })
    }

    /// The products of an `on_chip` segment's rows with its own weight, of which one strip is in being at a time.
    fn segment(&self, block: &Block<'_>, segment: &OnChipSegment, depth: Range<usize>, scratch: &mut Scratch) {
        let Scratch { panel, composed, x, inner, outer, sums, row, .. } = scratch;
        let rows = block.rows_of(segment);
        let scales = &self.pass.rows.scales[segment.first_scale as usize..segment.end_scale as usize];
        let x = x.floats(rows.len() * X_PITCH);
        let sources = rows.clone().map(|row| (row as u32, 0));
        pack_rows(self.frame.simd, self.pass.x, self.pass.in_pool, sources, depth.clone(), x);

        let strip = strip_columns::<S>();
        let factors = self.frame.factors(scales.iter().copied(), depth.clone(), (inner, outer, row));
        let panel = panel.floats(self.frame.strips() * strip_pitch::<S>());
        let composed = composed.floats(depth.len() * strip);
        let (mut places, width) = ([0; MOST_TILE_ROWS], self.frame.width());
        let sums = sums.floats(block.range.len() * width);
        for (strip_at, weight) in panel.chunks_exact(strip_pitch::<S>()).enumerate() {
            factors.compose(self.frame.simd, strip_at, Some(&weight[..depth.len() * strip]), composed);
            let weight = Strip { values: composed, pitch: strip };
            for tile in even_tiles(rows.len(), tile_rows::<S>()) {
                let first_row = rows.start - block.range.start + tile.start;
                for (at, place) in places.iter_mut().enumerate() {
                    *place = (first_row + at) * width + strip_at * strip;
                }
                let (x, places) = (&x[tile.start * X_PITCH..], &places[..tile.len()]);
                Multiply { x, depth: depth.len(), weight, places, scales: None, sums }.run(self.frame.simd);
            }
        }
    }

    /// Adds the low-rank sums of the block's rows.
    fn add_low_rank(&self, block: &Block<'_>, scratch: &mut Scratch) {
        let mut buffer = std::mem::take(&mut scratch.sums);
        let sums = buffer.floats(block.range.len() * self.frame.width());
        let mut hidden = self.pass.hidden;
        for run in self.pass.rows.low_rank {
            let (own, rest) = hidden.split_at(run.rows as usize * run.rank as usize);
            hidden = rest;
            let rows = clip(run.first_row, run.rows, &block.range);
            if !rows.is_empty() {
                let own = &own[(rows.start - run.first_row as usize) * run.rank as usize..];
                let first_sum = (rows.start - block.range.start) * self.frame.width();
                expand(&self.frame, run, rows.len(), own, &mut sums[first_sum..], scratch);
            }
        }
        scratch.sums = buffer;
    }

    /// Finishes and writes the block's outputs.
    fn write(&self, block: &Block<'_>, scratch: &mut Scratch) {
        let Scratch { sums, row, .. } = scratch;
        let (k, width) = (self.pass.out_pool.width, self.frame.width());
        let (sums, spare) = (sums.floats(block.range.len() * width), row.floats(width));
        let (columns, spare) = (self.frame.columns.len(), &mut spare[..self.frame.columns.len()]);
        let stacked = block.rows.iter().filter(|row| row.last == 1).map(|row| row.row as usize);
        for row in stacked.chain(block.segments.iter().flat_map(|segment| block.rows_of(segment))) {
            let outputs = &mut sums[(row - block.range.start) * width..][..columns];
            if let Some(finish) = &self.pass.finish {
                finish.apply(self.frame.simd, (row, self.frame.columns.start, k), outputs, spare);
            }
            // SAFETY: y outlives the pass, a row is written once, and no other task has these columns.
            unsafe { self.pass.sink.write(row * k + self.frame.columns.start, outputs) };
        }
    }
}
