//! Packed rows times a strip of weight, tile by tile.

use std::ops::Range;

use pulp::Simd;

use crate::fetch::Pieces;
use crate::kernel::{Columns, Form, Multiply, OutScales, Part, tile_columns, tile_rows};
use crate::layout::{STRIP, X_PITCH};
use crate::partition::even_tiles;

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
}
