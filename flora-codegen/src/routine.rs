//! Routines: what turns a device's properties and a batch's steps into a blueprint, tables and a launch size. A blueprint depends
//! on the device, the layer's types and the batch's class of size alone, so that few kernels are compiled however many batches
//! come.

mod attention;
mod hardware;
mod rows;
mod tiles;

use flora_plan::layer::{Epilogue, LayerFormat, LayerShape, Quantisation};
use flora_plan::schedule::{Gemm, SPLIT_DEPTH, Scale, WeightRun};

use crate::kernels::blueprint::RANK_CHUNK;
use crate::kernels::decode::inputs_of_scales;
use crate::kernels::tables::{Item, ShrinkTask, TileRow, Words};
use crate::kernels::{Multiply, Tile, TileBlueprint};

pub(crate) use attention::{AttentionLaunch, attention};
pub use hardware::Hardware;
use hardware::WIDE_ROWS;
pub(crate) use hardware::storage;
pub(crate) use rows::shrink_tasks;
use rows::{Group, Rows};
pub use tiles::table;
use tiles::tiles;

/// A batch that no blueprint of the device serves.
#[derive(Clone, Copy, Debug, PartialEq, Eq, thiserror::Error)]
#[non_exhaustive]
pub enum RoutineError {
    /// One row's low-rank sums don't fit.
    #[error(
        "`fused` keeps the {rank} low-rank sums of a row in shared memory, of which the device has {bytes} bytes; use `segmented`"
    )]
    RankTooLarge {
        /// The rank.
        rank: u32,
        /// The device's shared memory.
        bytes: usize,
    },
    /// No tile of attention fits.
    #[error(
        "attention over heads of {size} numbers takes more than the {bytes} bytes of shared memory, or the {units} units of a cube, of the device"
    )]
    HeadTooLarge {
        /// Numbers of a head.
        size: u32,
        /// The device's shared memory.
        bytes: usize,
        /// Its units.
        units: u32,
    },
    /// No tile fits.
    #[error("the smallest tile of gradients doesn't fit the {bytes} bytes of shared memory of the device")]
    NoTile {
        /// The device's shared memory.
        bytes: usize,
    },
}

/// A launch of the tile kernel.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct TileLaunch {
    /// The comptime key.
    pub blueprint: TileBlueprint,
    /// The parts of its table, in order.
    pub(crate) rows: Vec<TileRow>,
    pub(crate) items: Vec<Item>,
    pub(crate) scales: Vec<Scale>,
    pub(crate) tasks: Vec<ShrinkTask>,
    /// Numbers of h.
    pub(crate) hidden: u32,
    pub(crate) column_tiles: u32,
    pub(crate) splits: u32,
    /// Steps of d of a cube.
    pub(crate) depth: u32,
}

/// The table of a tile launch, and the words that its parts start at; the virtual rows come first.
pub(crate) struct TileTable {
    pub(crate) words: Words,
    pub(crate) items: u32,
    pub(crate) scales: u32,
    pub(crate) tasks: u32,
}

impl TileLaunch {
    /// Its table.
    pub(crate) fn table(&self) -> TileTable {
        let mut words = Words::default();
        words.append(&self.rows);
        let items = words.append(&self.items);
        let scales = words.append(&self.scales);
        let tasks = words.append(&self.tasks);
        TileTable { words, items, scales, tasks }
    }

    /// Bytes of its table.
    pub(crate) fn table_bytes(&self) -> u64 {
        let Self { rows, items, scales, tasks, .. } = self;
        let bytes =
            size_of_val(&rows[..]) + size_of_val(&items[..]) + size_of_val(&scales[..]) + size_of_val(&tasks[..]);
        bytes as u64
    }
}

/// What a launch needs beside its rows.
#[derive(Clone, Copy)]
pub(crate) struct Wanted {
    pub(crate) shape: LayerShape,
    pub(crate) format: LayerFormat,
    pub(crate) epilogue: Epilogue,
    pub(crate) splits: bool,
}

