//! How a step's attention is cut into cubes, and the tables that say so.

use flora_runtime::decoding::{AttentionOperands, BLOCK_TOKENS, SegmentOperands};

use super::{Hardware, RoutineError};
use crate::kernels::AttentionBlueprint;
use crate::kernels::attention::{SPLIT, UNITS};
use crate::kernels::tables::{AttentionItem, MergedQuery, Words};

/// Queries of a tile of a sequence that has few in a step.
const NARROW: u32 = 8;
/// Queries of a tile of one that has more than two of those.
const WIDE: u32 = 32;
/// Queries of a key-value head up to which there is a cube for each split: more keep a device busy with one for each tile, and splits
/// of as many would take more memory than keys.
const FEW_QUERIES: usize = 4 * WIDE as usize;

/// Kinds of tiles.
#[derive(Clone, Copy)]
struct Kinds {
    narrow: AttentionBlueprint,
    wide: AttentionBlueprint,
    folding: AttentionBlueprint,
}

impl Kinds {
    /// Of a sequence with so many rows in a step, of `group` queries each.
    fn of(&self, rows: usize, group: usize) -> AttentionBlueprint {
        if rows * group <= 2 * NARROW as usize {
            self.narrow
        } else if rows * group <= FEW_QUERIES {
            self.wide
        } else {
            self.folding
        }
    }
}

/// The launches of a step's attention.
pub(crate) struct AttentionLaunch {
    /// Words of copies `[from, to]`, slots of rows, blocks of sequences, tiles and queries to merge.
    pub(crate) words: Words,
    /// Blocks to copy; the first is at word 0.
    pub(crate) copies: u32,
    /// Word of the first row's slot.
    pub(crate) slots: u32,
    /// A launch for each kind of tile that occurs.
    pub(crate) tiles: Vec<Tiles>,
    /// Word of the first query whose splits are merged.
    pub(crate) merged: u32,
    /// How many.
    pub(crate) merged_count: u32,
    /// Splits of all queries that are merged.
    pub(crate) partial: u32,
    /// Numbers of a vector.
    pub(crate) lanes: usize,
}

/// Tiles of one kind.
pub(crate) struct Tiles {
    pub(crate) blueprint: AttentionBlueprint,
    /// Word of the first.
    pub(crate) items: u32,
    /// How many.
    pub(crate) count: u32,
}

/// Cuts a step's queries into tiles. What kind of tile a query is in changes none of its bits.
pub(crate) fn attention(
    hardware: &Hardware,
    operands: &AttentionOperands<'_>,
) -> Result<AttentionLaunch, RoutineError> {
    let heads = operands.heads;
    let lanes = hardware.line_vector_size(heads.size, operands.element);
    let blueprint = |queries: u32, folds: bool| {
        let (size, rotates) = (heads.size as u32, operands.rotary.is_some());
        let blueprints = (1..=size / lanes as u32)
            .filter(|parts| size.is_multiple_of(*parts) && (size / parts).is_multiple_of(lanes as u32))
            .map(|parts| AttentionBlueprint { queries, size, chunk: size / parts, folds, rotates });
        let fits = |blueprint: &AttentionBlueprint| {
            blueprint.shared_bytes(operands.element.bytes()) <= hardware.shared_bytes && UNITS <= hardware.units
        };
        blueprints.into_iter().find(fits)
    };
    let too_large =
        RoutineError::HeadTooLarge { size: heads.size as u32, bytes: hardware.shared_bytes, units: hardware.units };
    let of_width = |folds: bool| blueprint(WIDE, folds).or_else(|| blueprint(NARROW, folds)).ok_or(too_large);
    let narrow = blueprint(NARROW, false).ok_or(too_large)?;
    let kinds = Kinds { narrow, wide: of_width(false)?, folding: of_width(true)? };

    let mut words = Words::default();
    words.append(&operands.copies);
    let slots = words.append(&operands.segments.iter().flat_map(slots_of).collect::<Vec<u32>>());
    let group = heads.queries.checked_div(heads.keys).filter(|group| *group > 0).ok_or(too_large)?;
    let blocks: Vec<u32> = operands.segments.iter().map(|segment| words.append(&segment.blocks)).collect();
    let cut_into = |kind: &dyn Fn(usize) -> AttentionBlueprint| {
        let mut cut = Cut { group, window: operands.window, ..Cut::default() };
        for (segment, blocks) in operands.segments.iter().zip(&blocks) {
            cut.segment(segment, *blocks, kind(segment.rows.len()));
        }
        cut
    };
    let mut cut = cut_into(&|rows| kinds.of(rows, group));
    let bytes = 4 * u64::from(cut.partial) * (heads.keys * heads.size.max(2)) as u64;
    let cubes = cut.tiles.iter().map(|(_, items)| items.len()).max().unwrap_or(0);
    if bytes > hardware.largest_buffer || cubes > hardware.cubes as usize {
        // Cubes that have all splits keep none, and are fewer.
        cut = cut_into(&|_| kinds.folding);
    }
    let Cut { tiles, merged, partial, .. } = cut;
    let tile =
        |(blueprint, items): (_, Vec<_>)| Tiles { blueprint, items: words.append(&items), count: items.len() as u32 };
    let tiles = tiles.into_iter().map(tile).collect();
    let (merged, merged_count) = (words.append(&merged), merged.len() as u32);
    let copies = operands.copies.len() as u32;
    Ok(AttentionLaunch { words, copies, slots, tiles, merged, merged_count, partial, lanes })
}

