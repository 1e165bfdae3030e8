//! Rows of x in 8 bits times stored numbers, four at a time: [`crate::tiles`] and [`crate::kernel`] for bytes.
//!
//! The products of a block's numbers are summed as integers, which is exact, and become a float that is scaled and added to the row's
//! sum. The floats come in rising order of the blocks, one fused multiply-add after the other, whichever tile a row lies in: a row has
//! the same bits in a tile of one row as in a tile of six. Processors without an instruction for bytes add the same integers as floats,
//! which are exact so far.

use std::ops::Range;

use pulp::{Simd, WithSimd};

use crate::block_scales::PIECE;
use crate::byte_products::{ByteProduct, Dots, ExactFloats};
use crate::decode::GROUP;
use crate::fetch::{Ahead, Pieces};
use crate::kernel::{NO_SCALES, OutScales, Part, add_products, load, store, tile_columns};
use crate::layout::{STRIP, X_PITCH};
use crate::partition::even_tiles;
use crate::rounded::{BEGINNINGS, BYTE_SLICE, Rounding, SCALES};
use crate::stored_bytes::{ByteColumns, GROUP_QUADS, QUAD};
use crate::tiles::Tiles;

/// The most rows of a tile on any instruction set.
const MOST_TILE_ROWS: usize = 6;

/// Rows of a tile: with the integers and the floats of two vectors a row, as many as leave room for the operands in the registers.
const fn tile_rows<S: Simd>() -> usize {
    if S::REGISTER_COUNT >= 32 { MOST_TILE_ROWS } else { 2 }
}

/// Inputs of a strip.
pub(crate) struct BytePart<'a> {
    pub(crate) weight: ByteColumns<'a>,
    /// Which inputs of the slice.
    pub(crate) depth: Range<usize>,
    /// The strip's first column, counted from the places.
    pub(crate) column: usize,
    /// What the products after these will need.
    pub(crate) ahead: Pieces<'a>,
}

impl Tiles<'_> {
    /// [`Tiles::multiply`] of rows that were rounded so.
    ///
    /// # Panics
    /// Where a slice is shorter than its extents say.
    pub(crate) fn multiply_bytes<S: Simd>(
        self,
        simd: S,
        rounding: Rounding,
        strip: &BytePart<'_>,
        products: &mut [f32],
        sums: &mut [f32],
    ) {
        let Range { start, end } = strip.depth;
        let (is_first, is_last) = (start == 0, end == self.depth);
        let x: &[u32] = bytemuck::cast_slice(self.x);
        let rows = self.places.len();
        for tile in even_tiles(rows, tile_rows::<S>()) {
            let ahead = strip.ahead.part(&tile, rows);
            let Tiles { places, scales, .. } = self.rows(tile.clone());
            let products = products.get_mut(tile.start * STRIP..tile.end * STRIP).unwrap_or_default();
            for first_column in (0..STRIP).step_by(tile_columns::<S>()) {
                let first = first_column * tile.len();
                let part =
                    (!(is_first && is_last)).then(|| Part { products: &mut products[first..], is_first, is_last });
                let x = &x[tile.start * X_PITCH..];
                let column = strip.column + first_column;
                let work = MultiplyBytes {
                    x,
                    inputs: start..end.next_multiple_of(GROUP),
                    weight: strip.weight,
                    first_column,
                    places,
                    scales,
                    column,
                    sums,
                    part,
                    ahead,
                };
                work.run(simd, rounding);
            }
        }
    }
}

/// [`crate::kernel::Multiply`] of bytes.
struct MultiplyBytes<'a> {
    /// Packed rows from the slice's first input on, [`X_PITCH`] apart.
    x: &'a [u32],
    /// Of the slice; whole groups.
    inputs: Range<usize>,
    weight: ByteColumns<'a>,
    /// The tile's first column, counted from the strip's.
    first_column: usize,
    /// Where each row's sums begin; as many as the tile has rows.
    places: &'a [usize],
    /// `None`: ones.
    scales: Option<OutScales<'a>>,
    /// The tile's first column, counted from the places.
    column: usize,
    sums: &'a mut [f32],
    /// `None`: the depth is a whole slice.
    part: Option<Part<'a>>,
    ahead: Pieces<'a>,
}

