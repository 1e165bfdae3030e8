//! One pass over a base weight for rows of every kind, panel of columns by panel of columns and block of rows by block of rows.
//!
//! A task owns a panel's outputs of a block. For every slice of the depth it packs rows, as many as fit the second-level cache with
//! a strip of the weight, and takes strip after strip for all of them: tiles of virtual rows multiply it as it is, and every
//! `on_chip` segment first turns it into its own W_i, a part at a time. Low-rank sums and the epilogue follow, and outputs are
//! written once. Tasks share nothing, so the order of every sum is fixed.

use std::ops::Range;

use flora_plan::schedule::{OnChipSegment, ScheduledRow};
use pulp::Simd;

use crate::block_scales::BlockScales;
use crate::buffer::Buffer;
use crate::byte_tiles::BytePart;
use crate::expand::expand_rows;
use crate::factors::Factors;
use crate::fetch::Pieces;
use crate::frame::Frame;
use crate::kernel::{Columns, Form, NO_SCALES, OutScales};
use crate::layout::{PAIRED_SLICE, SLICE, STRIP, X_PITCH};
use crate::matrix_unit::{MatrixUnit, UNIT_ROWS};
use crate::pack::{Vectors, pack_rows};
use crate::pairs::{pack_pairs, round_pairs};
use crate::partition::{BYTE_PANEL_COLUMNS, PANEL_COLUMNS, UNIT_PANEL_COLUMNS, blocks, even_part, even_tiles, panels};
use crate::pass::{Pass, Rows};
use crate::pool::Pool;
use crate::products::Pairs;
use crate::rounded::{BYTE_SLICE, Rounding};
use crate::scratch::Scratch;
use crate::straight::Straight;
use crate::terms::{PackedSegment, Terms};
use crate::tiles::{StripPart, Tiles};
use crate::values::Values;
use crate::weight::Strips;

/// Inputs of a strip that are decoded or composed at a time: as large as two thirds of the first-level cache.
const PART: usize = 256;

/// Rows and in-vectors that are packed at a time. A slice of them stays in the second-level cache beside a strip, and every strip
/// serves all of them.
const PACKED: usize = 192;

/// The form in which x is multiplied by a weight fastest, rounded to 8 bits where that is allowed. The bits of a row depend on it, so
/// that it is the same for all rows of a layer.
pub(crate) fn fastest<S: Simd>(weight: Strips<'_>, x: Vectors<'_>, unit: Option<MatrixUnit>, rounds: bool) -> Form {
    if let Some(rounding) = weight.quantisation().filter(|_| rounds).and_then(Rounding::of) {
        return Form::Bytes(rounding);
    }
    let both = weight.are_pairs() && matches!(x.values, Values::Bf16(_));
    if both && (unit.is_some() || Pairs::are_multiplied::<S>()) { Form::Pairs(unit) } else { Form::Floats }
}

/// Runs a pass.
pub(crate) fn run<S: Simd>(simd: S, pass: Pass<'_>, scratches: &Pool<Scratch>) {
    let Rows { rows, segments, .. } = pass.rows;
    let (d, k) = (pass.x.width, pass.out_pool.width);
    let products = rows.len() as u64 + segments.iter().map(|segment| u64::from(segment.rows)).sum::<u64>();
    let last_row = rows.last().map_or(0, |row| row.row as usize + 1);
    let end = last_row.max(segments.last().map_or(0, end_row));
    let count = blocks(end);
    let most = match pass.form {
        Form::Pairs(Some(_)) => UNIT_PANEL_COLUMNS,
        Form::Pairs(None) | Form::Floats => PANEL_COLUMNS,
        Form::Bytes(_) => BYTE_PANEL_COLUMNS,
    };
    panels((k, most), count, products * d as u64 * k as u64, |columns, at| {
        let Range { start: first, end } = even_part(end, count, at);
        let block = Block::of(pass.rows, whole_segments(segments, first)..whole_segments(segments, end));
        let frame = Frame { simd, in_pool: pass.in_pool, out_pool: pass.out_pool, columns };
        scratches.lend(|scratch| Panel { frame, pass: &pass }.run(&block, scratch));
    });
}

