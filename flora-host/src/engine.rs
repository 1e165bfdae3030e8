//! A schedule's steps, one after the other, on the processor.

use flora_plan::layer::LayerShape;
use flora_plan::schedule::{
    Gemm, LowRankBmm, LowRankRows, Materialised, Merged, NO_ROW, Packing, Schedule, ScheduledRow, SegmentItem, Step,
    WeightRun,
};
use flora_runtime::RankGates;
use pulp::{Arch, Simd, WithSimd};
use rayon::prelude::*;

use crate::buffer::Buffer;
use crate::call_memory::{CallMemory, Lent};
use crate::check::{check, check_recipe};
use crate::error::HostError;
use crate::expand;
use crate::finish::Finish;
use crate::gemm;
use crate::layout::strips_len;
use crate::materialise::{self, Recipe};
use crate::matrix_unit::MatrixUnit;
use crate::operands::{Layer, Operands};
use crate::pack::Vectors;
use crate::pass::{self, Pass};
use crate::pool::Pool;
use crate::scratch::Scratch;
use crate::shrink::{self, Shrink};
use crate::values::{Replaced, RowSink, Rows, RowsMut, Shared, Sink, Values, ValuesMut};
use crate::weight::{Strips, Weight};

/// The processor, and the memory that it computes in. One engine serves any number of layers and threads; what the largest
/// call needed is kept until the engine is dropped, and calls that need no more allocate nothing.
pub struct HostEngine {
    arch: Arch,
    unit: Option<MatrixUnit>,
    /// Whether rows are rounded to 8 bits for quantised weights.
    rounds: bool,
    pub(crate) calls: Pool<CallMemory>,
    pub(crate) scratches: Pool<Scratch>,
}

impl Default for HostEngine {
    fn default() -> Self {
        Self::new()
    }
}

impl HostEngine {
    /// An engine for the best instruction set that this processor has. It has no memory yet, and takes what it needs.
    pub fn new() -> Self {
        Self { unit: MatrixUnit::get(), ..Self::of(Arch::new()) }
    }

    /// An engine for every instruction set that this processor has, the best first: to compare them. Their roundings differ.
    pub fn all() -> Vec<Self> {
        let best = Self::new();
        let mut engines = Vec::new();
        if best.unit.is_some() {
            engines.push(Self::of(best.arch));
        }
        #[cfg(target_arch = "x86_64")]
        if let (Arch::V4(_), Some(avx2)) = (best.arch, pulp::x86::V3::try_new()) {
            engines.push(Self::of(Arch::V3(avx2)));
        }
        if !matches!(best.arch, Arch::Scalar) {
            engines.push(Self::of(Arch::Scalar));
        }
        engines.insert(0, best);
        engines
    }

    /// The same engine, rounding rows of x to 8 bits where they are multiplied by a quantised base weight: to whole multiples of a
    /// 127th of the largest of each block of inputs, 16 of Q2_K, Q3_K and Q6_K and 32 of all others. Low-rank sums, weights that adapters
    /// make and backward passes stay in floats. Rows whose numbers aren't all finite are NaN where they meet such a weight.
    #[must_use]
    pub fn rounding_activations(self) -> Self {
        Self { rounds: true, ..self }
    }

    fn of(arch: Arch) -> Self {
        Self { arch, unit: None, rounds: false, calls: Pool::default(), scratches: Pool::default() }
    }

    /// What kernels are dispatched on.
    pub(crate) fn arch(&self) -> Arch {
        self.arch
    }

    /// What multiplies pairs, where there is one.
    pub(crate) fn unit(&self) -> Option<MatrixUnit> {
        self.unit
    }

