//! A linear layer that somebody else's program holds: its base weight, packed, and adapters in numbered slots.
//!
//! The outputs of a layer may be several *parts*, as where one weight makes queries, keys and values: each part is a projection of its
//! own, with adapters of its own in the same slots, and one call computes all of them.

use std::collections::HashMap;
use std::ops::Range;
use std::sync::atomic::{AtomicI64, AtomicU64, Ordering};
use std::sync::{Arc, OnceLock, PoisonError, RwLock, Weak};

use flora_adapters::layers::HeldBase;
use flora_checkpoint::AdapterFolder;
use flora_host::{HostEngine, Rows, RowsMut, Values, ValuesMut, Weight, operands};
use flora_ir::algebra::FoldedAdapter;
use flora_plan::layer::{Element, LayerShape, WeightFormat};
use flora_plan::plan::Plan;
use flora_plan::weight::PackedWeight;
use flora_runtime::{
    Device, PlannedProjection, Planning, Projection, ProjectionError, ProjectionOptions, Scheduled, StepBatch,
};
use half::{bf16, f16};

use crate::error::Error;
use crate::kinds::{self, Shard};
use crate::memory::{NumberType, RowsAt, Tensor};
use crate::step::RowSlots;
use crate::threads;

/// The most slots of a layer.
const MOST_SLOTS: u32 = 1 << 20;

/// A frozen linear layer y = x W0 + bias with adapters. x is `[rows, inputs]`, y `[rows, outputs]`.
#[derive(Debug)]
pub(crate) struct Linear {
    handle: i64,
    inputs: usize,
    outputs: usize,
    activations: Element,
    slots: u32,
    parts: Vec<Part>,
    /// How often its adapters have changed.
    changes: AtomicU64,
}

/// Consecutive outputs of a layer.
#[derive(Debug)]
pub(crate) struct Part {
    pub(crate) projection: PlannedProjection,
    /// `[outputs]`
    pub(crate) bias: Option<Vec<f32>>,
    outputs: Range<usize>,
}

/// What a layer is made of.
pub(crate) struct LinearParts<'a> {
    /// `[outputs, inputs]`, PyTorch's layout.
    pub(crate) weight: &'a Tensor,
    /// `[outputs]`
    pub(crate) bias: Option<&'a Tensor>,
    /// The outputs of each part; they add up to all of them.
    pub(crate) parts: Option<&'a [usize]>,
    /// Numbered slots for adapters.
    pub(crate) slots: u32,
    /// The type of x and y; `None`: the weight's.
    pub(crate) activations: Option<Element>,
}

/// What every layer computes with.
pub(crate) struct Machine {
    device: Device,
    pub(crate) engine: HostEngine,
}

pub(crate) fn machine() -> Result<&'static Machine, Error> {
    static MACHINE: OnceLock<Machine> = OnceLock::new();
    if let Some(machine) = MACHINE.get() {
        return Ok(machine);
    }
    // On the pool, or describing the processor would start one more.
    let made = threads::run(|| Machine { device: flora_host::device(), engine: HostEngine::new() })?;
    Ok(MACHINE.get_or_init(|| made))
}

/// The layers of this process that are open.
static OPEN: RwLock<Option<HashMap<i64, Weak<Linear>>>> = RwLock::new(None);

/// The layer of a handle.
pub(crate) fn open(handle: i64) -> Result<Arc<Linear>, Error> {
    let open = OPEN.read().unwrap_or_else(PoisonError::into_inner);
    let found = open.as_ref().and_then(|open| open.get(&handle)).and_then(Weak::upgrade);
    found.ok_or(Error::Closed(handle))
}

impl Drop for Linear {
    fn drop(&mut self) {
        self.close();
    }
}