fn end_row(segment: &OnChipSegment) -> usize {
    segment.first_row as usize + segment.rows as usize
}

/// Where a block should end instead of at `row`, so that a segment's weights are made for one block alone: a short way from it.
fn whole_segments(segments: &[OnChipSegment], row: usize) -> usize {
    const SHORT: usize = 60;
    let after = segments.partition_point(|segment| end_row(segment) <= row);
    let Some(segment) = segments.get(after).filter(|segment| (segment.first_row as usize) < row) else { return row };
    let (back, ahead) = (row - segment.first_row as usize, end_row(segment) - row);
    match (back.min(ahead) <= SHORT, back < ahead) {
        (false, _) => row,
        (true, true) => row - back,
        (true, false) => row + ahead,
    }
}

/// A panel of a pass.
struct Panel<'a, S> {
    frame: Frame<'a, S>,
    pass: &'a Pass<'a>,
}

/// Inputs of a strip of the weight.
struct Piece<'a> {
    strip: usize,
    inputs: Range<usize>,
    /// The slice's first input.
    slice: usize,
    /// The strip's first column, counted from the panel's.
    column: usize,
    /// What the next one needs.
    ahead: Pieces<'a>,
}

impl<'a> Piece<'a> {
    /// Which inputs of the slice.
    fn depth(&self) -> Range<usize> {
        self.inputs.start - self.slice..self.inputs.end - self.slice
    }

    /// Its numbers `[inputs, STRIP]`, to be multiplied.
    fn part(&self, values: &'a [f32]) -> StripPart<'a> {
        let weight = Columns { values, pitch: STRIP };
        StripPart { weight, depth: self.depth(), column: self.column, ahead: self.ahead }
    }

    /// Its pairs, likewise.
    fn part_in_pairs(&self, pairs: &'a [u32]) -> StripPart<'a> {
        let Range { start, end } = self.depth();
        let weight = Columns { values: bytemuck::cast_slice(pairs), pitch: STRIP };
        StripPart { weight, depth: start / 2..Pairs::padded(end), column: self.column, ahead: self.ahead }
    }
}

/// The rows of a block.
struct Block<'a> {
    /// Of the batch.
    range: Range<usize>,
    rows: &'a [ScheduledRow],
    segments: &'a [OnChipSegment],
}

impl<'a> Block<'a> {
    fn of(gemm: Rows<'a>, range: Range<usize>) -> Self {
        let before = |end: usize| gemm.rows.partition_point(|row| (row.row as usize) < end);
        let ends_before = |segment: &OnChipSegment| end_row(segment) <= range.start;
        let first = gemm.segments.partition_point(ends_before);
        let last = gemm.segments.partition_point(|segment| (segment.first_row as usize) < range.end);
        Self {
            rows: &gemm.rows[before(range.start)..before(range.end)],
            segments: &gemm.segments[first..last.max(first)],
            range,
        }
    }

    /// How many of `segments`, one at least, are packed at a time.
    fn packed_together(&self, segments: &[OnChipSegment]) -> usize {
        let vectors =
            |segment: &OnChipSegment| self.rows_of(segment).len() + (segment.end_scale - segment.first_scale) as usize;
        let mut packed = 0;
        let fits = |segment: &&OnChipSegment| {
            packed += vectors(segment);
            packed <= PACKED
        };
        segments.iter().take_while(fits).count().max(1)
    }

    fn rows_of(&self, segment: &OnChipSegment) -> Range<usize> {
        clip(segment.first_row, segment.rows, &self.range)
    }
}

/// The depth in parts of at most `most` inputs.
fn slices(depth: usize, most: usize) -> impl Iterator<Item = Range<usize>> {
    (0..depth).step_by(most).map(move |first| first..depth.min(first + most))
}

/// The form of weights that segments make in a pass of this form: bytes have none of their own.
fn form_of_segments(form: Form) -> Form {
    match form {
        Form::Bytes(_) => Form::Floats,
        Form::Floats | Form::Pairs(_) => form,
    }
}

/// Rows that were packed in a form, of so many inputs.
fn tiles<'a>(
    form: Form,
    x: &'a [f32],
    depth: &Range<usize>,
    places: &'a [usize],
    scales: Option<OutScales<'a>>,
) -> Tiles<'a> {
    let depth = match form {
        Form::Floats | Form::Bytes(_) => depth.len(),
        Form::Pairs(_) => Pairs::padded(depth.len()),
    };
    Tiles { x, form, depth, places, scales }
}

