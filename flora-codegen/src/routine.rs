//! Routines: what turns a device's properties and a batch's steps into a blueprint, tables and a launch size. A blueprint depends
//! on the device, the layer's types and the batch's class of size alone, so that few kernels are compiled however many batches
//! come.

use std::sync::Arc;

use cubecl::ir::features::MmaConfig;
use cubecl::ir::{DeviceProperties, ElemType, FloatKind, StorageType};
use flora_plan::blueprints::Blueprints;
use flora_plan::layer::{Element, Epilogue, LayerFormat, LayerShape, WeightFormat};
use flora_plan::schedule::{Gemm, LowRankRows, Materialised, VirtualRow};

use crate::kernels::shrink::{TASK_SIDE, TASK_WORDS};
use crate::kernels::tile::{ITEM_WORDS, ROW_WORDS};
use crate::kernels::{Multiply, Tile, TileBlueprint};

/// What a routine asks of a device.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Hardware {
    /// Units that run in lockstep.
    pub plane_size: u32,
    /// Bytes of shared memory of a cube.
    pub shared_bytes: usize,
    /// Units of a cube.
    pub units: u32,
    /// Elements of a vector.
    pub vector: usize,
    /// Multiprocessors; where the device doesn't tell, what a small GPU has.
    pub multiprocessors: u32,
    /// Bytes of the cache that all multiprocessors share: less than the least of the cards that tell how many those are (40 MiB
    /// on an A100), little where nothing is known.
    pub cache_bytes: u64,
    /// The fragment of each half type that sums in f32.
    fragments: [Option<Multiply>; 3],
    /// What tuning chose in place of the choices below.
    blueprints: Arc<Blueprints>,
}

/// The storage type of an element.
pub(crate) fn storage(element: Element) -> StorageType {
    let kind = match element {
        Element::F32 => FloatKind::F32,
        Element::F16 => FloatKind::F16,
        Element::Bf16 => FloatKind::BF16,
    };
    ElemType::Float(kind).into()
}

impl Hardware {
    /// Of a cubecl device.
    pub fn of(properties: &DeviceProperties) -> Self {
        let fragment = |element: Element| {
            // f32 would be rounded to tf32.
            let own = storage(element);
            let fits = |config: &&MmaConfig| {
                let types = config.a_type == own && config.b_type == own && config.cd_type == storage(Element::F32);
                types && [config.m, config.n, config.k].iter().all(|side| *side >= 8 && TASK_SIDE.is_multiple_of(*side))
            };
            let configs = properties.features.matmul.cmma.iter().filter(fits);
            let largest = configs.max_by_key(|config| (config.m.min(config.n), config.k))?;
            let (m, n, k) = (largest.m, largest.n, largest.k);
            (element != Element::F32).then_some(Multiply::Cmma { m, n, k })
        };
        Self {
            plane_size: properties.hardware.plane_size_max.max(1),
            shared_bytes: properties.hardware.max_shared_memory_size,
            units: properties.hardware.max_units_per_cube,
            vector: properties.hardware.max_vector_size,
            multiprocessors: properties.hardware.num_streaming_multiprocessors.unwrap_or(16),
            cache_bytes: if properties.hardware.num_streaming_multiprocessors.is_some() { 32 << 20 } else { 1 << 20 },
            fragments: Element::ALL.map(fragment),
            blueprints: Arc::default(),
        }
    }

    /// The same device with what tuning chose.
    #[must_use]
    pub fn tuned(&self, blueprints: &Blueprints) -> Self {
        Self { blueprints: Arc::new(blueprints.clone()), ..self.clone() }
    }

    /// How matrices of `format` are multiplied.
    pub fn multiply(&self, format: LayerFormat) -> Multiply {
        let own = Element::ALL.iter().position(|element| *element == format.activations);
        let fragment = own.and_then(|own| self.fragments[own]).filter(|_| format.fragments);
        fragment.unwrap_or(Multiply::Fma)
    }

    /// The type that tiles are staged in.
    pub(crate) fn stage(&self, format: LayerFormat) -> Element {
        match self.multiply(format) {
            Multiply::Fma => Element::F32,
            Multiply::Cmma { .. } => format.activations,
        }
    }

