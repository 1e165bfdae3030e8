//! One shape, batch and choice of types, with everything that is measured on it.

use std::collections::BTreeMap;
use std::sync::Arc;

use flora::prelude::*;
use flora_plan::batch::{AdapterSlots, BatchShape, Segment};
use flora_plan::cost::{PricedLayer, work};
use flora_plan::lowering::lowerings_of;
use flora_plan::schedule::{Materialised, Schedule, ScheduleError, schedule};
use flora_runtime::{BackendKind, LayerOperands};
use flora_runtime::{Buffer, DeviceError, ProjectionError};

use super::timed::{Clock, Timed, random_input, random_operands};
use crate::commands::error::CommandError;
use crate::commands::layer;

/// The adapters that are measured alone, with whether their rank can be chosen; each is a built-in layer.
pub(super) const ADAPTERS: [(&str, bool); 4] = [("lora", true), ("flora", true), ("hira", true), ("ia3", false)];
/// What base rows are called.
pub(crate) const BASE: &str = "none";
/// What the base rows of a mixed batch are called.
pub(super) const MIXED: &str = "mixed";
/// The name of the base GEMM where a lowering's would stand.
pub(super) const MATMUL: &str = "matmul";

/// Segments of equal length.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) struct Tokens {
    pub(super) segments: u32,
    pub(super) rows: u32,
}

impl Tokens {
    pub(super) fn all(self) -> u32 {
        self.segments * self.rows
    }
}

/// The coordinates of a group of measurements.
#[derive(Clone, Copy, Debug)]
pub(super) struct Case {
    pub(super) shape: LayerShape,
    pub(super) tokens: Tokens,
    pub(super) format: LayerFormat,
}

/// What to measure on every case.
#[derive(Clone, Debug)]
pub(super) struct Wanted {
    pub(super) ranks: Vec<u32>,
    pub(super) adapters: Vec<String>,
    pub(super) lowerings: Vec<Lowering>,
    pub(super) split: bool,
}

/// Something that is measured: a sum of times, which for all but mixed batches is one time.
#[derive(Clone, Debug)]
pub(super) struct Variant {
    pub(super) adapter: &'static str,
    pub(super) lowering: String,
    pub(super) rank: u32,
    pub(super) tokens: u32,
    pub(super) segments: u32,
    /// Multiply-accumulates of the lowering.
    pub(super) macs: u64,
    /// Bytes of operands, each read once, and of y, written once.
    pub(super) bytes: u64,
    terms: Vec<(f64, Timed)>,
}

impl Variant {
    /// One repetition.
    pub(super) fn seconds(&self, clock: Clock) -> Result<f64, CommandError> {
        self.terms.iter().try_fold(0.0, |sum, (sign, timed)| Ok(sum + sign * clock.seconds(timed)?))
    }
}

/// The largest tables and tensors of a case, in numbers.
const LARGEST: u64 = 1 << 28;

/// Whether so many numbers are few enough to be measured.
pub(super) fn fits(what: &'static str, found: u64) -> Result<(), CommandError> {
    match found <= LARGEST {
        true => Ok(()),
        false => Err(CommandError::TooMany { what, found, limit: LARGEST }),
    }
}

/// A batch as the scheduler sees it.
struct Rows {
    segments: Vec<Segment>,
    adapters: Vec<AdapterSlots>,
}

impl Rows {
    /// One adapter of `compiled`'s form for each of `tokens`' segments.
    fn distinct(compiled: &CompiledLayer, rank: u32, tokens: Tokens) -> Self {
        let stride = stride(compiled, rank);
        let positions = 0..tokens.segments;
        let segments = positions.clone().map(|adapter| Segment { rows: tokens.rows, adapter }).collect();
        Self { segments, adapters: positions.map(|adapter| compiled.slots(rank, adapter * stride)).collect() }
    }

    /// `base` base rows with single rows of adapters of every kind between them.
    fn mixed(kinds: &[CompiledLayer], rank: u32, base: u32, adapted: u32) -> Self {
        let mut rows = Self { segments: Vec::new(), adapters: vec![AdapterSlots::base()] };
        let mut first = 0;
        for position in 0..adapted {
            let kind = &kinds[position as usize % kinds.len()];
            let share = |position: u32| (u64::from(base) * u64::from(position) / u64::from(adapted)) as u32;
            rows.segments.push(Segment { rows: share(position + 1) - share(position), adapter: 0 });
            rows.segments.push(Segment { rows: 1, adapter: rows.adapters.len() as u32 });
            rows.adapters.push(kind.slots(rank, first));
            first += stride(kind, rank);
        }
        rows
    }

    /// Rows of the GEMM over all virtual rows.
    fn virtual_rows(&self) -> u64 {
        let width = |segment: &Segment| self.adapters[segment.adapter as usize].virtual_rows.len() as u64;
        self.segments.iter().map(|segment| u64::from(segment.rows) * width(segment)).sum()
    }

    /// Vectors in either pool.
    fn slots(&self) -> u32 {
        self.adapters.iter().map(|slots| slots.in_slots().max(slots.out_slots())).max().unwrap_or(0)
    }