/// The part of a run of rows that lies in a block.
fn clip(first: u32, rows: u32, range: &Range<usize>) -> Range<usize> {
    let (first, end) = (first as usize, first as usize + rows as usize);
    first.clamp(range.start, range.end)..end.clamp(range.start, range.end)
}

impl<S: Simd> Panel<'_, S> {
    fn run(&self, block: &Block<'_>, scratch: &mut Scratch) {
        if block.rows.is_empty() && block.segments.is_empty() {
            return;
        }
        if block.segments.is_empty()
            && let Some(straight) = Straight::of(self.pass, block.rows)
        {
            return straight.run(&self.frame, scratch);
        }
        scratch.sums.floats(block.range.len() * self.frame.pitch()).fill(0.0);
        for depth in slices(self.pass.x.width, self.most_inputs()) {
            for chunk in even_tiles(block.rows.len(), PACKED) {
                self.rows(block, &block.rows[chunk], depth.clone(), scratch);
            }
        }
        for depth in slices(self.pass.x.width, SLICE) {
            let mut rest = block.segments;
            while !rest.is_empty() {
                let (group, others) = rest.split_at(block.packed_together(rest));
                self.segments(block, group, depth.clone(), scratch);
                rest = others;
            }
        }
        self.add_low_rank(block, scratch);
        self.write(block, scratch);
    }

    /// The inputs of a slice of rows that are multiplied by the weight as it is.
    fn most_inputs(&self) -> usize {
        match self.pass.form {
            Form::Floats => SLICE,
            Form::Pairs(_) => PAIRED_SLICE,
            Form::Bytes(_) => BYTE_SLICE,
        }
    }

    /// The products of virtual rows with W0.
    fn rows(&self, block: &Block<'_>, rows: &[ScheduledRow], depth: Range<usize>, scratch: &mut Scratch) {
        let Scratch { decoded, x, scales, sums, products, places, scale_places, .. } = scratch;
        let (simd, pitch) = (self.frame.simd, self.frame.pitch());
        let source = |row: u32| self.pass.rows.sources.get(row as usize).copied().unwrap_or(row);
        let sources = rows.iter().map(|row| (source(row.row), row.in_slot));
        let form = self.pass.form;
        let x = self.packed(form, sources, rows.len(), depth.clone(), x);
        places.clear();
        places.extend(rows.iter().map(|row| (row.row as usize - block.range.start) * pitch));
        let scales = self.out_scales(rows, scales, scale_places);
        let tiles = tiles(form, x, &depth, places, scales);
        let sums = sums.floats(block.range.len() * pitch);
        if rows.len() == 1 && self.one_row(&depth, tiles, decoded, sums) {
            return;
        }
        let (weight, products) = (self.pass.weight, products.floats(rows.len() * STRIP));
        match form {
            Form::Floats => {
                let most = if weight.are_encoded() { PART } else { SLICE };
                self.strips(depth, most, |piece| {
                    let values = weight.read(simd, piece.strip, piece.inputs.clone(), decoded);
                    tiles.multiply(simd, &piece.part(values), products, sums);
                });
            }
            Form::Pairs(_) => self.strips(depth, PAIRED_SLICE, |piece| {
                let pairs = weight.pairs(piece.strip, piece.inputs.clone());
                tiles.multiply(simd, &piece.part_in_pairs(pairs), products, sums);
            }),
            Form::Bytes(rounding) => self.strips(depth, PART, |piece| {
                if let Some(weight) = weight.bytes(simd, piece.strip, piece.inputs.clone(), decoded) {
                    let Piece { column, ahead, .. } = piece;
                    let part = BytePart { weight, depth: piece.depth(), column, ahead };
                    tiles.multiply_bytes(simd, rounding, &part, products, sums);
                }
            }),
        }
    }

    /// So many rows of a slice of x.
    fn packed<'b>(
        &self,
        form: Form,
        sources: impl Iterator<Item = (u32, u32)>,
        rows: usize,
        depth: Range<usize>,
        out: &'b mut Buffer,
    ) -> &'b [f32] {
        // Any of them may be followed by rows that the matrix unit reads for nothing.
        out.floats((rows + UNIT_ROWS) * X_PITCH);
        let (simd, Pass { x, in_pool, .. }) = (self.frame.simd, self.pass);
        match form {
            Form::Floats => pack_rows(simd, *x, *in_pool, sources, depth, out.floats(rows * X_PITCH)),
            Form::Pairs(_) => pack_pairs(simd, *x, *in_pool, sources, depth, out.numbers_mut(rows * X_PITCH)),
            Form::Bytes(rounding) => {
                rounding.pack(simd, *x, *in_pool, sources, depth, out.numbers_mut(rows * X_PITCH));
            }
        }
        out.numbers()
    }

    /// The products of a single row with a quantised weight. Whether it is one.
    fn one_row(&self, slice: &Range<usize>, tiles: Tiles<'_>, decoded: &mut Buffer, sums: &mut [f32]) -> bool {
        let strips = self.frame.columns.start / STRIP..self.frame.columns.end.div_ceil(STRIP);
        let scales: &mut [BlockScales] = bytemuck::cast_slice_mut(decoded.floats(BlockScales::FLOATS));
        for (at, strip) in strips.enumerate() {
            let Some(words) = self.pass.weight.words(strip).filter(|_| tiles.form == Form::Floats) else {
                return false;
            };
            tiles.multiply_one(self.frame.simd, words, (slice.clone(), at * STRIP), &mut scales[0], sums);
        }
        true
    }

    /// Strip after strip of the panel, in parts of at most `most` inputs of a slice.
    fn strips(&self, slice: Range<usize>, most: usize, mut work: impl FnMut(Piece<'_>)) {
        let weight = self.pass.weight;
        let strips = self.frame.columns.start / STRIP..self.frame.columns.end.div_ceil(STRIP);
        for (at, strip) in strips.clone().enumerate() {
            for first in slice.clone().step_by(most) {
                let inputs = first..slice.end.min(first + most);
                let next = strip + 1;
                let ahead = if next < strips.end { weight.stored(next, inputs.clone()) } else { Pieces::default() };
                work(Piece { strip, inputs, slice: slice.start, column: at * STRIP, ahead });
            }
        }
    }

    /// The out-scales of virtual rows, and where each row's begin: in the pool if their numbers can be read there, else in `copies`.
    fn out_scales<'s>(
        &'s self,
        rows: &[ScheduledRow],
        copies: &'s mut Buffer,
        places: &'s mut Vec<usize>,
    ) -> Option<OutScales<'s>> {
        if rows.iter().all(|row| row.out_slot == 0) {
            return None;
        }
        let Range { start, end } = self.frame.columns;
        let (pool, width) = (self.pass.out_pool, self.frame.width());
        places.clear();
        let values = match pool.values {
            // Whole strips alone, because a strip that isn't would be read beyond the vector's end.
            Values::F32(values) if end - start == width => {
                let place =
                    |slot: u32| slot.checked_sub(1).map_or(NO_SCALES, |slot| slot as usize * pool.width + start);
                places.extend(rows.iter().map(|row| place(row.out_slot)));
                values
            }
            _ => {
                let copies = copies.floats(rows.len() * width);
                for (at, (row, copy)) in rows.iter().zip(copies.chunks_exact_mut(width)).enumerate() {
                    places.push(if row.out_slot > 0 { at * width } else { NO_SCALES });
                    if row.out_slot > 0 {
                        self.frame.out_vector(row.out_slot, copy);
                    }
                }
                copies
            }
        };
        Some(OutScales { values, places })
    }

    /// The products of `on_chip` segments, each with its own weight, of which a part of one strip is in being at a time.
    fn segments(&self, block: &Block<'_>, group: &[OnChipSegment], depth: Range<usize>, scratch: &mut Scratch) {
        let Scratch { decoded, composed, pairs, x, inner, outer, sums, products, row, places, segments, .. } = scratch;
        let (simd, pitch) = (self.frame.simd, self.frame.pitch());
        let scales_of = |segment: &OnChipSegment| {
            self.pass.rows.scales[segment.first_scale as usize..segment.end_scale as usize].iter().copied()
        };
        places.clear();
        segments.clear();
        let mut count = 0;
        for segment in group {
            let terms = Terms::of(scales_of(segment), count);
            count = terms.end();
            let first = places.len();
            places.extend(block.rows_of(segment).map(|row| (row - block.range.start) * pitch));
            segments.push(PackedSegment { rows: first..places.len(), terms });
        }
        let scales = group.iter().flat_map(scales_of);
        let factors = Factors::gather(&self.frame, scales, count, depth.clone(), (inner, outer, row));
        let sources = group.iter().flat_map(|segment| block.rows_of(segment)).map(|row| (row as u32, 0));
        let form = form_of_segments(self.pass.form);
        let x = self.packed(form, sources, places.len(), depth.clone(), x);

        let tiles = tiles(form, x, &depth, places, None);
        let sums = sums.floats(block.range.len() * pitch);
        let products = products.floats(places.len() * STRIP);
        self.strips(depth, PART, |mut piece| {
            let weight = self.pass.weight.read(simd, piece.strip, piece.inputs.clone(), decoded);
            let composed = composed.floats(weight.len());
            for PackedSegment { rows, terms } in segments.iter() {
                factors.compose(simd, terms, (piece.column / STRIP, piece.depth()), Some(weight), composed);
                let part = match form {
                    Form::Floats | Form::Bytes(_) => piece.part(composed),
                    Form::Pairs(_) => {
                        let pairs = pairs.numbers_mut(Pairs::padded(piece.inputs.len()) * STRIP);
                        piece.part_in_pairs(round_pairs(simd, composed, pairs))
                    }
                };
                tiles.rows(rows.clone()).multiply(simd, &part, &mut products[rows.start * STRIP..], sums);
                // The first segment fetches it for all.
                piece.ahead = Pieces::default();
            }
        });
    }

    /// Adds the low-rank sums of the block's rows.
    fn add_low_rank(&self, block: &Block<'_>, scratch: &mut Scratch) {
        let mut buffer = std::mem::take(&mut scratch.sums);
        let pitch = self.frame.pitch();
        let sums = buffer.floats(block.range.len() * pitch);
        expand_rows(&self.frame, (self.pass.rows.low_rank, self.pass.hidden), &block.range, (sums, pitch), scratch);
        scratch.sums = buffer;
    }

    /// Finishes and writes the block's outputs.
    fn write(&self, block: &Block<'_>, scratch: &mut Scratch) {
        let Scratch { sums, row, .. } = scratch;
        let (k, pitch) = (self.pass.out_pool.width, self.frame.pitch());
        let (sums, spare) = (sums.floats(block.range.len() * pitch), row.floats(self.frame.width()));
        let (columns, spare) = (self.frame.columns.len(), &mut spare[..self.frame.columns.len()]);
        let stacked = block.rows.iter().filter(|row| row.last == 1).map(|row| row.row as usize);
        for row in stacked.chain(block.segments.iter().flat_map(|segment| block.rows_of(segment))) {
            let outputs = &mut sums[(row - block.range.start) * pitch..][..columns];
            if let Some(finish) = &self.pass.finish {
                finish.apply(self.frame.simd, (row, self.frame.columns.start, k), outputs, spare);
            }
            // SAFETY: y outlives the pass, a row is written once, and no other task has these columns.
            unsafe { self.pass.sink.write(self.frame.simd, row, self.frame.columns.start, outputs) };
        }
    }
}
