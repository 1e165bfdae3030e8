//! Whether a schedule and its operands belong together. Everything after this indexes without asking again.

use flora_plan::layer::LayerShape;
use flora_plan::schedule::{
    AdapterGradient, BackwardSchedule, Gemm, LowRankRows, Materialised, NO_ROW, Packing, Scale, Schedule, Step,
};

use flora_runtime::RankGates;

use crate::error::HostError;
use crate::operands::Operands;
use crate::values::{NOT_REPLACED, Replaced, Rows, RowsMut, Values, span};
use crate::weight::Weight;

/// How many of each thing an index may point to.
struct Limits {
    tokens: u64,
    in_slots: u64,
    out_slots: u64,
    /// Ranks that have gates, where there are any.
    ranks: u64,
}

/// Compares all lengths and indices.
pub(crate) fn check(
    operands: &Operands<'_>,
    schedule: &Schedule,
    (x, replaced, y): (&Rows<'_>, Option<&Replaced<'_>>, &RowsMut<'_>),
    gates: Option<RankGates<'_>>,
    residual: Option<usize>,
) -> Result<(), HostError> {
    let shape = operands.weight.shape();
    schedule.fits(shape)?;
    let (d, k, tokens) = (shape.d as usize, shape.k as usize, schedule.tokens() as usize);
    pitch("x", x.pitch, d)?;
    pitch("y", y.pitch, k)?;
    length("x", x.values.len(), span(tokens, d, x.pitch))?;
    length("y", y.values.len(), span(tokens, k, y.pitch))?;
    if let Some(Replaced { places, values }) = replaced {
        length("the places of replaced rows", places.len(), tokens)?;
        let last = places.iter().filter(|place| **place != NOT_REPLACED).max();
        length(
            "the rows in place of others",
            values.len(),
            last.map_or(0, |last| (*last as usize + 1).saturating_mul(d)),
        )?;
    }
    if operands.epilogue.bias {
        length("the bias", operands.bias.ok_or(HostError::Missing { what: "a bias" })?.len(), k)?;
    }
    if operands.epilogue.residual {
        length("the residual", residual.ok_or(HostError::Missing { what: "a residual" })?, tokens.saturating_mul(k))?;
    }
    let mut limits = Limits::of(operands, tokens as u64)?;
    if let Some(RankGates { width, values }) = gates {
        length("the gates", values.len(), tokens.saturating_mul(width))?;
        limits.ranks = width as u64;
    }
    limits.check_steps(operands, schedule)
}

/// Compares all lengths and indices of a backward pass; lengths of what isn't wanted are `None`.
pub(crate) fn check_backward(
    operands: &Operands<'_>,
    schedule: &BackwardSchedule,
    (x, g): (usize, usize),
    (dx, vectors): (Option<usize>, Option<[usize; 2]>),
) -> Result<(), HostError> {
    let shape = operands.weight.shape();
    schedule.fits(shape)?;
    let (d, k, tokens) = (shape.d as usize, shape.k as usize, schedule.tokens() as usize);
    length("x", x, tokens.saturating_mul(d))?;
    length("the output's gradient", g, tokens.saturating_mul(k))?;
    let limits = Limits::of(operands, tokens as u64)?;
    if let Some(dx) = dx {
        length("dx", dx, tokens.saturating_mul(d))?;
        let exchanged = Limits { in_slots: limits.out_slots, out_slots: limits.in_slots, ..limits };
        exchanged.check_steps(operands, schedule.input())?;
    }
    if let Some([in_vectors, out_vectors]) = vectors {
        length("the gradients of in-vectors", in_vectors, (schedule.in_vectors() as usize).saturating_mul(d))?;
        length("the gradients of out-vectors", out_vectors, (schedule.out_vectors() as usize).saturating_mul(k))?;
        schedule.adapters().iter().try_for_each(|adapter| limits.check_gradient(adapter))?;
    }
    Ok(())
}

/// Compares a step whose weight of `position` is made, apart from its rows.
pub(crate) fn check_recipe(operands: &Operands<'_>, step: &Materialised, position: usize) -> Result<(), HostError> {
    within("materialised weight", position as u64 + 1, step.adapters.len() as u64)?;
    Limits::of(operands, u64::MAX)?.check_materialised(step)
}

fn length(what: &'static str, found: usize, expected: usize) -> Result<(), HostError> {
    if found == expected { Ok(()) } else { Err(HostError::WrongLength { what, expected, found }) }
}

fn pitch(what: &'static str, pitch: usize, width: usize) -> Result<(), HostError> {
    if pitch >= width { Ok(()) } else { Err(HostError::Overlap { what, pitch, width }) }
}

fn check_shape(what: &'static str, weight: &Weight, LayerShape { d, k }: LayerShape) -> Result<(), HostError> {
    let LayerShape { d: found_d, k: found_k } = weight.shape();
    if (d, k) == (found_d, found_k) { Ok(()) } else { Err(HostError::WrongShape { what, d, k, found_d, found_k }) }
}

fn slots(what: &'static str, pool: Values<'_>, width: usize) -> Result<u64, HostError> {
    match pool.len().checked_rem(width) {
        Some(0) => Ok((pool.len() / width) as u64),
        _ if pool.is_empty() => Ok(0),
        _ => Err(HostError::PartialVector { what, width, found: pool.len() }),
    }
}

/// Whether the slots of a block follow one another, as many as there are in the other packing.
fn consecutive(what: &'static str, packing: &Packing, other: &Packing) -> Result<(), HostError> {
    let blocks = |packing: &Packing| packing.block.max(1) as usize;
    let others = other.index.chunks(blocks(other));
    for (block, other) in packing.index.chunks(blocks(packing)).zip(others) {
        let first = block.first().copied().unwrap_or(NO_ROW);
        for (at, slot) in block.iter().enumerate().filter(|(_, slot)| **slot != NO_ROW) {
            if other.get(at).is_none_or(|other| *other == NO_ROW) || u64::from(first) + at as u64 != u64::from(*slot) {
                return Err(HostError::NotRising { what, row: *slot });
            }
        }
    }
    Ok(())
}

/// `end` is one past the last.
fn within(what: &'static str, end: u64, count: u64) -> Result<(), HostError> {
    if end <= count { Ok(()) } else { Err(HostError::OutOfRange { what, index: end - 1, count }) }
}

impl Limits {
    fn of(operands: &Operands<'_>, tokens: u64) -> Result<Self, HostError> {
        let LayerShape { d, k } = operands.weight.shape();
        Ok(Self {
            tokens,
            in_slots: slots("the pool of in-vectors", operands.in_pool, d as usize)?,
            out_slots: slots("the pool of out-vectors", operands.out_pool, k as usize)?,
            ranks: u64::MAX,
        })
    }

    fn rows(&self, first: u32, rows: u32) -> Result<(), HostError> {
        within("row", u64::from(first) + u64::from(rows), self.tokens)
    }

    fn low_rank(&self, shrink: u32, expand: u32, rank: u32) -> Result<(), HostError> {
        within("in-vector", u64::from(shrink) + u64::from(rank), self.in_slots)?;
        within("out-vector", u64::from(expand) + u64::from(rank), self.out_slots)?;
        within("gate", rank.into(), self.ranks)
    }

    /// Slots count from 1.
    fn scale(&self, Scale { in_slot, out_slot }: Scale) -> Result<(), HostError> {
        within("in-vector", u64::from(in_slot), self.in_slots)?;
        within("out-vector", u64::from(out_slot), self.out_slots)
    }

    fn scales(&self, scales: &[Scale], first: u32, end: u32) -> Result<(), HostError> {
        within("virtual row", u64::from(end), scales.len() as u64)?;
        within("virtual row", u64::from(first), u64::from(end))
    }

    /// Runs of rows that rise and don't overlap.
    fn runs(&self, what: &'static str, runs: impl Iterator<Item = (u32, u32)>) -> Result<(), HostError> {
        let mut end = 0;
        for (row, rows) in runs {
            self.rows(row, rows)?;
            if row < end {
                return Err(HostError::NotRising { what, row });
            }
            end = row + rows;
        }
        Ok(())
    }

    fn check_gemm(&self, gemm: &Gemm) -> Result<(), HostError> {
        let mut before = None;
        for row in &gemm.rows {
            self.rows(row.row, 1)?;
            self.scale(Scale { in_slot: row.in_slot, out_slot: row.out_slot })?;
            // A row goes on until its last virtual row.
            let rises = before.is_none_or(|(before, last)| if last { row.row > before } else { row.row == before });
            if !rises {
                return Err(HostError::NotRising { what: "virtual rows", row: row.row });
            }
            before = Some((row.row, row.last == 1));
        }
        self.runs("segments", gemm.segments.iter().map(|segment| (segment.first_row, segment.rows)))?;
        gemm.scales.iter().try_for_each(|scale| self.scale(*scale))?;
        for segment in &gemm.segments {
            self.scales(&gemm.scales, segment.first_scale, segment.end_scale)?;
        }
        self.low_rank_runs(&gemm.low_rank)
    }

    fn low_rank_runs(&self, runs: &[LowRankRows]) -> Result<(), HostError> {
        self.runs("low-rank rows", runs.iter().map(|run| (run.first_row, run.rows)))?;
        runs.iter().try_for_each(|run| self.low_rank(run.shrink, run.expand, run.rank))
    }

    fn check_materialised(&self, step: &Materialised) -> Result<(), HostError> {
        self.runs("materialised rows", step.runs.iter().map(|run| (run.first_row, run.rows)))?;
        step.scales.iter().try_for_each(|scale| self.scale(*scale))?;
        for adapter in &step.adapters {
            self.scales(&step.scales, adapter.first_scale, adapter.end_scale)?;
            self.low_rank(adapter.shrink, adapter.expand, adapter.rank)?;
        }
        let adapters = step.adapters.len() as u64;
        step.runs.iter().try_for_each(|run| within("materialised weight", u64::from(run.weight) + 1, adapters))
    }

    fn check_steps(&self, operands: &Operands<'_>, schedule: &Schedule) -> Result<(), HostError> {
        for step in schedule.steps() {
            match step {
                Step::Gemm(gemm) => self.check_gemm(gemm)?,
                Step::Materialised(step) => self.check_materialised(step)?,
                Step::Merged(step) => {
                    self.runs("merged rows", step.runs.iter().map(|run| (run.first_row, run.rows)))?;
                    let merged = operands.merged.ok_or(HostError::Missing { what: "a merged weight" })?;
                    check_shape("the merged weight", merged, operands.weight.shape())?;
                }
                Step::Segmented { items, .. } => {
                    for item in items {
                        self.rows(item.first_row, item.rows)?;
                        self.low_rank(item.shrink, item.expand, item.rank)?;
                    }
                }
                Step::LowRankBmm(step) => {
                    within("gate", step.shrink.block.into(), self.ranks)?;
                    self.packing("row", self.tokens, &step.rows)?;
                    self.packing("in-vector", self.in_slots, &step.shrink)?;
                    self.packing("out-vector", self.out_slots, &step.expand)?;
                    consecutive("shrink slots", &step.shrink, &step.expand)?;
                    consecutive("expand slots", &step.expand, &step.shrink)?;
                }
                Step::Finish => {}
            }
        }
        Ok(())
    }

    /// What the gradients of an adapter are made of. Where they are written is the schedule's own.
    fn check_gradient(&self, adapter: &AdapterGradient) -> Result<(), HostError> {
        let AdapterGradient { runs, in_scales, out_scales, low_rank, .. } = adapter;
        self.runs("rows of an adapter", runs.iter().map(|run| (run.first_row, run.rows)))?;
        in_scales.iter().try_for_each(|slot| self.scale(Scale { in_slot: 0, out_slot: *slot }))?;
        out_scales.iter().try_for_each(|slot| self.scale(Scale { in_slot: *slot, out_slot: 0 }))?;
        self.low_rank(low_rank.shrink, low_rank.expand, low_rank.rank)
    }

    fn packing(&self, what: &'static str, count: u64, packing: &Packing) -> Result<(), HostError> {
        let named = packing.index.iter().filter(|index| **index != NO_ROW);
        named.copied().try_for_each(|index| within(what, u64::from(index) + 1, count))
    }
}