impl Linear {
    /// Packs a weight. Nothing of what is passed is kept.
    pub(crate) fn new(made_of: &LinearParts<'_>) -> Result<Arc<Self>, Error> {
        static NEXT: AtomicI64 = AtomicI64::new(1);
        let LinearParts { weight, bias, parts, slots, activations } = *made_of;
        let [outputs, inputs] = weight.shape[..] else {
            return Err(Error::shape(
                "the weight",
                format!("has the shape {:?}; it is [outputs, inputs]", weight.shape),
            ));
        };
        let NumberType::Element(element) = weight.numbers else {
            let (what, found, expected) =
                ("the weight".into(), "float64".into(), "float32, float16 or bfloat16".into());
            return Err(Error::Type { what, found, expected });
        };
        if slots > MOST_SLOTS {
            return Err(Error::NoSuch { what: "slot", number: u64::from(slots) - 1, count: u64::from(MOST_SLOTS) });
        }
        let whole = [outputs];
        let sizes = parts.unwrap_or(&whole);
        if sizes.contains(&0) || sizes.iter().try_fold(0usize, |sum, size| sum.checked_add(*size)) != Some(outputs) {
            return Err(Error::shape("the parts", format!("{sizes:?} don't add up to the layer's {outputs} outputs")));
        }
        let bias = bias.map(|bias| bias.to_f32("the bias")).transpose()?;
        if let Some(bias) = bias.as_ref().filter(|bias| bias.len() != outputs) {
            return Err(Error::shape(
                "the bias",
                format!("has {} numbers; the layer has {outputs} outputs", bias.len()),
            ));
        }
        let activations = activations.unwrap_or(element);
        let mut first = 0;
        let mut made = Vec::with_capacity(sizes.len());
        for size in sizes {
            let own = first..first + size;
            let bias = bias.as_ref().map(|bias| bias[own.clone()].to_vec());
            made.push(Part::new(weight, element, own, bias, activations)?);
            first += size;
        }
        let handle = NEXT.fetch_add(1, Ordering::Relaxed);
        let linear =
            Arc::new(Self { handle, inputs, outputs, activations, slots, parts: made, changes: AtomicU64::new(0) });
        let mut open = OPEN.write().unwrap_or_else(PoisonError::into_inner);
        open.get_or_insert_default().insert(handle, Arc::downgrade(&linear));
        Ok(linear)
    }

    /// Is found by nobody from now on.
    pub(crate) fn close(&self) {
        let mut open = OPEN.write().unwrap_or_else(PoisonError::into_inner);
        if let Some(open) = &mut *open {
            open.remove(&self.handle);
        }
    }

    /// What finds it again.
    pub(crate) fn handle(&self) -> i64 {
        self.handle
    }

    /// Its inputs.
    pub(crate) fn inputs(&self) -> usize {
        self.inputs
    }

    /// Its outputs.
    pub(crate) fn outputs(&self) -> usize {
        self.outputs
    }

    /// The type of x and y.
    pub(crate) fn activations(&self) -> Element {
        self.activations
    }

    /// How many slots it has.
    pub(crate) fn slots(&self) -> u32 {
        self.slots
    }

    /// Outputs of each part.
    pub(crate) fn part_sizes(&self) -> impl Iterator<Item = usize> {
        self.parts.iter().map(|part| part.outputs.len())
    }

    /// How often its adapters have changed, for whoever keeps copies of them.
    #[cfg(feature = "cuda")]
    pub(crate) fn changes(&self) -> u64 {
        self.changes.load(Ordering::Acquire)
    }

    /// Its parts.
    #[cfg(feature = "cuda")]
    pub(crate) fn parts(&self) -> &[Part] {
        &self.parts
    }

    pub(crate) fn part(&self, part: usize) -> Result<&Part, Error> {
        let missing = Error::NoSuch { what: "part", number: part as u64, count: self.parts.len() as u64 };
        self.parts.get(part).ok_or(missing)
    }

    fn position(&self, slot: u32) -> Result<u32, Error> {
        match slot < self.slots {
            true => Ok(slot + 1),
            false => Err(Error::NoSuch { what: "slot", number: u64::from(slot), count: u64::from(self.slots) }),
        }
    }

    /// Puts a module of an adapter into a slot, in place of what was there. Calls that are running aren't disturbed.
    pub(crate) fn put(
        &self,
        (slot, part): (u32, usize),
        adapter: &AdapterFolder,
        path: &str,
        shard: &Shard,
    ) -> Result<(), Error> {
        let (position, part) = (self.position(slot)?, self.part(part)?);
        let (folded, offset) = part.fold(adapter, path, shard)?;
        let placed = part.projection.change(|projection| {
            projection.remove(position);
            place(projection, position, &folded)?;
            match &offset {
                Some(offset) => projection.set_offset(position, offset).inspect_err(|_| projection.remove(position)),
                None => Ok(()),
            }
        });
        self.changes.fetch_add(1, Ordering::Release);
        Ok(placed?)
    }