    /// [`HostEngine::vectors`] of the best instruction set that this processor has.
    pub fn instruction_set() -> &'static str {
        Self::new().vectors()
    }

    /// What it computes with: "AVX-512 and AMX", "AVX-512", "AVX2 and FMA", "NEON", or "scalar".
    pub fn vectors(&self) -> &'static str {
        if self.unit.is_some() {
            return "AVX-512 and AMX";
        }
        struct Name;
        impl WithSimd for Name {
            type Output = &'static str;
            fn with_simd<S: Simd>(self, _: S) -> &'static str {
                match (S::IS_SCALAR, S::F32_LANES) {
                    (true, _) | (_, 1) => "scalar",
                    (_, 16) => "AVX-512",
                    (_, 8) => "AVX2 and FMA",
                    _ => "NEON",
                }
            }
        }
        self.arch.dispatch(Name)
    }

    /// Runs a schedule for x `[tokens, d]` and writes y `[tokens, k]`, row-major. Sums are f32 whatever the types are, and y is
    /// rounded once. A row's bits depend on its own x and adapter and on the steps it takes, not on the other rows. `residual`
    /// `[tokens, k]` is needed where the epilogue adds it, and may not be y. Rows that no step writes become 0.
    ///
    /// # Errors
    /// Operands and schedule that don't belong together; y is as it was then.
    pub fn execute(
        &self,
        operands: &Operands<'_>,
        schedule: &Schedule,
        x: Values<'_>,
        y: ValuesMut<'_>,
        residual: Option<Values<'_>>,
    ) -> Result<(), HostError> {
        let LayerShape { d, k } = operands.weight.shape();
        let x = Rows { values: x, pitch: d as usize };
        self.execute_rows(operands, schedule, x, RowsMut { values: y, pitch: k as usize }, residual)
    }

    /// The same of rows that need not follow one another, such as the part of a wider matrix that a layer reads or writes.
    ///
    /// # Errors
    /// As [`execute`](Self::execute); rows that overlap.
    pub fn execute_rows(
        &self,
        operands: &Operands<'_>,
        schedule: &Schedule,
        x: Rows<'_>,
        y: RowsMut<'_>,
        residual: Option<Values<'_>>,
    ) -> Result<(), HostError> {
        self.execute_replaced(operands, schedule, (x, None), y, residual)
    }

    /// The same with other rows in place of some of x's.
    ///
    /// # Errors
    /// As [`execute_rows`](Self::execute_rows); places beyond the rows that there are.
    pub fn execute_replaced(
        &self,
        operands: &Operands<'_>,
        schedule: &Schedule,
        (x, replaced): (Rows<'_>, Option<Replaced<'_>>),
        y: RowsMut<'_>,
        residual: Option<Values<'_>>,
    ) -> Result<(), HostError> {
        self.execute_gated(operands, schedule, (x, replaced), None, y, residual)
    }

    /// The same with low-rank sums multiplied by gates before they are expanded, where there are any. W_i that steps make have none.
    ///
    /// # Errors
    /// As [`execute_replaced`](Self::execute_replaced); gates of fewer rows or ranks than the schedule has.
    pub fn execute_gated(
        &self,
        operands: &Operands<'_>,
        schedule: &Schedule,
        (x, replaced): (Rows<'_>, Option<Replaced<'_>>),
        gates: Option<RankGates<'_>>,
        y: RowsMut<'_>,
        residual: Option<Values<'_>>,
    ) -> Result<(), HostError> {
        check(operands, schedule, (&x, replaced.as_ref(), &y), gates, residual.map(|own| own.len()))?;
        let x = Vectors { values: x.values, width: operands.weight.shape().d as usize, pitch: x.pitch, replaced };
        self.calls.lend(|memory| {
            let call = Call { engine: self, operands, schedule, x, gates, y, residual, memory };
            self.arch.dispatch(call);
        });
        Ok(())
    }
}

impl HostEngine {
    /// W_i `[d, k]` of adapter `position` of `step`, in f32: what a `Merged` step multiplies by.
    ///
    /// # Errors
    /// Operands that don't fit the step; a W_i with a number that isn't finite.
    pub fn materialise(
        &self,
        operands: &Operands<'_>,
        step: &Materialised,
        position: usize,
    ) -> Result<Weight, HostError> {
        check_recipe(operands, step, position)?;
        let (mut made, shape) = (Buffer::default(), operands.weight.shape());
        let out = made.floats(strips_len(shape.d as usize, shape.k as usize));
        self.arch.dispatch(Making { engine: self, operands, step, position, out });
        Weight::of_strips(shape, made).map_err(HostError::NotAWeight)
    }
}

