//! A matrix `[depth, columns]` that a tile of rows is multiplied by: where it lies, or packed into strips.

use pulp::Simd;

use crate::frame::even_tiles;
use crate::kernel::{
    MOST_TILE_ROWS, Multiply, NO_SCALES, OutScales, Strip, Sweep, X_PITCH, add_scaled, products_pitch, strip_columns,
    tile_rows,
};
use crate::workspace::Buffer;

/// The columns of a panel, the first `whole` strips of them where they lie and the others packed.
#[derive(Clone, Copy)]
pub(crate) struct Strips<'a> {
    /// From the first column on; `pitch` floats from one depth to the next.
    pub(crate) in_place: &'a [f32],
    pub(crate) pitch: usize,
    pub(crate) whole: usize,
    /// The other strips, one after the other, padded to whole ones.
    pub(crate) packed: &'a [f32],
    /// Floats from one packed strip to the next.
    pub(crate) strip_pitch: usize,
    /// All columns, rounded up to strips.
    pub(crate) columns: usize,
}

/// A tile of rows and where their sums are.
pub(crate) struct Tile<'a> {
    /// Packed rows, [`X_PITCH`] apart.
    pub(crate) x: &'a [f32],
    pub(crate) depth: usize,
    /// The first sum of each row.
    pub(crate) places: &'a [usize],
    /// From the first column on. `None`: no row has any.
    pub(crate) scales: Option<OutScales<'a>>,
    pub(crate) sums: &'a mut [f32],
}

impl Strips<'_> {
    /// Adds a tile's products to its sums. `between` is called after every product with a packed strip.
    pub(crate) fn multiply<S: Simd>(&self, simd: S, tile: Tile<'_>, products: &mut Buffer, mut between: impl FnMut()) {
        let Tile { x, depth, places, scales, sums } = tile;
        let (strip, rows) = (strip_columns::<S>(), places.len());
        let in_place = self.whole * strip;
        if in_place > 0 {
            let products = products.floats(rows * products_pitch(in_place));
            let weight = Strip { values: self.in_place, pitch: self.pitch };
            Sweep { x, rows, depth, weight, columns: in_place, products }.run(simd);
            for (row, (place, products)) in
                places.iter().zip(products.chunks_exact(products_pitch(in_place))).enumerate()
            {
                let own = scales.filter(|scales| scales.places[row] != NO_SCALES);
                let scales = own.map(|scales| &scales.values[scales.places[row]..][..in_place]);
                add_scaled(simd, &products[..in_place], scales, &mut sums[*place..place + in_place]);
            }
        }
        let (mut own_places, mut scale_places) = ([0; MOST_TILE_ROWS], [0; MOST_TILE_ROWS]);
        for first in (in_place..self.columns).step_by(strip) {
            let weight = Strip { values: &self.packed[(first - in_place) / strip * self.strip_pitch..], pitch: strip };
            for tile in even_tiles(rows, tile_rows::<S>()) {
                own_places.iter_mut().zip(&places[tile.clone()]).for_each(|(own, place)| *own = place + first);
                let scales = scales.map(|OutScales { values, places }| {
                    let own = scale_places.iter_mut().zip(&places[tile.clone()]);
                    // `NO_SCALES` is the largest number, and stays.
                    own.for_each(|(own, place)| *own = place.saturating_add(first));
                    OutScales { values, places: &scale_places[..tile.len()] }
                });
                let (x, places) = (&x[tile.start * X_PITCH..], &own_places[..tile.len()]);
                Multiply { x, depth, weight, places, scales, sums }.run(simd);
                between();
            }
        }
    }
}