/// Where the keys and values of a sequence's rows go: block · BLOCK_TOKENS + token.
fn slots_of(segment: &SegmentOperands) -> impl Iterator<Item = u32> {
    let positions = segment.first_position..segment.first_position + segment.rows.len();
    positions.map(|position| {
        // A sequence has blocks for all its rows.
        let block = segment.blocks.get(position / BLOCK_TOKENS).copied().unwrap_or_default();
        block * BLOCK_TOKENS as u32 + (position % BLOCK_TOKENS) as u32
    })
}

/// What was cut so far.
#[derive(Default)]
struct Cut {
    group: usize,
    window: Option<u32>,
    /// By kind.
    tiles: Vec<(AttentionBlueprint, Vec<AttentionItem>)>,
    merged: Vec<MergedQuery>,
    partial: u32,
}

impl Cut {
    fn segment(&mut self, segment: &SegmentOperands, blocks: u32, blueprint: AttentionBlueprint) {
        let all = segment.rows.len() * self.group;
        let (first_row, first_position) = (segment.rows.start as u32, segment.first_position as u32);
        for first_query in (0..all).step_by(blueprint.queries as usize) {
            let queries = (all - first_query).min(blueprint.queries as usize);
            let position = |query: usize| first_position + (query / self.group) as u32;
            let end = position(first_query + queries - 1) + 1;
            let start = self.window.map_or(0, |window| (position(first_query) + 1).saturating_sub(window));
            let item = AttentionItem {
                first_row,
                first_position,
                first_query: first_query as u32,
                queries: queries as u32,
                blocks,
                start: start / BLOCK_TOKENS as u32 * BLOCK_TOKENS as u32,
                end,
                partial: 0,
                splits: 1,
                split: 0,
            };
            let items = if blueprint.folds { vec![item] } else { self.split(item) };
            match self.tiles.iter_mut().find(|(kind, _)| *kind == blueprint) {
                Some((_, tiles)) => tiles.extend(items),
                None => self.tiles.push((blueprint, items)),
            }
        }
    }

    /// A cube for each split, and what merges them where there are several.
    fn split(&mut self, item: AttentionItem) -> Vec<AttentionItem> {
        let first = item.start / SPLIT;
        let splits = (item.end - 1) / SPLIT - first + 1;
        let partial = if splits > 1 { self.partial } else { 0 };
        if splits > 1 {
            let group = self.group as u32;
            self.merged.extend((0..item.queries).map(|own| {
                let query = item.first_query + own;
                let (row, head) = (item.first_row + query / group, query % group);
                MergedQuery { row, head, partial: partial + own * splits, splits }
            }));
            self.partial += item.queries * splits;
        }
        let own = |split| AttentionItem {
            start: item.start.max((first + split) * SPLIT),
            end: item.end.min((first + split + 1) * SPLIT),
            partial,
            splits,
            split,
            ..item
        };
        (0..splits).map(own).collect()
    }
}