    /// Elements of a vector of a line of `width`, 16 bytes where every line starts on one.
    pub(crate) fn vector_size(&self, width: u32, format: LayerFormat) -> usize {
        let weight = match format.weight {
            WeightFormat::Float(element) => element.bytes(),
            _ => 4,
        };
        let widest = format.activations.bytes().max(format.adapters.bytes()).max(weight);
        // Units sum four columns in their registers.
        let most = if self.multiply(format) == Multiply::Fma { 4 } else { 16 / widest as usize };
        [8, 4, 2]
            .into_iter()
            .find(|size| *size <= most.min(self.vector) && (width as usize).is_multiple_of(*size))
            .unwrap_or(1)
    }

    /// How many cubes share the depth of a layer: as many as fill the device where its column tiles don't. Not a matter of the
    /// batch, or a row's bits would be.
    pub(crate) fn splits(&self, shape: LayerShape) -> u32 {
        let tiles = shape.k.div_ceil(64).max(1);
        let wanted = (2 * self.multiprocessors / tiles).min(8);
        wanted.min(shape.d / SPLIT_DEPTH).max(1)
    }
}

/// The least depth of a split, a multiple of every tile's and of every block of a quantised weight.
const SPLIT_DEPTH: u32 = 256;

/// A batch that no blueprint of the device serves.
#[derive(Clone, Copy, Debug, PartialEq, Eq, thiserror::Error)]
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
}

/// A launch of the tile kernel.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct TileLaunch {
    /// The comptime key.
    pub blueprint: TileBlueprint,
    /// Rows, items, scales and tasks.
    pub(crate) tables: Vec<u32>,
    /// First words of the parts.
    pub(crate) items: u32,
    pub(crate) item_count: u32,
    pub(crate) scales: u32,
    pub(crate) tasks: u32,
    pub(crate) task_count: u32,
    pub(crate) virtual_rows: u32,
    /// Numbers of h.
    pub(crate) hidden: u32,
    pub(crate) column_tiles: u32,
    pub(crate) splits: u32,
    /// Steps of d of a cube.
    pub(crate) depth: u32,
}

/// A row of the kernel's table, before tiles are known.
#[derive(Clone, Copy, Default)]
struct Row {
    virtual_row: VirtualRow,
    expand: u32,
    rank: u32,
    hidden: u32,
}

/// Rows that may share a tile: they are multiplied by the same weight.
#[derive(Clone, Copy)]
struct Group {
    first: u32,
    end: u32,
    weight: u32,
    first_scale: u32,
    end_scale: u32,
    unscaled: u32,
}

/// What a tile launch multiplies.
#[derive(Default)]
struct Rows {
    rows: Vec<Row>,
    groups: Vec<Group>,
    /// Scaled virtual rows of W_i, two words each.
    scales: Vec<u32>,
    tasks: Vec<u32>,
    hidden: u32,
}

impl Rows {
    fn push(&mut self, virtual_row: VirtualRow) {
        self.rows.push(Row { virtual_row, ..Row::default() });
    }

    /// A group of the rows from `first` on.
    fn group(&mut self, first: usize, weight: u32) {
        let (first, end) = (first as u32, self.rows.len() as u32);
        if first < end {
            self.groups.push(Group { first, end, weight, first_scale: 0, end_scale: 0, unscaled: 0 });
        }
    }

    fn of_gemm(gemm: &Gemm) -> Self {
        let mut own = Self::default();
        gemm.rows.iter().for_each(|row| own.push(*row));
        own.group(0, 0);
        let mut scales_of = std::collections::BTreeMap::new();
        for segment in &gemm.segments {
            let first = own.rows.len();
            for row in segment.first_row..segment.first_row + segment.rows {
                own.push(VirtualRow { row, in_slot: 0, out_slot: 0, last: 1 });
            }
            own.group(first, 0);
            let (first_scale, end_scale, unscaled) = *scales_of.entry(segment.first_scale).or_insert_with(|| {
                let scales = &gemm.scales[segment.first_scale as usize..segment.end_scale as usize];
                let scaled = scales.iter().filter(|scale| scale.in_slot > 0 || scale.out_slot > 0);
                let first = own.scales.len() as u32 / 2;
                own.scales.extend(scaled.flat_map(|scale| [scale.in_slot, scale.out_slot]));
                let end = own.scales.len() as u32 / 2;
                (first, end, scales.len() as u32 - (end - first))
            });
            if let Some(group) = own.groups.last_mut() {
                *group = Group { first_scale, end_scale, unscaled, ..*group };
            }
        }
        own.low_rank(&gemm.low_rank);
        own
    }