/// One weight to make, of a step that has been checked.
struct Making<'a> {
    engine: &'a HostEngine,
    operands: &'a Operands<'a>,
    step: &'a Materialised,
    position: usize,
    out: &'a mut [f32],
}

impl WithSimd for Making<'_> {
    type Output = ();

    fn with_simd<S: Simd>(self, simd: S) {
        let Layer { weight, in_pool, out_pool, .. } = self.operands.layer();
        let recipe = Recipe::of(self.step, self.position, weight, (in_pool, out_pool));
        materialise::make(simd, recipe, self.out, &self.engine.scratches);
    }
}

/// One execution of a schedule that has been checked.
struct Call<'a> {
    engine: &'a HostEngine,
    operands: &'a Operands<'a>,
    schedule: &'a Schedule,
    x: Vectors<'a>,
    gates: Option<RankGates<'a>>,
    y: RowsMut<'a>,
    residual: Option<Values<'a>>,
    memory: &'a mut CallMemory,
}

/// What the steps of a schedule read.
#[derive(Clone, Copy)]
pub(crate) struct Sources<'a, S> {
    pub(crate) simd: S,
    pub(crate) layer: Layer<'a>,
    pub(crate) x: Vectors<'a>,
    pub(crate) gates: Option<RankGates<'a>>,
    pub(crate) finish: Finish<'a>,
    pub(crate) scratches: &'a Pool<Scratch>,
    /// What multiplies pairs, where there is one.
    pub(crate) unit: Option<MatrixUnit>,
    /// Whether rows are rounded to 8 bits for quantised weights.
    pub(crate) rounds: bool,
}

impl WithSimd for Call<'_> {
    type Output = ();

    fn with_simd<S: Simd>(self, simd: S) {
        let Call { engine, operands, schedule, x, gates, y, residual, memory } = self;
        let epilogue = operands.epilogue;
        let sources = Sources {
            simd,
            layer: operands.layer(),
            x,
            gates,
            finish: Finish {
                bias: operands.bias.filter(|_| epilogue.bias),
                activation: epilogue.activation,
                residual: residual.filter(|_| epilogue.residual),
            },
            scratches: &engine.scratches,
            unit: engine.unit,
            rounds: engine.rounds,
        };
        sources.run(schedule, y, memory);
    }
}

/// Rows that the steps which write write, each of which does so once.
fn written(schedule: &Schedule) -> usize {
    let of = |step: &Step| match step {
        Step::Gemm(Gemm { rows, segments, .. }) => {
            let stacked = rows.iter().filter(|row| row.last == 1).count();
            stacked + segments.iter().map(|segment| segment.rows as usize).sum::<usize>()
        }
        Step::Materialised(Materialised { runs, .. }) | Step::Merged(Merged { runs, .. }) => {
            runs.iter().map(|run| run.rows as usize).sum()
        }
        Step::Segmented { .. } | Step::LowRankBmm(_) | Step::Finish => 0,
    };
    schedule.steps().iter().map(of).sum()
}

/// Whether a step writes its rows whatever was there; the others add to them.
fn writes(step: &Step) -> bool {
    match step {
        Step::Gemm(_) | Step::Materialised(_) | Step::Merged(_) => true,
        Step::Segmented { .. } | Step::LowRankBmm(_) | Step::Finish => false,
    }
}