pub(crate) fn gemm(hardware: &Hardware, wanted: Wanted, gemm: &Gemm) -> Result<TileLaunch, RoutineError> {
    lay_out(hardware, wanted, Rows::of_gemm(gemm))
}

pub(crate) fn runs(hardware: &Hardware, wanted: Wanted, runs: &[WeightRun]) -> Result<TileLaunch, RoutineError> {
    lay_out(hardware, wanted, Rows::of_runs(runs))
}

pub(crate) fn matrices(hardware: &Hardware, wanted: Wanted, count: u32, rows: u32) -> Result<TileLaunch, RoutineError> {
    lay_out(hardware, wanted, Rows::of_matrices(count, rows))
}

/// Numbers of h that a tile's rows may have, few for few rows; the larger is enough for 128 rows of rank 16.
const HIDDEN: [u32; 2] = [512, 2048];

fn lay_out(hardware: &Hardware, wanted: Wanted, rows: Rows) -> Result<TileLaunch, RoutineError> {
    let Wanted { shape, format, .. } = wanted;
    let on_chip = rows.groups.iter().any(|group| group.unscaled > 0 || group.first_scale < group.end_scale);
    let highest_scales = rows.groups.iter().map(|group| group.end_scale - group.first_scale).max().unwrap_or(0);
    let longest = rows.groups.iter().map(|group| group.end - group.first).max().unwrap_or(0);
    let widest = widest(&rows.rows);
    let splits = if wanted.splits { hardware.splits(shape) } else { 1 };
    let highest_rank = rows.rows.iter().map(|row| row.rank).max().unwrap_or(0);
    let blueprint = TileBlueprint {
        multiply: hardware.multiply(format),
        plane_size: hardware.plane_size,
        tile: Tile { rows: 0, columns: 0, depth: 0, row_planes: 1, column_planes: 1 },
        quantisation: format.weight.quantisation(),
        even_blocks: false,
        scaled: rows.rows.iter().any(|row| row.virtual_row.in_slot > 0 || row.virtual_row.out_slot > 0),
        stage: hardware.stage(format),
        adapters_alike: format.adapters == format.activations,
        on_chip: 0,
        hidden: 0,
        carries: false,
        split: splits > 1,
        epilogue: wanted.epilogue,
    };
    let stage = hardware.stage(format).bytes() as u32;
    let least = highest_rank.next_power_of_two();
    let class = HIDDEN.into_iter().find(|class| rows.hidden <= *class).unwrap_or(HIDDEN[1]);
    let hidden = if rows.hidden == 0 { 0 } else { class.max(least) };
    let fits = |blueprint: &TileBlueprint| {
        blueprint.shared_bytes(stage) <= hardware.shared_bytes && blueprint.units() <= hardware.units
    };
    // A row that is wider than a tile is added up over several.
    let with = |tile: Tile, hidden: u32| TileBlueprint {
        tile,
        hidden,
        even_blocks: blueprint.multiply == Multiply::Mma && even_blocks(tile, shape.d, blueprint.quantisation),
        on_chip: if on_chip { staged_scales(blueprint.multiply, highest_scales) } else { 0 },
        carries: splits == 1 && widest > tile.rows / 2 && longest > tile.rows,
        ..blueprint
    };
    let chosen = hardware.blueprints.tile(format.activations, on_chip, longest);
    let chosen = chosen.filter(|tile| table(blueprint.multiply).contains(tile));
    let mut capacity = hidden;
    let blueprint = loop {
        let own = tiles(blueprint.multiply, on_chip, longest, blueprint.quantisation);
        let found = chosen.into_iter().chain(own).map(|tile| with(tile, capacity)).find(fits);
        match found {
            Some(found) => break found,
            None if capacity / 2 >= least && capacity > 1 => capacity /= 2,
            None => return Err(RoutineError::RankTooLarge { rank: highest_rank, bytes: hardware.shared_bytes }),
        }
    };

    let depth = if splits == 1 { shape.d } else { shape.d.div_ceil(splits).next_multiple_of(SPLIT_DEPTH) };
    Ok(TileLaunch {
        blueprint,
        items: cut(&rows, &blueprint),
        hidden: rows.hidden,
        column_tiles: shape.k.div_ceil(blueprint.tile.columns),
        splits: shape.d.div_ceil(depth.max(1)),
        depth,
        rows: rows.rows,
        scales: rows.scales,
        tasks: rows.tasks,
    })
}