    /// Empties a slot of one part or of all: its rows are base rows from then on.
    pub(crate) fn clear(&self, slot: u32, part: Option<usize>) -> Result<(), Error> {
        let position = self.position(slot)?;
        let parts = match part {
            Some(part) => std::slice::from_ref(self.part(part)?),
            None => &self.parts[..],
        };
        let cleared = parts.iter().try_for_each(|part| {
            part.projection.change(|projection| {
                projection.remove(position);
                projection.trim()
            })
        });
        self.changes.fetch_add(1, Ordering::Release);
        Ok(cleared?)
    }

    /// Computes y of x, each row by the adapter in its slot.
    pub(crate) fn forward(&self, x: Rows<'_>, slots: RowSlots<'_>, y: RowsMut<'_>) -> Result<(), Error> {
        let batch = slots.batch(self.slots, 1)?;
        self.run(&batch, x, y)
    }

    /// The same for a batch whose positions are in the parts' tables.
    pub(crate) fn run(&self, batch: &StepBatch, x: Rows<'_>, mut y: RowsMut<'_>) -> Result<(), Error> {
        if batch.rows() == 0 {
            return Ok(());
        }
        let scheduled = self.parts.iter().map(|part| match part.projection.scheduled(batch) {
            Ok(scheduled) => Ok(Some(scheduled)),
            Err(ProjectionError::SparseSchedule) => Ok(None),
            Err(error) => Err(error),
        });
        let scheduled = scheduled.collect::<Result<Vec<_>, _>>()?;
        let engine = &machine()?.engine;
        threads::run(|| {
            for (part, scheduled) in self.parts.iter().zip(&scheduled) {
                match scheduled {
                    Some(scheduled) => part.run(engine, scheduled, x, &mut y)?,
                    None => part.run_copied(batch, x, &mut y)?,
                }
            }
            Ok(())
        })?
    }

    /// Writes W0 `[outputs, inputs]`, widened, into rows that are `pitch` numbers apart.
    pub(crate) fn unpack(&self, out: &RowsAt) -> Result<(), Error> {
        if (out.rows, out.width) != (self.outputs, self.inputs) {
            let problem =
                format!("is [{}, {}]; the weight is [{}, {}]", out.rows, out.width, self.outputs, self.inputs);
            return Err(Error::shape("the place for the weight", problem));
        }
        let RowsMut { values: ValuesMut::F32(out), pitch } = out.write("the place for the weight", Element::F32)?
        else {
            return Ok(());
        };
        let mut rows = out.chunks_mut(pitch);
        for part in &self.parts {
            let (weight, k) = (part.weight(), part.outputs.len());
            for (column, row) in rows.by_ref().take(k).enumerate() {
                row[..self.inputs]
                    .iter_mut()
                    .zip(weight[column..].iter().step_by(k))
                    .for_each(|(to, from)| *to = *from);
            }
        }
        Ok(())
    }
}

/// Places an adapter, with room for it.
pub(crate) fn place(projection: &mut Projection, position: u32, folded: &FoldedAdapter) -> Result<(), ProjectionError> {
    let (in_slots, out_slots) = projection.slots_with(folded);
    projection.reserve(in_slots, out_slots)?;
    projection.place(position, folded)
}

impl Part {
    /// The batch in memory of its own: no schedule multiplies rows by the sparse matrices of an adapter, so that x and y are copied for
    /// the kinds that have some.
    fn run_copied(&self, batch: &StepBatch, x: Rows<'_>, y: &mut RowsMut<'_>) -> Result<(), Error> {
        let (d, k) = self.shape();
        let device = self.projection.device();
        let rows: Vec<f32> = (0..batch.rows()).flat_map(|row| read(x.values, row * x.pitch, d)).collect();
        let x = device.upload_as(&rows, self.projection.activations())?;
        let sums = device.read(&self.projection.forward(&x, batch, None)?)?;
        let mut y = y.columns(batch.rows(), self.outputs.clone());
        for (row, own) in sums.chunks_exact(k).enumerate() {
            write(&mut y.values, row * y.pitch, own);
        }
        Ok(())
    }