impl<S: Simd> Sources<'_, S> {
    /// Runs a schedule that has been checked, and writes y `[tokens, k]`.
    pub(crate) fn run(&self, schedule: &Schedule, y: RowsMut<'_>, memory: &mut CallMemory) {
        let (tokens, k) = (schedule.tokens() as usize, self.layer.out_pool.width);
        if tokens == 0 || k == 0 {
            return;
        }
        let CallMemory { stage, lent } = memory;
        if schedule.steps().iter().all(writes) && written(schedule) >= tokens {
            let RowsMut { mut values, pitch } = y;
            let sink = Sink::new(&mut values).rows(pitch);
            return schedule.steps().iter().for_each(|step| self.write(step, sink, lent));
        }
        // Later steps add to y, so that it has to hold f32 until the last of them.
        match y {
            RowsMut { values: ValuesMut::F32(y), pitch } if pitch == k => self.write_and_add(schedule, y, lent),
            RowsMut { mut values, pitch } => {
                let stage = stage.floats(tokens * k);
                self.write_and_add(schedule, stage, lent);
                let sink = Sink::new(&mut values).rows(pitch);
                stage.par_chunks(k).enumerate().for_each(|(row, values)| {
                    // SAFETY: y outlives the loop, and rows don't overlap.
                    unsafe { sink.write(self.simd, row, 0, values) }
                });
            }
        }
    }

    fn write_and_add(&self, schedule: &Schedule, stage: &mut [f32], lent: &mut Lent) {
        let steps = schedule.steps();
        if written(schedule) < schedule.tokens() as usize {
            stage.fill(0.0);
        }
        for step in steps {
            if writes(step) {
                self.write(step, Sink::F32(Shared::new(stage)).rows(self.layer.out_pool.width), lent);
            } else {
                self.add(step, stage, lent);
            }
        }
    }

    /// Runs a step of those that write.
    fn write(&self, step: &Step, sink: RowSink, lent: &mut Lent) {
        let weight = self.layer.weight;
        match step {
            Step::Gemm(gemm) => {
                let hidden = self.shrink(&gemm.low_rank, &mut lent.shrinks, &mut lent.hidden);
                let Gemm { rows, segments, scales, low_rank, .. } = gemm;
                self.pass(
                    weight,
                    pass::Rows { rows, segments, scales, low_rank, sources: &[] },
                    hidden,
                    gemm.finishes,
                    sink,
                );
            }
            Step::Merged(step) => {
                if let Some(merged) = self.layer.merged {
                    self.by_weight(merged, step.runs.iter(), step.finishes, sink, &mut lent.rows);
                }
            }
            Step::Materialised(step) => self.materialised(weight, step, sink, lent),
            Step::Segmented { .. } | Step::LowRankBmm(_) | Step::Finish => {}
        }
    }

    fn pass(&self, weight: Strips<'_>, rows: pass::Rows<'_>, hidden: &[f32], finishes: bool, sink: RowSink) {
        let (x, Layer { in_pool, out_pool, .. }) = (self.x, self.layer);
        let finish = finishes.then_some(self.finish);
        let form = gemm::fastest::<S>(weight, x, self.unit, self.rounds);
        let pass = Pass { form, weight, x, in_pool, out_pool, rows, hidden, finish, sink };
        gemm::run(self.simd, pass, self.scratches);
    }

    /// One weight after the other is made in the same memory.
    fn materialised(&self, weight: Strips<'_>, step: &Materialised, sink: RowSink, lent: &mut Lent) {
        let Layer { in_pool, out_pool, .. } = self.layer;
        let size = strips_len(in_pool.width, out_pool.width);
        for at in 0..step.adapters.len() {
            let recipe = Recipe::of(step, at, weight, (in_pool, out_pool));
            let made = lent.weight.floats(size);
            materialise::make(self.simd, recipe, made, self.scratches);
            let own = step.runs.iter().filter(|run| run.weight as usize == at);
            self.by_weight(Strips::floats(out_pool.width, made), own, step.finishes, sink, &mut lent.rows);
        }
    }

    /// Multiplies runs of rows by a weight of their adapter's own.
    fn by_weight<'r>(
        &self,
        weight: Strips<'_>,
        runs: impl Iterator<Item = &'r WeightRun>,
        finishes: bool,
        sink: RowSink,
        rows: &mut Vec<ScheduledRow>,
    ) {
        rows.clear();
        runs.for_each(|run| plain_rows(run.first_row..run.first_row + run.rows, rows));
        self.pass(weight, pass::Rows::plain(rows), &[], finishes, sink);
    }

    /// Runs a step of those that add to outputs `[tokens, k]`.
    fn add(&self, step: &Step, outputs: &mut [f32], lent: &mut Lent) {
        match step {
            Step::Segmented { items, .. } => {
                lent.runs.clear();
                items.iter().for_each(|item| join(item, &mut lent.runs));
                self.add_low_rank(outputs, lent);
            }
            Step::LowRankBmm(step) => {
                lent.runs.clear();
                batched_runs(step, &mut lent.runs);
                self.add_low_rank(outputs, lent);
            }
            Step::Finish => {
                let k = self.layer.out_pool.width;
                outputs.par_chunks_mut(k).enumerate().for_each(|(row, outputs)| {
                    self.scratches.lend(|scratch| {
                        self.finish.apply(self.simd, (row, 0, k), outputs, scratch.row.floats(k));
                    });
                });
            }
            Step::Gemm(_) | Step::Materialised(_) | Step::Merged(_) => {}
        }
    }

    /// The h of runs of rows, one run after the other.
    fn shrink<'h>(&self, runs: &[LowRankRows], tasks: &mut Vec<Shrink>, hidden: &'h mut Buffer) -> &'h [f32] {
        let hidden = hidden.floats(shrink::tasks(runs, tasks));
        shrink::shrink(self.simd, (self.x, self.gates), self.layer.in_pool, tasks, hidden, self.scratches);
        hidden
    }

    fn add_low_rank(&self, outputs: &mut [f32], lent: &mut Lent) {
        let hidden = self.shrink(&lent.runs, &mut lent.shrinks, &mut lent.hidden);
        let pools = (self.layer.in_pool, self.layer.out_pool);
        expand::expand_all(self.simd, pools, &lent.runs, hidden, outputs, self.scratches);
    }
}