    fn of_materialised(step: &Materialised) -> Self {
        let mut own = Self::default();
        for run in &step.runs {
            let first = own.rows.len();
            for row in run.first_row..run.first_row + run.rows {
                own.push(VirtualRow { row, in_slot: 0, out_slot: 0, last: 1 });
            }
            own.group(first, run.weight);
        }
        own
    }

    /// `count` matrices of `rows` rows each, one after the other.
    fn of_matrices(count: u32, rows: u32) -> Self {
        let mut own = Self::default();
        for matrix in 0..count {
            let first = own.rows.len();
            for row in matrix * rows..(matrix + 1) * rows {
                own.push(VirtualRow { row, in_slot: 0, out_slot: 0, last: 1 });
            }
            own.group(first, matrix);
        }
        own
    }

    /// Gives output rows their place in h, in the order of the table, and lists who computes it.
    fn low_rank(&mut self, runs: &[LowRankRows]) {
        let mut open: Option<(LowRankRows, u32, u32)> = None;
        for entry in self.rows.iter_mut().filter(|entry| entry.virtual_row.last == 1) {
            let row = entry.virtual_row.row;
            let at = runs.partition_point(|run| run.first_row + run.rows <= row);
            let Some(run) = runs.get(at).filter(|run| run.first_row <= row && run.rank > 0) else { continue };
            (entry.expand, entry.rank, entry.hidden) = (run.expand, run.rank, self.hidden);
            match &mut open {
                Some((own, first, rows)) if *own == *run && *first + *rows == row && *rows < TASK_SIDE => *rows += 1,
                _ => {
                    if let Some(done) = open.replace((*run, row, 1)) {
                        push_tasks(&mut self.tasks, done, self.hidden);
                    }
                }
            }
            self.hidden += run.rank;
        }
        if let Some(done) = open {
            push_tasks(&mut self.tasks, done, self.hidden);
        }
    }
}

/// The tasks of some rows of one run whose h ends at `end`.
fn push_tasks(tasks: &mut Vec<u32>, (run, first, rows): (LowRankRows, u32, u32), end: u32) {
    let offset = end - rows * run.rank;
    for rank in (0..run.rank).step_by(TASK_SIDE as usize) {
        let ranks = TASK_SIDE.min(run.rank - rank);
        tasks.extend([first, rows, run.shrink + rank, ranks, offset + rank, run.rank]);
    }
}