    /// Numbers in the vectors of all adapters.
    fn numbers(&self, shape: LayerShape) -> u64 {
        let (d, k) = (u64::from(shape.d), u64::from(shape.k));
        let of = |slots: &AdapterSlots| {
            let rows = &slots.virtual_rows;
            let ins = rows.iter().filter(|row| row.in_scale.is_some()).count() as u64;
            let outs = rows.iter().filter(|row| row.out_scale.is_some()).count() as u64;
            let rank = u64::from(slots.low_rank.rank);
            (ins + rank) * d + (outs + rank) * k
        };
        self.adapters.iter().map(of).sum()
    }
}

fn stride(compiled: &CompiledLayer, rank: u32) -> u32 {
    let slots = compiled.slots(rank, 0);
    slots.in_slots().max(slots.out_slots())
}

/// Single rows of adapters in a mixed batch of `base` base rows: few, so that the base rows are most of its time.
fn adapted_rows(base: u32) -> u32 {
    (base / 32).next_multiple_of(4).max(4)
}

/// Everything that is measured on `case`, the base GEMM first. What the device can't run is left out, and `left_out` says why.
pub(super) fn variants(
    clock: Clock,
    case: Case,
    wanted: &Wanted,
    left_out: &mut Vec<String>,
) -> Result<Vec<Variant>, CommandError> {
    let (Case { shape, tokens, format }, device) = (case, clock.device);
    let widest = u64::from(shape.d.max(shape.k));
    fits("the numbers of the base weight", u64::from(shape.d) * u64::from(shape.k))?;

    // Every batch before any tensor, because the pools hold the vectors of the one that has most.
    let mut batches = Vec::new();
    for (adapter, has_rank) in ADAPTERS.iter().filter(|(name, _)| wanted.adapters.iter().any(|wanted| wanted == name)) {
        let compiled = layer::open(adapter)?.compiled;
        let ranks = if *has_rank { &wanted.ranks[..] } else { &[1] };
        for rank in ranks {
            let rows = Rows::distinct(&compiled, *rank, tokens);
            batches.push((*adapter, if *has_rank { *rank } else { 0 }, compiled.parts[0], rows));
        }
    }
    let mut mixtures = Vec::new();
    if wanted.adapters.iter().any(|wanted| wanted == MIXED) {
        let kinds = ADAPTERS.iter().map(|(name, _)| Ok(layer::open(name)?.compiled));
        let kinds = kinds.collect::<Result<Vec<_>, CommandError>>()?;
        let mixed = |rank: &u32| (*rank, Rows::mixed(&kinds, *rank, tokens.all(), adapted_rows(tokens.all())));
        mixtures.extend(wanted.ranks.iter().map(mixed));
    }
    let all = || batches.iter().map(|(_, _, _, rows)| rows).chain(mixtures.iter().map(|(_, rows)| rows));
    let slots = all().map(Rows::slots).max().unwrap_or(0);
    let virtual_rows = all().map(Rows::virtual_rows).max().unwrap_or(0).max(u64::from(tokens.all()));
    fits("the numbers of the adapters", u64::from(slots) * widest)?;
    fits("the numbers of the batch's rows", virtual_rows.saturating_mul(4).max(u64::from(tokens.all()) * widest))?;
    fits(
        "the numbers of the mixed batch",
        mixtures.iter().map(|(_, rows)| rows.virtual_rows()).max().unwrap_or(0) * widest,
    )?;

    let operands = Arc::new(random_operands(device, shape, format, slots)?);
    let mut bench = Bench { device, case, operands, inputs: BTreeMap::new() };
    let base = bench.base()?;
    let mut variants = vec![base.clone()];
    for (adapter, rank, part, rows) in &batches {
        for row in lowerings_of(*part) {
            let (lowering, plan) = (row.lowering(), Plan::default().with_part(row.computes));
            if !wanted.lowerings.contains(&lowering) || plan.merges() && tokens.segments != 1 {
                continue;
            }
            let plan = if wanted.split { plan.with_split() } else { plan };
            let variant = bench.lowered(adapter, *rank, plan, lowering, rows);
            let title = || format!("{adapter} of rank {rank} by {lowering}");
            variants.extend(unless_impossible(clock, variant, title, left_out)?);
        }
    }
    for (rank, rows) in &mixtures {
        for lowering in [MultiplicativeLowering::Stacked, MultiplicativeLowering::OnChip]
            .into_iter()
            .filter(|lowering| wanted.lowerings.contains(&lowering.lowering()))
        {
            // The planner stacks single rows, whatever it does with longer segments.
            let plan = Plan::new(lowering, AdditiveLowering::Fused).with_on_chip_from(2);
            let plan = if wanted.split { plan.with_split() } else { plan };
            let variant = bench.mixed(*rank, plan, rows, &base);
            let title = || format!("a mixed batch of rank {rank} by {lowering}");
            variants.extend(unless_impossible(clock, variant, title, left_out)?);
        }
    }
    Ok(variants)
}