/// Appends rows that are multiplied as they are.
fn plain_rows(range: std::ops::Range<u32>, rows: &mut Vec<ScheduledRow>) {
    rows.extend(range.map(|row| ScheduledRow { row, in_slot: 0, out_slot: 0, last: 1 }));
}

/// Appends an item, to the run before it where it goes on.
fn join(item: &SegmentItem, runs: &mut Vec<LowRankRows>) {
    let SegmentItem { first_row, rows, shrink, expand, rank, .. } = *item;
    let goes_on = |run: &&mut LowRankRows| {
        (run.first_row + run.rows, run.shrink, run.expand, run.rank) == (first_row, shrink, expand, rank)
    };
    match runs.last_mut().filter(goes_on) {
        Some(run) => run.rows += rows,
        None => runs.push(LowRankRows { first_row, rows, shrink, expand, rank }),
    }
}

/// The rows of a padded batched matmul as runs. Padding is not multiplied here: a block is computed at its own size.
fn batched_runs(step: &LowRankBmm, runs: &mut Vec<LowRankRows>) {
    let blocks = |packing: &'_ Packing| packing.block.max(1) as usize;
    let rows = step.rows.index.chunks_exact(blocks(&step.rows));
    let shrinks = step.shrink.index.chunks_exact(blocks(&step.shrink));
    let expands = step.expand.index.chunks_exact(blocks(&step.expand));
    for ((rows, shrink), expand) in rows.zip(shrinks).zip(expands) {
        let rank = shrink.iter().take_while(|slot| **slot != NO_ROW).count() as u32;
        let rows = rows.iter().copied().take_while(|row| *row != NO_ROW);
        if let (Some(shrink), Some(expand)) = (shrink.first().filter(|_| rank > 0), expand.first()) {
            let mut open: Option<LowRankRows> = None;
            for row in rows {
                match &mut open {
                    Some(run) if run.first_row + run.rows == row => run.rows += 1,
                    _ => {
                        let run = LowRankRows { first_row: row, rows: 1, shrink: *shrink, expand: *expand, rank };
                        runs.extend(open.replace(run));
                    }
                }
            }
            runs.extend(open);
        }
    }
}