/// The tasks of `segmented`, and the items of its second half.
pub(crate) fn shrink_tasks(items: &[flora_plan::schedule::SegmentItem]) -> Vec<u32> {
    let mut tasks = Vec::new();
    for item in items {
        for rank in (0..item.rank).step_by(TASK_SIDE as usize) {
            let ranks = TASK_SIDE.min(item.rank - rank);
            tasks.extend([item.first_row, item.rows, item.shrink + rank, ranks, item.offset + rank, item.rank]);
        }
    }
    tasks
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

pub(crate) fn materialised(
    hardware: &Hardware,
    wanted: Wanted,
    step: &Materialised,
) -> Result<TileLaunch, RoutineError> {
    lay_out(hardware, wanted, Rows::of_materialised(step))
}

pub(crate) fn matrices(hardware: &Hardware, wanted: Wanted, count: u32, rows: u32) -> Result<TileLaunch, RoutineError> {
    lay_out(hardware, wanted, Rows::of_matrices(count, rows))
}

/// Numbers of h that a tile's rows may have, few for few rows; the larger is enough for 128 rows of rank 16.
const HIDDEN: [u32; 2] = [512, 2048];

fn lay_out(hardware: &Hardware, wanted: Wanted, rows: Rows) -> Result<TileLaunch, RoutineError> {
    let Wanted { shape, format, .. } = wanted;
    let on_chip = rows.groups.iter().any(|group| group.unscaled > 0 || group.first_scale < group.end_scale);
    let longest = rows.groups.iter().map(|group| group.end - group.first).max().unwrap_or(0);
    let widest = widest(&rows.rows);
    let splits = if wanted.splits { hardware.splits(shape) } else { 1 };
    let highest_rank = rows.rows.iter().map(|row| row.rank).max().unwrap_or(0);
    let blueprint = TileBlueprint {
        multiply: hardware.multiply(format),
        plane_size: hardware.plane_size,
        tile: Tile { rows: 0, columns: 0, depth: 0, row_planes: 1, column_planes: 1 },
        quantisation: format.weight.quantisation(),
        scaled: rows.rows.iter().any(|row| row.virtual_row.in_slot > 0 || row.virtual_row.out_slot > 0),
        on_chip,
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
        carries: splits == 1 && widest > tile.rows / 2 && longest > tile.rows,
        ..blueprint
    };
    let chosen = hardware.blueprints.tile(format.activations, on_chip, longest);
    let chosen = chosen.filter(|tile| table(blueprint.multiply).contains(tile));
    let mut capacity = hidden;
    let blueprint = loop {
        let own = tiles(blueprint.multiply, on_chip, longest);
        let found = chosen.into_iter().chain(own).map(|tile| with(tile, capacity)).find(fits);
        match found {
            Some(found) => break found,
            None if capacity / 2 >= least && capacity > 1 => capacity /= 2,
            None => return Err(RoutineError::RankTooLarge { rank: highest_rank, bytes: hardware.shared_bytes }),
        }
    };

    let mut tables = Vec::with_capacity(rows.rows.len() * ROW_WORDS as usize);
    for Row { virtual_row, expand, rank, hidden } in &rows.rows {
        let VirtualRow { row, in_slot, out_slot, last } = *virtual_row;
        tables.extend([row, in_slot, out_slot, last, *expand, *rank, *hidden, 0]);
    }
    let items = tables.len() as u32;
    cut(&rows, &blueprint, &mut tables);
    let scales = tables.len() as u32;
    tables.extend(&rows.scales);
    let tasks = tables.len() as u32;
    tables.extend(&rows.tasks);
    let depth = if splits == 1 { shape.d } else { shape.d.div_ceil(splits).next_multiple_of(SPLIT_DEPTH) };
    Ok(TileLaunch {
        blueprint,
        items,
        item_count: (scales - items) / ITEM_WORDS,
        scales,
        tasks,
        task_count: rows.tasks.len() as u32 / TASK_WORDS,
        virtual_rows: rows.rows.len() as u32,
        hidden: rows.hidden,
        column_tiles: shape.k.div_ceil(blueprint.tile.columns),
        splits: shape.d.div_ceil(depth.max(1)),
        depth,
        tables,
    })
}

/// The most virtual rows of an output row.
fn widest(rows: &[Row]) -> u32 {
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
/// Tiles by units, rising.
const BY_UNITS: [Tile; 3] = [tile(16, 64, 16, 1, 1), tile(32, 64, 16, 1, 1), tile(64, 64, 16, 1, 1)];

/// Every tile that a batch may be cut into, whatever its rows: what tuning chooses from.
pub fn table(multiply: Multiply) -> Vec<Tile> {
    match multiply {
        Multiply::Fma => BY_UNITS.to_vec(),
        Multiply::Cmma { .. } => BY_FRAGMENTS.into_iter().chain([PREFILL]).collect(),
    }
}

/// Tiles for `rows` virtual rows that share a weight, the best first, down to one that every device holds.
fn tiles(multiply: Multiply, on_chip: bool, rows: u32) -> impl Iterator<Item = Tile> {
    let (fit, most): (&[Tile], u32) = match multiply {
        Multiply::Fma => (&BY_UNITS, 64),
        Multiply::Cmma { .. } => (&BY_FRAGMENTS, if on_chip { 128 } else { 512 }),
    };
    let mut own: Vec<Tile> = Vec::new();
    if matches!(multiply, Multiply::Cmma { .. }) && rows > most.min(if on_chip { 64 } else { 512 }) {
        own.push(PREFILL);
    }
    let enough = fit.iter().position(|tile| tile.rows >= rows.min(most)).unwrap_or(0);
    own.extend(fit[enough..].iter().take(1));
    // What a smaller device holds: fewer rows, then a shallower stage, then fewer columns.
    own.extend(fit[..enough].iter().rev());
    let smaller = own.clone().into_iter().flat_map(|tile| {
        let shallow = [64, 32, 16].into_iter().filter(move |depth| *depth < tile.depth);
        shallow.map(move |depth| Tile { depth, ..tile })
    });
    let narrow = match multiply {
        Multiply::Fma => tile(16, 32, 16, 1, 1),
        Multiply::Cmma { .. } => tile(16, 32, 16, 1, 2),
    };
    own.clone().into_iter().chain(smaller).chain([narrow])
}

/// Cuts groups into items of whole output rows that fit a tile; where rows are wide, into items of several tiles, of which only
/// the last is partly empty.
fn cut(rows: &Rows, blueprint: &TileBlueprint, tables: &mut Vec<u32>) {
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
                tables.extend([start, last + 1, weight, first_scale, end_scale, unscaled, first_hidden, hidden]);
                start = last + 1;
                hidden = 0;
            }
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::target::{Capability, hardware};

    /// Virtual rows of output rows with these widths, and a low-rank sum of `rank` on every second output row.
    fn gemm_of(widths: &[u32], rank: u32) -> Gemm {
        let mut gemm = Gemm::default();
        for (row, width) in widths.iter().enumerate() {
            let row = row as u32;
            gemm.rows.extend((0..*width).map(|at| VirtualRow {
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
                    let items = &launch.tables[launch.items as usize..launch.scales as usize];
                    let mut next = 0;
                    for item in items.chunks_exact(ITEM_WORDS as usize) {
                        assert_eq!(item[0], next, "{widths:?}");
                        assert_eq!(gemm.rows[item[1] as usize - 1].last, 1, "{widths:?}");
                        assert!(item[7] <= launch.blueprint.hidden, "{widths:?} rank {rank}");
                        assert!(launch.blueprint.carries || item[1] - item[0] <= launch.blueprint.tile.rows);
                        next = item[1];
                    }
                    assert_eq!(next as usize, gemm.rows.len());
                    let stage = hardware.stage(format).bytes() as u32;
                    assert!(launch.blueprint.shared_bytes(stage) <= hardware.shared_bytes);
                }
            }
        }
    }

    #[test]
    fn every_low_rank_sum_has_one_task() {
        let hardware = hardware(Capability::Sm80);
        let runs = vec![
            LowRankRows { first_row: 0, rows: 40, shrink: 0, expand: 0, rank: 5 },
            LowRankRows { first_row: 40, rows: 1, shrink: 5, expand: 5, rank: 33 },
        ];
        let rows = (0..41).map(|row| VirtualRow { row, in_slot: 0, out_slot: 0, last: 1 }).collect();
        let gemm = Gemm { rows, low_rank: runs, ..Gemm::default() };
        let (shape, epilogue) = (LayerShape { d: 64, k: 64 }, Epilogue::default());
        let wanted = Wanted { shape, format: LayerFormat::default(), epilogue, splits: false };
        let launch = super::gemm(&hardware, wanted, &gemm).expect("it fits");
        let mut written = vec![0; launch.hidden as usize];
        for task in launch.tables[launch.tasks as usize..].chunks_exact(TASK_WORDS as usize) {
            for row in 0..task[1] {
                for rank in 0..task[3] {
                    written[(task[4] + row * task[5] + rank) as usize] += 1;
                }
            }
        }
        assert_eq!(written, vec![1; 40 * 5 + 33]);
    }
}
