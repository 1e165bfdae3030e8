//! The operands of one layer on a device, and whether a schedule belongs to them. Everything that a kernel trusts is checked here,
//! once for all backends.

use flora_plan::layer::{Element, Epilogue, LayerFormat, LayerShape, WeightFormat};
use flora_plan::schedule::{BackwardSchedule, Materialised, Schedule, ScheduleError, Step, WeightRun};

use crate::backend::RankGates;
use crate::buffer::{Buffer, PoolBuffer, WeightBuffer};

/// The operands of one layer on a device. The types and extents of its parts are those of its format and shape.
#[derive(Clone, Debug)]
pub struct LayerOperands {
    format: LayerFormat,
    base_weight: WeightBuffer,
    bias: Option<Buffer>,
    pub(crate) in_pool: PoolBuffer,
    pub(crate) out_pool: PoolBuffer,
    epilogue: Epilogue,
    merged: Option<Merged>,
}

/// The W_i of one adapter.
#[derive(Clone, Debug)]
struct Merged {
    /// The adapter's position in the layer's table.
    adapter: u32,
    weight: WeightBuffer,
}

/// Operands that make no layer, or a schedule that isn't one of theirs.
#[derive(Clone, Debug, PartialEq, Eq, thiserror::Error)]
#[non_exhaustive]
pub enum OperandError {
    /// A buffer of another device.
    #[error("a buffer of the device `{owner}` was passed to `{device}`; upload it there")]
    ForeignBuffer {
        /// Whose it is.
        owner: String,
        /// Who got it.
        device: String,
    },
    /// A buffer of another size than the layer and the batch ask for.
    #[error("{what} has {found} numbers where the layer and the batch want {expected}")]
    WrongSize {
        /// Which one.
        what: &'static str,
        /// What it should have.
        expected: usize,
        /// What it has.
        found: usize,
    },
    /// A buffer of another type than the layer's.
    #[error("{what} is {found} where the layer wants {expected}")]
    WrongElement {
        /// Which one.
        what: &'static str,
        /// What it should be.
        expected: Element,
        /// What it is.
        found: Element,
    },
    /// A weight in another format than the layer says.
    #[error("{what} is kept in {found} and the layer says {expected}")]
    WrongFormat {
        /// Which weight.
        what: &'static str,
        /// What the layer says.
        expected: WeightFormat,
        /// What the weight is.
        found: WeightFormat,
    },
    /// Heads that make no attention.
    #[error(
        "attention has {queries} query heads of {size} numbers over {keys} key-value heads; the first has to be a multiple of the last"
    )]
    Heads {
        /// Query heads.
        queries: usize,
        /// Key-value heads.
        keys: usize,
        /// Numbers of a head.
        size: usize,
    },
    /// A window that hides even a token itself.
    #[error("a window of 0 tokens, in which a token doesn't see itself; leave it out, or give at least 1")]
    EmptyWindow,
    /// A cache of another layer or model.
    #[error("keys and values are to be appended to the cache of another layer; take one of its own pool")]
    ForeignCache,
    /// The schedule names vectors that the pools lack.
    #[error("the batch's adapters lie in {needed} slots of the {pool} pool, which has {slots}; load them again")]
    Slots {
        /// "in" or "out".
        pool: &'static str,
        /// Slots that the schedule names.
        needed: u32,
        /// Slots that there are.
        slots: u32,
    },
    /// A schedule that is too large for a layer of this shape.
    #[error(transparent)]
    Schedule(#[from] ScheduleError),
    /// More adapters than kernels can index.
    #[error("the {pool} pool has {elements} elements and kernels index 2^31; load fewer adapters")]
    PoolTooLarge {
        /// "in" or "out".
        pool: &'static str,
        /// Its size.
        elements: u64,
    },
    /// A schedule of a weight that isn't resident any more, or of another adapter's.
    #[error("the batch is planned for the merged weight of adapter {wanted}, and {}; merge the adapter first", held(*.found))]
    NotMerged {
        /// What the batch wants: a position in the layer's table, 0 for the base.
        wanted: u32,
        /// What is resident.
        found: Option<u32>,
    },
    /// A plan that makes a weight of an adapter's low-rank part, between whose factors there is nothing to multiply then.
    #[error(
        "the batch has gates and is planned for a weight that an adapter's low-rank part is in; plan it with a low-rank sum (fused, segmented, bmm)"
    )]
    GatesInWeight,
    /// An epilogue that adds a residual, and none was passed.
    #[error("the layer adds a residual and none was passed; pass one of [tokens, k]")]
    NoResidual,
}

fn held(found: Option<u32>) -> String {
    found.map_or_else(|| "none is resident".to_owned(), |adapter| format!("that of adapter {adapter} is resident"))
}

impl LayerOperands {
    /// The operands of a layer: base weight `[d, k]`, bias `[k]` in f32, pools `[slots, d]` and `[slots, k]` in the type of the
    /// format's adapters. The format's weight is that of the base weight.
    ///
    /// # Errors
    /// Parts of different devices, of other sizes than the base weight's shape asks for, or of other types.
    pub fn new(
        format: LayerFormat,
        base_weight: WeightBuffer,
        bias: Option<Buffer>,
        (in_pool, out_pool): (PoolBuffer, PoolBuffer),
        epilogue: Epilogue,
    ) -> Result<Self, OperandError> {
        let layer = Self { format, base_weight, bias, in_pool, out_pool, epilogue, merged: None };
        layer.check()?;
        Ok(layer)
    }

