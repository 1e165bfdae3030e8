//! The tiles that a batch may be cut into, and which suit how many rows.

use flora_plan::layer::{Levels, Quantisation};

use crate::kernels::decode::crowds_registers;
use crate::kernels::{Multiply, Tile};

const fn tile(rows: u32, columns: u32, depth: u32, row_planes: u32, column_planes: u32) -> Tile {
    Tile { rows, columns, depth, row_planes, column_planes }
}

/// Tiles by fragments, rising.
const BY_FRAGMENTS: [Tile; 6] = [
    // Few rows: a deep stage keeps many loads of w0 in flight.
    tile(16, 64, 128, 1, 4),
    tile(32, 64, 64, 1, 4),
    tile(64, 64, 64, 1, 4),
    tile(128, 64, 64, 4, 2),
    // All virtual rows of a decode batch in one tile, so that w0 is read once.
    tile(256, 64, 32, 8, 2),
    // No deeper than leaves registers for what is fetched.
    tile(512, 64, 16, 16, 1),
];
/// Many rows: the most products for each number that is staged.
const PREFILL: Tile = tile(128, 128, 32, 2, 4);
/// The same for fragments in registers, of which two steps are staged.
const PREFILL_BY_REGISTERS: Tile = tile(128, 128, 64, 2, 4);
/// Few rows by fragments in registers, of a weight that isn't decoded: a shallower stage needs so few registers that CUDA's assembler
/// puts its loads off for the sake of more cubes.
const FEW_BY_REGISTERS: Tile = tile(32, 64, 128, 1, 4);
/// Many rows by a W_i that is made in registers: each plane makes that of its own columns, for all rows.
const ON_CHIP: Tile = tile(128, 256, 32, 1, 8);
/// Tiles by units, rising.
const BY_UNITS: [Tile; 3] = [tile(16, 64, 16, 1, 1), tile(32, 64, 16, 1, 1), tile(64, 64, 16, 1, 1)];

/// Every tile that a batch may be cut into, whatever its rows: what tuning chooses from.
pub fn table(multiply: Multiply) -> Vec<Tile> {
    match multiply {
        Multiply::Fma => BY_UNITS.to_vec(),
        Multiply::Cmma { .. } => BY_FRAGMENTS.into_iter().chain([PREFILL]).collect(),
        Multiply::Mma => {
            BY_FRAGMENTS.into_iter().chain([PREFILL, FEW_BY_REGISTERS, PREFILL_BY_REGISTERS, ON_CHIP]).collect()
        }
    }
}

/// Tiles for `rows` virtual rows that share a weight, the best first, down to one that every device holds. Where decoding the weight
/// crowds the registers, the tile of most rows has none left for it.
pub(super) fn tiles(
    multiply: Multiply,
    on_chip: bool,
    rows: u32,
    quantisation: Option<Quantisation>,
) -> impl Iterator<Item = Tile> {
    let decode = if quantisation.is_some_and(crowds_registers) { 256 } else { 512 };
    let (fit, most): (&[Tile], u32) = match multiply {
        Multiply::Fma => (&BY_UNITS, 64),
        Multiply::Cmma { .. } | Multiply::Mma => (&BY_FRAGMENTS, if on_chip { 128 } else { decode }),
    };
    let mut own: Vec<Tile> = Vec::new();
    if rows > if on_chip { 64 } else { 512 } {
        own.extend(match multiply {
            Multiply::Fma => None,
            Multiply::Cmma { .. } => Some(PREFILL),
            Multiply::Mma if on_chip => Some(ON_CHIP),
            Multiply::Mma => Some(PREFILL_BY_REGISTERS),
        });
    }
    let few = multiply == Multiply::Mma && !on_chip && quantisation.is_none();
    if few && (17..=FEW_BY_REGISTERS.rows).contains(&rows) {
        own.push(FEW_BY_REGISTERS);
    }
    let enough = fit.iter().position(|tile| tile.rows >= rows.min(most)).unwrap_or(0);
    // A codebook is decoded by so many instructions that a deep stage of W_i has no registers left for them.
    let of_codebook = quantisation.is_some_and(|quantisation| matches!(quantisation.levels, Levels::Codebook(_)));
    if multiply == Multiply::Mma && on_chip && of_codebook {
        own.extend(fit[enough..].iter().take(1).map(|tile| Tile { depth: tile.depth / 2, ..*tile }));
    }
    own.extend(fit[enough..].iter().take(1));
    // What a smaller device holds: fewer rows, then a shallower stage, then fewer columns.
    own.extend(fit[..enough].iter().rev());
    let smaller = own.clone().into_iter().flat_map(|tile| {
        let shallow = [64, 32, 16].into_iter().filter(move |depth| *depth < tile.depth);
        shallow.map(move |depth| Tile { depth, ..tile })
    });
    let narrow = match multiply {
        Multiply::Fma => tile(16, 32, 16, 1, 1),
        Multiply::Cmma { .. } | Multiply::Mma => tile(16, 32, 16, 1, 2),
    };
    own.clone().into_iter().chain(smaller).chain([narrow])
}
