//! Packed rows times a strip of weight, tile by tile.

use std::mem::MaybeUninit;
use std::ops::Range;

use pulp::{Simd, WithSimd};

use crate::fetch::Pieces;
use crate::kernel::{Columns, Form, Multiply, NO_SCALES, OutScales, Part, add_products, tile_columns, tile_rows};
use crate::layout::{STRIP, X_PITCH};
use crate::matrix_unit::{MatrixUnit, UNIT_ROWS, UnitProducts};
use crate::partition::even_tiles;
use crate::vectorise::vectorised;

/// Rows and where their sums are.
#[derive(Clone, Copy)]
pub(crate) struct Tiles<'a> {
    /// A slice of packed rows, [`X_PITCH`] apart.
    pub(crate) x: &'a [f32],
    /// What they and the weight are made of.
    pub(crate) form: Form,
    /// Of the slice.
    pub(crate) depth: usize,
    /// Where each row's sums begin.
    pub(crate) places: &'a [usize],
    /// From the panel's first column on. `None`: no row has any.
    pub(crate) scales: Option<OutScales<'a>>,
}

/// Inputs of a strip.
pub(crate) struct StripPart<'a> {
    /// `[depth, STRIP]`
    pub(crate) weight: Columns<'a>,
    /// Which inputs of the slice.
    pub(crate) depth: Range<usize>,
    /// The strip's first column, counted from the places.
    pub(crate) column: usize,
    /// What the products after these will need.
    pub(crate) ahead: Pieces<'a>,
}

impl Tiles<'_> {
    /// Rows `range` of these.
    pub(crate) fn rows(self, range: Range<usize>) -> Self {
        let scales =
            self.scales.map(|OutScales { values, places }| OutScales { values, places: &places[range.clone()] });
        Self { x: &self.x[range.start * X_PITCH..], places: &self.places[range], scales, ..self }
    }

    /// Adds the products with a part of a strip to the sums; parts of a slice come in rising order, and between them `products`
    /// `[rows, STRIP]` is left alone.
    pub(crate) fn multiply<S: Simd>(self, simd: S, strip: &StripPart<'_>, products: &mut [f32], sums: &mut [f32]) {
        let Range { start, end } = strip.depth;
        if let Form::Pairs(Some(unit)) = self.form {
            return self.multiply_by_unit(simd, unit, strip, products, sums);
        }
        let (is_first, is_last) = (start == 0, end == self.depth);
        let rows = self.places.len();
        for tile in even_tiles(self.places.len(), tile_rows::<S>()) {
            let ahead = strip.ahead.part(&tile, rows);
            let Tiles { x, form, places, scales, .. } = self.rows(tile.clone());
            let products = products.get_mut(tile.start * STRIP..tile.end * STRIP).unwrap_or_default();
            for column in (0..STRIP).step_by(tile_columns::<S>()) {
                let weight = Columns { values: &strip.weight.values[column..], ..strip.weight };
                let first = column * tile.len();
                let part =
                    (!(is_first && is_last)).then(|| Part { products: &mut products[first..], is_first, is_last });
                let (x, column) = (&x[start..], strip.column + column);
                Multiply { x, form, depth: end - start, weight, places, scales, column, sums, part, ahead }.run(simd);
            }
        }
    }

    /// The same by the matrix unit: parts are summed each by itself, and then one after the other.
    fn multiply_by_unit<S: Simd>(
        self,
        simd: S,
        unit: MatrixUnit,
        strip: &StripPart<'_>,
        products: &mut [f32],
        sums: &mut [f32],
    ) {
        let Range { start, end } = strip.depth;
        let (is_first, is_last) = (start == 0, end == self.depth);
        let mut made = [const { MaybeUninit::uninit() }; UNIT_BLOCKS * UNIT_ROWS];
        let rows = self.places.len();
        for first in (0..rows).step_by(made.len()) {
            let tile = first..rows.min(first + made.len());
            let work = UnitProducts {
                x: bytemuck::cast_slice(&self.x[first * X_PITCH + start..]),
                rows: tile.len(),
                x_pitch: 2 * X_PITCH,
                weight: strip.weight.values,
                depth: end - start,
                ahead: strip.ahead.part(&tile, rows),
            };
            let made = &*unit.multiply(work, &mut made);
            if is_first && is_last {
                self.rows(tile).add(simd, made, strip.column, sums);
                continue;
            }
            let (products, _) = products[tile.start * STRIP..tile.end * STRIP].as_chunks_mut::<STRIP>();
            if is_first {
                products.copy_from_slice(made);
            } else {
                let all = products.as_flattened_mut().iter_mut().zip(made.as_flattened());
                vectorised(
                    simd,
                    #[inline(always)]
                    || all.for_each(|(product, made)| *product += made),
                );
            }
            if is_last {
                self.rows(tile).add(simd, products, strip.column, sums);
            }
        }
    }

    /// Adds the products of a slice with a strip whose first column is `column` to the sums, as many rows as there are.
    ///
    /// # Panics
    /// Where a slice is shorter than its extents say.
    pub(crate) fn add<S: Simd>(self, simd: S, products: &[[f32; STRIP]], column: usize, sums: &mut [f32]) {
        let end = column + STRIP;
        let places = &self.places[..products.len()];
        assert!(places.iter().all(|place| place + end <= sums.len()));
        assert!(self.scales.is_none_or(|scales| {
            let within = |place: &usize| *place == NO_SCALES || place + end <= scales.values.len();
            scales.places.len() >= places.len() && scales.places[..places.len()].iter().all(within)
        }));
        simd.vectorize(Added { tiles: self, products, column, sums });
    }
}

/// [`Tiles::add`], whose extents have been compared.
struct Added<'a> {
    tiles: Tiles<'a>,
    products: &'a [[f32; STRIP]],
    column: usize,
    sums: &'a mut [f32],
}

impl WithSimd for Added<'_> {
    type Output = ();

    #[inline(always)]
    fn with_simd<S: Simd>(self, simd: S) {
        let Self { tiles, products, column, sums } = self;
        for (row, products) in products.iter().enumerate() {
            let Tiles { places, scales, .. } = tiles;
            let places = &places[row..];
            let scales = scales.map(|OutScales { values, places }| OutScales { values, places: &places[row..] });
            let products = S::as_simd_f32s(products).0;
            for (at, first) in (0..STRIP).step_by(tile_columns::<S>()).enumerate() {
                let own = [[products[2 * at], products[2 * at + 1]]];
                // SAFETY: the place and the scales have been compared with what there is.
                unsafe { add_products(simd, own, (places, scales), column + first, sums) };
            }
        }
    }
}

/// Turns of the matrix unit whose rows' products are in being at a time: enough that the unit is seldom set up, and few enough for the
/// first-level cache.
const UNIT_BLOCKS: usize = 4;