    /// Inputs and outputs.
    pub fn shape(&self) -> LayerShape {
        self.base_weight.shape
    }

    /// Types.
    pub fn format(&self) -> LayerFormat {
        self.format
    }

    /// `[d, k]`
    pub fn base_weight(&self) -> &WeightBuffer {
        &self.base_weight
    }

    /// `[k]`, f32
    pub fn bias(&self) -> Option<&Buffer> {
        self.bias.as_ref()
    }

    /// In-scales and shrink vectors: `[slots, d]`.
    pub fn in_pool(&self) -> &PoolBuffer {
        &self.in_pool
    }

    /// Out-scales and expand vectors: `[slots, k]`.
    pub fn out_pool(&self) -> &PoolBuffer {
        &self.out_pool
    }

    /// Bias, activation, residual.
    pub fn epilogue(&self) -> Epilogue {
        self.epilogue
    }

    /// The same layer whose launches write bare sums.
    pub(crate) fn without_epilogue(&self) -> Self {
        Self { bias: None, epilogue: Epilogue::default(), ..self.clone() }
    }

    /// The position of the adapter whose W_i is resident.
    pub fn merged_adapter(&self) -> Option<u32> {
        self.merged.as_ref().map(|merged| merged.adapter)
    }

    /// The resident W_i `[d, k]`.
    pub fn merged_weight(&self) -> Option<&WeightBuffer> {
        self.merged.as_ref().map(|merged| &merged.weight)
    }

    /// Keeps W_i of the adapter at a position of the table, in place of the one before.
    pub(crate) fn set_merged(&mut self, adapter: u32, weight: WeightBuffer) {
        self.merged = Some(Merged { adapter, weight });
    }

    /// Gives up the resident W_i, and says whose it was.
    pub(crate) fn forget_merged(&mut self) -> Option<u32> {
        self.merged.take().map(|merged| merged.adapter)
    }

    /// Whether the parts are one device's and as large as the shape says. Pools grow and weights are merged after the layer was made,
    /// so that this is asked again for every batch.
    pub(crate) fn check(&self) -> Result<(), OperandError> {
        let LayerShape { d, k } = self.shape();
        let (d, k) = (d as usize, k as usize);
        if self.base_weight.format != self.format.weight {
            let (expected, found) = (self.format.weight, self.base_weight.format);
            return Err(OperandError::WrongFormat { what: "the base weight", expected, found });
        }
        let adapters = self.format.adapters;
        self.check_pool("the in-vectors", &self.in_pool, d, adapters)?;
        self.check_pool("the out-vectors", &self.out_pool, k, adapters)?;
        match &self.bias {
            Some(bias) => self.check_buffer("the bias", bias, k, Element::F32),
            None if self.epilogue.bias => Err(OperandError::WrongSize { what: "the bias", expected: k, found: 0 }),
            None => Ok(()),
        }
    }

    fn check_pool(
        &self,
        what: &'static str,
        pool: &PoolBuffer,
        width: usize,
        element: Element,
    ) -> Result<(), OperandError> {
        self.check_buffer(what, &pool.buffer, pool.slots as usize * width, element)
    }

    /// Whether a buffer is the layer's device's, and has so many numbers of a type.
    pub(crate) fn check_buffer(
        &self,
        what: &'static str,
        buffer: &Buffer,
        expected: usize,
        element: Element,
    ) -> Result<(), OperandError> {
        let (owner, device) = (&buffer.owner, &self.base_weight.owner);
        if !std::sync::Arc::ptr_eq(owner, device) {
            return Err(OperandError::ForeignBuffer { owner: owner.id.clone(), device: device.id.clone() });
        }
        if buffer.elements != expected {
            return Err(OperandError::WrongSize { what, expected, found: buffer.elements });
        }
        if buffer.element != element {
            return Err(OperandError::WrongElement { what, expected: element, found: buffer.element });
        }
        Ok(())
    }

    /// Whether this layer can run a schedule: kernels can index it in this shape, its slots are in the pools, and the W_i that it
    /// asks for is resident.
    pub(crate) fn check_schedule(&self, schedule: &Schedule) -> Result<(), OperandError> {
        let (shape, slots) = (self.shape(), (self.in_pool.slots, self.out_pool.slots));
        check_slots(schedule, shape, slots)?;
        match schedule.merged_adapter() {
            Some(wanted) if self.merged_adapter() != Some(wanted) => {
                Err(OperandError::NotMerged { wanted, found: self.merged_adapter() })
            }
            Some(_) | None => Ok(()),
        }
    }