/// Calls a function with the number of rows and the form of the blocks as constants.
macro_rules! with_rows_and_blocks {
    ($rows:expr, $rounding:expr, $call:ident $(, $argument:expr)*) => {
        with_rows_and_blocks!(@ $rows, $rounding, $call, ($($argument),*), 1 2 3 4 5 6)
    };
    (@ $rows:expr, $rounding:expr, $call:ident, $arguments:tt, $($count:literal)*) => {
        match ($rows, $rounding.quads(), $rounding.has_minimum()) {
            $(
                ($count, GROUP_QUADS, false) => with_rows_and_blocks!(@@ $call, $count, GROUP_QUADS, false, $arguments),
                ($count, GROUP_QUADS, true) => with_rows_and_blocks!(@@ $call, $count, GROUP_QUADS, true, $arguments),
                ($count, _, false) => with_rows_and_blocks!(@@ $call, $count, HALF_QUADS, false, $arguments),
                ($count, _, true) => with_rows_and_blocks!(@@ $call, $count, HALF_QUADS, true, $arguments),
            )*
            _ => {}
        }
    };
    (@@ $call:ident, $count:literal, $quads:ident, $minimum:literal, ($($argument:expr),*)) => {
        $call::<S, $count, $quads, $minimum>($($argument),*)
    };
}

/// Quads of a block of half a group.
const HALF_QUADS: usize = GROUP_QUADS / 2;

impl MultiplyBytes<'_> {
    fn run<S: Simd>(self, simd: S, rounding: Rounding) {
        let (rows, columns, inputs) = (self.places.len(), tile_columns::<S>(), self.inputs.len());
        if rows == 0 || inputs == 0 {
            return;
        }
        assert!(rows <= MOST_TILE_ROWS && self.inputs.end <= BYTE_SLICE && inputs.is_multiple_of(GROUP));
        assert!(self.x.len() >= rows * X_PITCH && self.first_column + columns <= STRIP);
        assert!(self.weight.quads.len() >= inputs / QUAD * STRIP);
        assert!(self.weight.scales.len() >= inputs.div_ceil(PIECE));
        let end = self.column + columns;
        assert!(self.places.iter().all(|place| place + end <= self.sums.len()));
        assert!(self.scales.is_none_or(|scales| {
            let within = |place: &usize| *place == NO_SCALES || place + end <= scales.values.len();
            scales.places.len() == rows && scales.places.iter().all(within)
        }));
        assert!(self.part.as_ref().is_none_or(|part| part.products.len() >= rows * columns));
        if Dots::are_there::<S>() {
            // SAFETY: the processor has the instructions.
            unsafe { with_rows_and_blocks!(rows, rounding, multiply_by_dots, simd, self) }
        } else {
            with_rows_and_blocks!(rows, rounding, multiply_by_floats, simd, self);
        }
    }
}

fn multiply_by_floats<S: Simd, const ROWS: usize, const QUADS: usize, const MINIMUM: bool>(
    simd: S,
    work: MultiplyBytes<'_>,
) {
    struct Work<'a, const ROWS: usize, const QUADS: usize, const MINIMUM: bool>(MultiplyBytes<'a>);
    impl<const ROWS: usize, const QUADS: usize, const MINIMUM: bool> WithSimd for Work<'_, ROWS, QUADS, MINIMUM> {
        type Output = ();
        #[inline(always)]
        fn with_simd<S: Simd>(self, simd: S) {
            // SAFETY: any processor has the instructions, and extents have been compared.
            unsafe { multiply::<S, ExactFloats, ROWS, QUADS, MINIMUM>(simd, self.0) }
        }
    }
    simd.vectorize(Work::<ROWS, QUADS, MINIMUM>(work));
}

/// # Safety
/// The processor has the instructions: see [`Dots::are_there`]. Extents have been compared.
#[cfg_attr(
    target_arch = "x86_64",
    target_feature(
        enable = "avx512f,avx512bw,avx512cd,avx512dq,avx512vl,avx512vnni,avx2,fma,bmi1,bmi2,f16c,lzcnt,popcnt"
    )
)]
unsafe fn multiply_by_dots<S: Simd, const ROWS: usize, const QUADS: usize, const MINIMUM: bool>(
    simd: S,
    work: MultiplyBytes<'_>,
) {
    // SAFETY: by the caller's promise.
    unsafe { multiply::<S, Dots, ROWS, QUADS, MINIMUM>(simd, work) }
}

