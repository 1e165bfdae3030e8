//! Where a unit stands in its cube, and what it stages, said so that addresses are one variable and constants. CUDA's compiler
//! folds a constant into a load or store when it sees that the sum can't wrap around and was not divided later; each that it
//! does not see takes a register through the main loop. So positions are known to be small, and constants come last.

use cubecl::prelude::*;

use super::blueprint::TileBlueprint;

/// The position of the unit's plane in a cube of `planes`; 0 in a cube of less than one, which multiplies by units.
#[cube]
pub(crate) fn plane(#[comptime] units: u32, #[comptime] planes: u32) -> u32 {
    UNIT_POS_X / comptime!(units / planes.max(1))
}

/// Whether the units of a cube stage whole lines of `line` vectors at once, and so each the same column of every pass.
fn aligned(line: u32, units: u32) -> bool {
    units.is_multiple_of(line)
}

/// Line that the unit stages in pass `pass` over lines of `line` vectors, counted from `origin`.
#[cube]
pub(crate) fn staged_row(origin: u32, #[comptime] pass: u32, #[comptime] line: u32, #[comptime] units: u32) -> u32 {
    if comptime!(aligned(line, units)) {
        origin + UNIT_POS_X / line + comptime!(pass * (units / line))
    } else {
        origin + (UNIT_POS_X + comptime!(pass * units)) / line
    }
}

/// Its position in that line.
#[cube]
pub(crate) fn staged_column(#[comptime] pass: u32, #[comptime] line: u32, #[comptime] units: u32) -> u32 {
    if comptime!(aligned(line, units)) { UNIT_POS_X % line } else { (UNIT_POS_X + comptime!(pass * units)) % line }
}

/// Where both lie in a tile whose lines are `pitch` vectors apart.
#[cube]
pub(crate) fn staged_at(
    #[comptime] pass: u32,
    #[comptime] line: u32,
    #[comptime] pitch: u32,
    #[comptime] units: u32,
) -> u32 {
    if comptime!(aligned(line, units)) {
        UNIT_POS_X / line * pitch + UNIT_POS_X % line + comptime!(pass * (units / line) * pitch)
    } else {
        let load = UNIT_POS_X + comptime!(pass * units);
        load / line * pitch + load % line
    }
}

/// Whether `lines` lines end before pass `pass` of the unit.
#[cube]
pub(crate) fn stages(
    #[comptime] pass: u32,
    #[comptime] line: u32,
    #[comptime] lines: u32,
    #[comptime] units: u32,
) -> bool {
    if comptime!((pass + 1) * units <= lines * line) {
        true.runtime()
    } else {
        UNIT_POS_X + comptime!(pass * units) < comptime!(lines * line)
    }
}

/// [`staged_row`] of a tile of `lines` lines that starts at 0; the last line for units beyond it.
#[cube]
pub(crate) fn line_within(
    #[comptime] pass: u32,
    #[comptime] line: u32,
    #[comptime] lines: u32,
    #[comptime] units: u32,
) -> u32 {
    let own = staged_row(0u32, pass, line, units);
    if comptime!((pass + 1) * units <= lines * line) { own } else { min(own, comptime!(lines - 1)) }
}

/// Which of a tile's `row_planes` the unit's plane is.
#[cube]
pub(crate) fn plane_row(#[comptime] blueprint: TileBlueprint) -> u32 {
    plane(comptime!(blueprint.units()), comptime!(blueprint.planes())) % comptime!(blueprint.tile.row_planes)
}

/// Which of its `column_planes`.
#[cube]
pub(crate) fn plane_column(#[comptime] blueprint: TileBlueprint) -> u32 {
    plane(comptime!(blueprint.units()), comptime!(blueprint.planes())) / comptime!(blueprint.tile.row_planes)
}
