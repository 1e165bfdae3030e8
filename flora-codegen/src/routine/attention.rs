//! How a step's attention is cut into cubes, and the tables that say so.

use flora_runtime::decoding::{AttentionOperands, BLOCK_TOKENS, SegmentOperands};

use super::{Hardware, RoutineError};
use crate::kernels::AttentionBlueprint;
use crate::kernels::attention::{SPLIT, UNITS};
use crate::kernels::tables::{AttentionItem, MergedQuery, Words};

/// Queries of a tile of rows that are decoded: those of one row, or of some.
const NARROW: u32 = 8;
/// Queries of a tile of a prompt's rows.
const WIDE: u32 = 32;
/// Queries from which on a sequence's tiles are wide: with less, there would be more units than keep the device busy with splits.
const MANY: usize = 4 * NARROW as usize;

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
    let narrow = blueprint(NARROW, false).ok_or(too_large)?;
    let wide = blueprint(WIDE, true).or_else(|| blueprint(NARROW, true)).ok_or(too_large)?;

    let mut words = Words::default();
    words.append(&operands.copies);
    let slots = words.append(&operands.segments.iter().flat_map(slots_of).collect::<Vec<u32>>());
    let mut cut = Cut { group: heads.queries / heads.keys, window: operands.window, ..Cut::default() };
    for segment in &operands.segments {
        let blocks = words.append(&segment.blocks);
        let many = segment.rows.len() * cut.group > MANY;
        cut.segment(segment, blocks, if many { wide } else { narrow });
    }
    let Cut { narrow: narrow_items, wide: wide_items, merged, partial, .. } = cut;
    let tiles = [(narrow, narrow_items), (wide, wide_items)]
        .into_iter()
        .filter(|(_, items)| !items.is_empty())
        .map(|(blueprint, items)| Tiles { blueprint, items: words.append(&items), count: items.len() as u32 })
        .collect();
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
    narrow: Vec<AttentionItem>,
    wide: Vec<AttentionItem>,
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
            if blueprint.folds {
                self.wide.push(item);
            } else {
                self.split(item);
            }
        }
    }

    /// A cube for each split, and what merges them where there are several.
    fn split(&mut self, item: AttentionItem) {
        let first = item.start / SPLIT;
        let splits = (item.end - 1) / SPLIT - first + 1;
        let partial = if splits > 1 { self.partial } else { 0 };
        self.narrow.extend((0..splits).map(|split| AttentionItem {
            start: item.start.max((first + split) * SPLIT),
            end: item.end.min((first + split + 1) * SPLIT),
            partial,
            splits,
            split,
            ..item
        }));
        if splits > 1 {
            let group = self.group as u32;
            self.merged.extend((0..item.queries).map(|own| {
                let query = item.first_query + own;
                let (row, head) = (item.first_row + query / group, query % group);
                MergedQuery { row, head, partial: partial + own * splits, splits }
            }));
            self.partial += item.queries * splits;
        }
    }
}