    /// Whether this layer can run a backward pass, likewise.
    pub(crate) fn check_backward(&self, schedule: &BackwardSchedule) -> Result<(), OperandError> {
        check_backward_slots(schedule, self.shape(), (self.in_pool.slots, self.out_pool.slots))?;
        match schedule.input().merged_adapter() {
            Some(wanted) if self.merged_adapter() != Some(wanted) => {
                Err(OperandError::NotMerged { wanted, found: self.merged_adapter() })
            }
            Some(_) | None => Ok(()),
        }
    }
}

/// Whether a layer of this shape whose pools have so many in-slots and out-slots can run a schedule.
///
/// # Errors
/// A schedule that is too large for the shape or of slots that the pools lack; pools that kernels can't index.
pub fn check_slots(schedule: &Schedule, shape: LayerShape, slots: (u32, u32)) -> Result<(), OperandError> {
    schedule.fits(shape)?;
    check_pools(shape, (schedule.in_slots(), schedule.out_slots()), slots)
}

/// The same of a backward pass.
///
/// # Errors
/// As [`check_slots`].
pub fn check_backward_slots(
    schedule: &BackwardSchedule,
    shape: LayerShape,
    slots: (u32, u32),
) -> Result<(), OperandError> {
    schedule.fits(shape)?;
    check_pools(shape, (schedule.in_slots(), schedule.out_slots()), slots)
}

/// Whether pools of so many in-slots and out-slots have those that are needed, and kernels can index them.
fn check_pools(
    shape: LayerShape,
    (needed_in, needed_out): (u32, u32),
    (in_slots, out_slots): (u32, u32),
) -> Result<(), OperandError> {
    let pools = [("in", needed_in, in_slots, shape.d), ("out", needed_out, out_slots, shape.k)];
    for (pool, needed, slots, width) in pools {
        if needed > slots {
            return Err(OperandError::Slots { pool, needed, slots });
        }
        let elements = u64::from(slots) * u64::from(width);
        if elements > i32::MAX as u64 {
            return Err(OperandError::PoolTooLarge { pool, elements });
        }
    }
    Ok(())
}

impl RankGates<'_> {
    /// Whether they change nothing of a run that is multiplied by a weight with a low-rank part of this rank in it.
    fn are_ones(&self, run: &WeightRun, rank: usize) -> bool {
        let rows = self.values.chunks_exact(self.width.max(1)).skip(run.first_row as usize).take(run.rows as usize);
        rank == 0 || rank <= self.width && rows.flat_map(|row| &row[..rank]).all(|gate| *gate == 1.0)
    }
}

/// The rank of the low-rank part of the weight that a run is multiplied by.
fn rank_of(step: &Materialised, run: &WeightRun) -> usize {
    step.adapters.get(run.weight as usize).map_or(0, |adapter| adapter.rank as usize)
}

/// Whether gates can be applied in a schedule, and are as many as it asks for.
pub(crate) fn check_gates(schedule: &Schedule, gates: RankGates<'_>) -> Result<(), OperandError> {
    let (expected, found) = ((schedule.tokens() as usize).saturating_mul(gates.width), gates.values.len());
    if found != expected {
        return Err(OperandError::WrongSize { what: "the gates", expected, found });
    }
    let rank = |step: &Step| match step {
        Step::Gemm(gemm) => Ok(gemm.low_rank.iter().map(|run| run.rank).max().unwrap_or(0)),
        Step::Segmented { items, .. } => Ok(items.iter().map(|item| item.rank).max().unwrap_or(0)),
        Step::LowRankBmm(step) => Ok(step.shrink.block),
        // Ones leave a weight as it is.
        Step::Materialised(step) if step.runs.iter().all(|run| gates.are_ones(run, rank_of(step, run))) => Ok(0),
        // Of an adapter that nothing is made of here all gates have to be ones.
        Step::Merged(step) if step.runs.iter().all(|run| gates.are_ones(run, gates.width)) => Ok(0),
        Step::Materialised(_) | Step::Merged(_) => Err(OperandError::GatesInWeight),
        Step::Finish => Ok(0),
    };
    for step in schedule.steps() {
        let expected = rank(step)? as usize;
        if expected > gates.width {
            return Err(OperandError::WrongSize { what: "a row of the gates", expected, found: gates.width });
        }
    }
    Ok(())
}

/// Whether pools of so many in-slots and out-slots have those that `step` names.
///
/// # Errors
/// They don't.
pub fn check_recipe(step: &Materialised, (in_slots, out_slots): (u32, u32)) -> Result<(), OperandError> {
    let ranks = || step.adapters.iter().filter(|adapter| adapter.rank > 0);
    let scales = || step.scales.iter();
    let end = |first: u32, rank: u32| first.saturating_add(rank);
    let needed_in = scales().map(|scale| scale.in_slot).chain(ranks().map(|rank| end(rank.shrink, rank.rank)));
    let needed_out = scales().map(|scale| scale.out_slot).chain(ranks().map(|rank| end(rank.expand, rank.rank)));
    let needed = [("in", needed_in.max().unwrap_or(0), in_slots), ("out", needed_out.max().unwrap_or(0), out_slots)];
    for (pool, needed, slots) in needed {
        if needed > slots {
            return Err(OperandError::Slots { pool, needed, slots });
        }
    }
    Ok(())
}