/// Whether every step of a tile of many rows starts where a word of its weight's scales does.
fn even_blocks(tile: Tile, d: u32, quantisation: Option<Quantisation>) -> bool {
    let starts = |inputs| d.is_multiple_of(tile.depth) && tile.depth.is_multiple_of(inputs);
    tile.rows >= WIDE_ROWS && quantisation.and_then(inputs_of_scales).is_some_and(starts)
}

/// Scaled virtual rows of a W_i whose vectors are staged at once: in registers, enough for the largest adapters that are common.
fn staged_scales(multiply: Multiply, most: u32) -> u32 {
    match multiply {
        Multiply::Mma if most > RANK_CHUNK => 4 * RANK_CHUNK,
        Multiply::Fma | Multiply::Cmma { .. } | Multiply::Mma => RANK_CHUNK,
    }
}

/// The most virtual rows of an output row.
fn widest(rows: &[TileRow]) -> u32 {
    let mut width = 0;
    let mut widest = 0;
    for row in rows {
        width += 1;
        widest = widest.max(width);
        if row.virtual_row.last == 1 {
            width = 0;
        }
    }
    widest
}

/// Cuts groups into items of whole output rows that fit a tile; where rows are wide, into items of several tiles, of which only
/// the last is partly empty.
fn cut(rows: &Rows, blueprint: &TileBlueprint) -> Vec<Item> {
    let mut items = Vec::new();
    let most = if blueprint.carries { 4 * blueprint.tile.rows } else { blueprint.tile.rows };
    for group in &rows.groups {
        let mut start = group.first;
        let mut ends = (group.first..group.end).filter(|at| rows.rows[*at as usize].virtual_row.last == 1).peekable();
        let rank_of = |at: u32| rows.rows[at as usize].rank;
        let mut hidden = 0;
        while let Some(last) = ends.next() {
            hidden += rank_of(last);
            let joins = ends.peek().is_some_and(|next| {
                let holds = blueprint.hidden == 0 || hidden + rank_of(*next) <= blueprint.hidden;
                next + 1 - start <= most && holds
            });
            if !joins {
                let first_hidden = (start..=last).find(|at| rows.rows[*at as usize].rank > 0);
                let first_hidden = first_hidden.map_or(0, |at| rows.rows[at as usize].hidden);
                let Group { weight, first_scale, end_scale, unscaled, .. } = *group;
                items.push(Item {
                    first: start,
                    end: last + 1,
                    weight,
                    first_scale,
                    end_scale,
                    unscaled,
                    hidden: first_hidden,
                    hidden_count: hidden,
                });
                start = last + 1;
                hidden = 0;
            }
        }
    }
    items
}

#[cfg(test)]
mod tests {
    use flora_plan::layer::Element;
    use flora_plan::schedule::{LowRankRows, ScheduledRow};

    use super::*;
    use crate::target::{Capability, hardware};

    /// Virtual rows of output rows with these widths, and a low-rank sum of `rank` on every second output row.
    fn gemm_of(widths: &[u32], rank: u32) -> Gemm {
        let mut gemm = Gemm::default();
        for (row, width) in widths.iter().enumerate() {
            let row = row as u32;
            gemm.rows.extend((0..*width).map(|at| ScheduledRow {
                row,
                in_slot: 1,
                out_slot: 1,
                last: u32::from(at + 1 == *width),
            }));
            if row % 2 == 1 && rank > 0 {
                gemm.low_rank.push(LowRankRows {
                    first_row: row,
                    rows: 1,
                    shrink: row * rank,
                    expand: row * rank,
                    rank,
                });
            }
        }
        gemm
    }

