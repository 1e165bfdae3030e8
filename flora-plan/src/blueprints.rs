//! What tuning chose on a device in place of a routine's own choice: how kernels cut their work. None of it changes a bit of any
//! result but `split_rows`, which makes another plan.

use serde::{Deserialize, Serialize};

use crate::layer::Element;

/// What a cube multiplies at once, and how its planes share it.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct Tile {
    /// Virtual rows.
    pub rows: u32,
    /// Columns of w0.
    pub columns: u32,
    /// Steps of d that are staged in shared memory.
    pub depth: u32,
    /// Planes that share the rows (with fragments).
    pub row_planes: u32,
    /// Planes that share the columns (with fragments).
    pub column_planes: u32,
}

/// The tile of one class of batches.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct TileChoice {
    /// The type that is multiplied.
    pub activations: Element,
    /// Whether tiles of W_i are made.
    pub on_chip: bool,
    /// The most rows that share a weight in a batch of the class; of the choices that are large enough the smallest counts.
    pub rows: u32,
    /// The choice.
    pub tile: Tile,
}

/// The choices of one device.
#[derive(Clone, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct Blueprints {
    /// Virtual rows up to which cubes share the depth of a layer that has few columns; 0: they never do.
    pub split_rows: u32,
    /// Tiles that were faster than the routine's; those that the routine doesn't know are left alone.
    pub tiles: Vec<TileChoice>,
}

impl Blueprints {
    /// The chosen tile for `rows` rows that share a weight.
    pub fn tile(&self, activations: Element, on_chip: bool, rows: u32) -> Option<Tile> {
        let own = self.tiles.iter().filter(|choice| choice.activations == activations && choice.on_chip == on_chip);
        own.filter(|choice| rows <= choice.rows).min_by_key(|choice| choice.rows).map(|choice| choice.tile)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_smallest_class_that_is_large_enough_counts() {
        let tile = |rows| Tile { rows, columns: 64, depth: 32, row_planes: 1, column_planes: 4 };
        let choice = |rows, on_chip| TileChoice { activations: Element::F16, on_chip, rows, tile: tile(rows) };
        let tiles = vec![choice(128, false), choice(32, false), choice(64, true)];
        let blueprints = Blueprints { tiles, ..Blueprints::default() };
        let chosen = |rows, on_chip| blueprints.tile(Element::F16, on_chip, rows).map(|tile| tile.rows);
        assert_eq!(
            [1, 32, 33, 128, 129].map(|rows| chosen(rows, false)),
            [Some(32), Some(32), Some(128), Some(128), None]
        );
        assert_eq!(chosen(3, true), Some(64));
        assert_eq!(blueprints.tile(Element::F32, false, 1), None);
    }
}