/// The variant, run once; `None`, with a word in `left_out`, where its buffers or launches are more than the device takes.
fn unless_impossible(
    clock: Clock,
    variant: Result<Variant, CommandError>,
    title: impl Fn() -> String,
    left_out: &mut Vec<String>,
) -> Result<Option<Variant>, CommandError> {
    match variant.and_then(|variant| variant.seconds(clock).map(|_| variant)) {
        Ok(variant) => Ok(Some(variant)),
        Err(error) if is_impossible(&error) => {
            left_out.push(format!("{}: {error}", title()));
            Ok(None)
        }
        Err(error) => Err(error),
    }
}

/// Whether a batch's buffers or launches are more than the device takes.
pub(super) fn is_impossible(error: &CommandError) -> bool {
    match error {
        CommandError::Below(below) => {
            let batch = matches!(below.downcast_ref(), Some(ProjectionError::Schedule(ScheduleError::TooLarge { .. })));
            batch || matches!(below.downcast_ref(), Some(DeviceError::Refused(_)))
        }
        _ => false,
    }
}

/// A case's tensors.
struct Bench<'a> {
    device: &'a Device,
    case: Case,
    operands: Arc<LayerOperands>,
    /// By rows.
    inputs: BTreeMap<u32, Buffer>,
}

impl Bench<'_> {
    fn timed(&mut self, schedule: Schedule) -> Result<Timed, CommandError> {
        let tokens = schedule.tokens();
        let x = match self.inputs.get(&tokens) {
            Some(x) => x.clone(),
            None => {
                let x = random_input(self.device, self.case.shape, self.case.format, tokens)?;
                self.inputs.insert(tokens, x.clone());
                x
            }
        };
        Ok(Timed { operands: self.operands.clone(), schedule, x })
    }

    fn base_gemm(&mut self, rows: u32) -> Result<Timed, CommandError> {
        self.timed(Schedule::base_gemm(self.case.shape, rows).map_err(ProjectionError::from)?)
    }

    /// Bytes of x and y.
    fn row_bytes(&self, rows: u32) -> u64 {
        let LayerShape { d, k } = self.case.shape;
        self.case.format.activations.bytes() * u64::from(rows) * (u64::from(d) + u64::from(k))
    }

    fn base(&mut self) -> Result<Variant, CommandError> {
        let Case { shape, tokens, format } = self.case;
        let rows = tokens.all();
        Ok(Variant {
            adapter: BASE,
            lowering: MATMUL.to_owned(),
            rank: 0,
            tokens: rows,
            segments: tokens.segments,
            macs: u64::from(rows) * u64::from(shape.d) * u64::from(shape.k),
            bytes: format.weight.bytes(shape) + self.row_bytes(rows),
            terms: vec![(1.0, self.base_gemm(rows)?)],
        })
    }

    fn lowered(
        &mut self,
        adapter: &'static str,
        rank: u32,
        plan: Plan,
        lowering: Lowering,
        rows: &Rows,
    ) -> Result<Variant, CommandError> {
        let Case { shape, tokens, format } = self.case;
        let Rows { segments, adapters } = rows;
        let mut adapters = adapters.clone();
        if let Some(first) = adapters.first_mut().filter(|_| plan.merges()) {
            first.is_merged = true;
        }
        let schedule = schedule(&plan, shape, segments, &adapters, false).map_err(ProjectionError::from)?;
        let mut timed = self.timed(schedule)?;
        let mut operand_bytes = format.weight.bytes(shape) + format.adapters.bytes() * rows.numbers(shape);
        if plan.merges() {
            let made = self.device.merged(&self.operands, 0, &Materialised::weight_of(&adapters[0]))?;
            operand_bytes = format.activations.bytes() * u64::from(shape.d) * u64::from(shape.k);
            timed.operands = Arc::new(made);
        }
        let pads = self.device.info().backend != BackendKind::Host;
        let work = work(&plan, PricedLayer { shape, format }, &BatchShape::of(segments, &adapters), false, pads);
        Ok(Variant {
            adapter,
            lowering: lowering.name().to_owned(),
            rank,
            tokens: tokens.all(),
            segments: tokens.segments,
            macs: work.macs(),
            bytes: operand_bytes + self.row_bytes(tokens.all()),
            terms: vec![(1.0, timed)],
        })
    }

    /// The base rows of a mixed batch: the base GEMM over them, and whatever the batch takes beyond a base GEMM over as many rows
    /// as it has virtual ones. The same amount of work is on either side of that difference, so that a pass over w0 that both
    /// share isn't counted in anyone's favour; what the adapters' own vectors cost is counted too, against the base rows.
    fn mixed(&mut self, rank: u32, plan: Plan, rows: &Rows, base: &Variant) -> Result<Variant, CommandError> {
        let Rows { segments, adapters } = rows;
        let schedule = schedule(&plan, self.case.shape, segments, adapters, false).map_err(ProjectionError::from)?;
        let mixed = self.timed(schedule)?;
        let whole = self.base_gemm(rows.virtual_rows() as u32)?;
        let mut terms = base.terms.clone();
        terms.extend([(1.0, mixed), (-1.0, whole)]);
        let lowering = plan.to_string();
        Ok(Variant { adapter: MIXED, lowering, rank, segments: segments.len() as u32, terms, ..base.clone() })
    }
}