    #[test]
    fn items_are_whole_rows_and_cover_all() {
        let hardware = hardware(Capability::Sm90);
        for activations in [Element::F32, Element::F16] {
            for widths in [vec![1], vec![65; 40], vec![1; 300], vec![3, 64, 1, 200, 7], vec![17; 33], vec![700, 1, 600]]
            {
                for rank in [0, 1, 16, 100] {
                    let gemm = gemm_of(&widths, rank);
                    let (shape, epilogue) = (LayerShape { d: 512, k: 192 }, Epilogue::default());
                    let format = LayerFormat::uniform(activations);
                    let wanted = Wanted { shape, format, epilogue, splits: false };
                    let launch = super::gemm(&hardware, wanted, &gemm).expect("it fits");
                    let mut next = 0;
                    for item in &launch.items {
                        assert_eq!(item.first, next, "{widths:?}");
                        assert_eq!(gemm.rows[item.end as usize - 1].last, 1, "{widths:?}");
                        assert!(item.hidden_count <= launch.blueprint.hidden, "{widths:?} rank {rank}");
                        assert!(launch.blueprint.carries || item.end - item.first <= launch.blueprint.tile.rows);
                        next = item.end;
                    }
                    assert_eq!(next as usize, gemm.rows.len());
                    let stage = hardware.stage(format).bytes() as u32;
                    assert!(launch.blueprint.shared_bytes(stage) <= hardware.shared_bytes);
                }
            }
        }
    }

    /// More sums than the bytes of 32 bits count.
    #[test]
    fn a_rank_of_any_size_is_refused_where_it_does_not_fit() {
        let hardware = hardware(Capability::Sm90);
        for rank in [1 << 20, 1 << 30, (1 << 30) + 1] {
            let rows = vec![ScheduledRow { row: 0, in_slot: 0, out_slot: 0, last: 1 }];
            let low_rank = vec![LowRankRows { first_row: 0, rows: 1, shrink: 0, expand: 0, rank }];
            let (shape, format) = (LayerShape { d: 1, k: 1 }, LayerFormat::default());
            let wanted = Wanted { shape, format, epilogue: Epilogue::default(), splits: false };
            let refused = super::gemm(&hardware, wanted, &Gemm { rows, low_rank, ..Gemm::default() }).map(|_| ());
            assert_eq!(refused, Err(RoutineError::RankTooLarge { rank, bytes: hardware.shared_bytes }));
        }
    }

    #[test]
    fn every_low_rank_sum_has_one_task() {
        let hardware = hardware(Capability::Sm80);
        let runs = vec![
            LowRankRows { first_row: 0, rows: 40, shrink: 0, expand: 0, rank: 5 },
            LowRankRows { first_row: 40, rows: 1, shrink: 5, expand: 5, rank: 33 },
        ];
        let rows = (0..41).map(|row| ScheduledRow { row, in_slot: 0, out_slot: 0, last: 1 }).collect();
        let gemm = Gemm { rows, low_rank: runs, ..Gemm::default() };
        let (shape, epilogue) = (LayerShape { d: 64, k: 64 }, Epilogue::default());
        let wanted = Wanted { shape, format: LayerFormat::default(), epilogue, splits: false };
        let launch = super::gemm(&hardware, wanted, &gemm).expect("it fits");
        let mut written = vec![0; launch.hidden as usize];
        for task in &launch.tasks {
            for row in 0..task.rows {
                for rank in 0..task.ranks {
                    written[(task.hidden + row * task.pitch + rank) as usize] += 1;
                }
            }
        }
        assert_eq!(written, vec![1; 40 * 5 + 33]);
    }
}