    fn new(
        weight: &Tensor,
        element: Element,
        outputs: Range<usize>,
        bias: Option<Vec<f32>>,
        activations: Element,
    ) -> Result<Self, Error> {
        let [_, d] = weight.shape[..] else { return Err(Error::shape("the weight", "is no matrix")) };
        let k = outputs.len();
        let extent = |extent: usize| {
            u32::try_from(extent).map_err(|_| Error::shape("the weight", format!("has an extent of {extent}")))
        };
        let shape = LayerShape { d: extent(d)?, k: extent(k)? };
        let turned = weight.rows(&outputs)?.transposed().to_f32("the weight")?;
        let packed = PackedWeight::from_f32(WeightFormat::Float(element), shape, &turned)?;
        let options = ProjectionOptions { bias: bias.as_deref(), activations, ..ProjectionOptions::default() };
        // A row's numbers are then its own, whatever else is in its batch.
        let projection = PlannedProjection::new(&machine()?.device, &packed, options, Planning::Fixed(Plan::fixed()))?;
        Ok(Self { projection, bias, outputs })
    }

    pub(crate) fn shape(&self) -> (usize, usize) {
        let LayerShape { d, k } = self.projection.shape();
        (d as usize, k as usize)
    }

    /// W0 `[inputs, outputs]`.
    pub(crate) fn weight(&self) -> Vec<f32> {
        let base = self.projection.change(|projection| projection.operands().base_weight().clone());
        base.memory::<Weight>().map(Weight::to_f32).unwrap_or_default()
    }

    fn fold(
        &self,
        adapter: &AdapterFolder,
        path: &str,
        shard: &Shard,
    ) -> Result<(FoldedAdapter, Option<Vec<f32>>), Error> {
        let (d, k) = self.shape();
        let base = HeldBase { d, k, weight: &|| self.weight(), bias: self.bias.as_deref() };
        kinds::fold(adapter, path, shard, base)
    }

    /// Runs on the pool's threads; `y` has the rows of the whole layer.
    fn run(&self, engine: &HostEngine, scheduled: &Scheduled, x: Rows<'_>, y: &mut RowsMut<'_>) -> Result<(), Error> {
        let Scheduled { schedule, operands: layer, offsets } = scheduled;
        let mut y = y.columns(schedule.tokens() as usize, self.outputs.clone());
        let pitch = y.pitch;
        engine.execute_rows(&operands(layer)?, schedule, x, RowsMut { values: y.values.reborrow(), pitch }, None)?;
        for (first, rows, offset) in offsets {
            for row in *first..first + rows {
                add(&mut y.values, row * pitch, offset);
            }
        }
        Ok(())
    }
}

/// Writes a row from the number `first` on.
fn write(values: &mut ValuesMut<'_>, first: usize, row: &[f32]) {
    let range = first..first + row.len();
    match values {
        ValuesMut::F32(values) => values[range].copy_from_slice(row),
        ValuesMut::F16(values) => {
            values[range].iter_mut().zip(row).for_each(|(value, own)| *value = f16::from_f32(*own));
        }
        ValuesMut::Bf16(values) => {
            values[range].iter_mut().zip(row).for_each(|(value, own)| *value = bf16::from_f32(*own));
        }
    }
}

/// A row `width` numbers long, from the number `first` on.
fn read(values: Values<'_>, first: usize, width: usize) -> Vec<f32> {
    let range = first..first + width;
    match values {
        Values::F32(values) => values[range].to_vec(),
        Values::F16(values) => values[range].iter().map(|value| value.to_f32()).collect(),
        Values::Bf16(values) => values[range].iter().map(|value| value.to_f32()).collect(),
    }
}

/// Adds `offset` to the numbers from `first` on.
fn add(values: &mut ValuesMut<'_>, first: usize, offset: &[f32]) {
    let range = first..first + offset.len();
    match values {
        ValuesMut::F32(values) => values[range].iter_mut().zip(offset).for_each(|(value, own)| *value += own),
        ValuesMut::F16(values) => {
            values[range].iter_mut().zip(offset).for_each(|(value, own)| *value = f16::from_f32(value.to_f32() + own));
        }
        ValuesMut::Bf16(values) => {
            values[range].iter_mut().zip(offset).for_each(|(value, own)| *value = bf16::from_f32(value.to_f32() + own));
        }
    }
}