/// # Safety
/// The caller is compiled for the instructions of `P`, and [`MultiplyBytes::run`] has compared every extent with its slice.
#[inline(always)]
unsafe fn multiply<S: Simd, P: ByteProduct, const ROWS: usize, const QUADS: usize, const MINIMUM: bool>(
    simd: S,
    work: MultiplyBytes<'_>,
) {
    let MultiplyBytes { x, inputs, weight, first_column, places, scales, column, sums, part, ahead } = work;
    let block = QUADS * QUAD;
    // SAFETY: by the caller's promise.
    unsafe {
        let mut products = [[simd.splat_f32s(0.0); 2]; ROWS];
        if let Some(part) = part.as_ref().filter(|part| !part.is_first) {
            for (at, product) in products.as_flattened_mut().iter_mut().enumerate() {
                *product = load::<S>(part.products.as_ptr().add(at * S::F32_LANES));
            }
        }
        let mut ahead = Ahead::new(ahead, inputs.len() / block);
        let rows = x.as_ptr();
        let mut quads = weight.quads.as_ptr().add(first_column).cast::<f32>();
        for (first, scales) in inputs.clone().step_by(PIECE).zip(weight.scales) {
            let end = inputs.end.min(first + PIECE);
            for at in 0..(end - first) / block {
                ahead.fetch();
                let (scales, offsets) = scales.block(if weight.are_blocks { at } else { 0 });
                let (scales, offsets) = (scales.as_ptr().add(first_column), offsets.as_ptr().add(first_column));
                let numbers = rows.add(first / QUAD + at * QUADS);
                let beginnings = rows.add(BEGINNINGS + first / block + at);
                let own_scales = rows.add(SCALES + first / block + at).cast::<f32>();
                let mut integers = [[P::start(simd, 0); 2]; ROWS];
                if !MINIMUM {
                    for (row, integers) in integers.iter_mut().enumerate() {
                        *integers = [P::start(simd, *beginnings.add(row * X_PITCH) as i32); 2];
                    }
                }
                for quad in 0..QUADS {
                    let (first, second) = (load::<S>(quads), load::<S>(quads.add(S::F32_LANES)));
                    for (row, integers) in integers.iter_mut().enumerate() {
                        let number = *numbers.add(row * X_PITCH + quad);
                        integers[0] = P::add(simd, number, first, integers[0]);
                        integers[1] = P::add(simd, number, second, integers[1]);
                    }
                    quads = quads.add(STRIP);
                }
                let (first, second) = (load::<S>(scales), load::<S>(scales.add(S::F32_LANES)));
                for (row, products) in products.iter_mut().enumerate() {
                    let own = simd.splat_f32s(*own_scales.add(row * X_PITCH));
                    let integers = integers[row];
                    let scaled = [
                        simd.mul_f32s(P::float(simd, integers[0]), own),
                        simd.mul_f32s(P::float(simd, integers[1]), own),
                    ];
                    products[0] = simd.mul_add_e_f32s(scaled[0], first, products[0]);
                    products[1] = simd.mul_add_e_f32s(scaled[1], second, products[1]);
                }
                if MINIMUM {
                    let (first, second) = (load::<S>(offsets), load::<S>(offsets.add(S::F32_LANES)));
                    for (row, products) in products.iter_mut().enumerate() {
                        let own = simd.splat_f32s(f32::from_bits(*beginnings.add(row * X_PITCH)));
                        products[0] = simd.mul_add_e_f32s(own, first, products[0]);
                        products[1] = simd.mul_add_e_f32s(own, second, products[1]);
                    }
                }
            }
        }
        if let Some(part) = part.filter(|part| !part.is_last) {
            for (at, product) in products.as_flattened().iter().enumerate() {
                store::<S>(part.products.as_mut_ptr().add(at * S::F32_LANES), *product);
            }
            return;
        }
        add_products(simd, products, (places, scales), column, sums);
    }
}
