//! Layers on a card of NVIDIA's, on the streams and memory of the program that calls: the same weights and adapters as on the processor,
//! whose launches the driver makes.
#![allow(unsafe_code, reason = "launches read and write where others say that tensors are")]

use std::collections::HashMap;
use std::path::PathBuf;
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};

use flora_codegen::target::export::{LaunchList, Operand, export_with_pools};
use flora_codegen::target::{Emission, Pass};
use flora_driver::{Card, DeviceMemory, Includes, KernelCache, Kernels, Launches, OwnedMemory, Stream};
use flora_host::Values;
use flora_plan::batch::Segment;
use flora_plan::layer::{LayerShape, WeightFormat};
use flora_plan::plan::Plan;
use flora_plan::weight::{PackedWeight, WeightValues};
use flora_runtime::{LayerOperands, ProjectionError, StepBatch};
use half::{bf16, f16};

use crate::error::Error;
use crate::linear::{Linear, Part};
use crate::step::RowSlots;

/// Vectors that a pool has room for at least.
const LEAST_VECTORS: u32 = 256;

/// A layer's weights and adapters on a card.
pub(crate) struct CudaLinear {
    linear: Arc<Linear>,
    kernels: Kernels,
    parts: Vec<CudaPart>,
    pools: Mutex<Pools>,
}

/// What of a part stays.
struct CudaPart {
    weight: OwnedMemory,
    bias: Option<OwnedMemory>,
}

/// The vectors of the adapters.
struct Pools {
    /// The layer's changes that are in them.
    version: u64,
    /// In-vectors and out-vectors of each part.
    parts: Vec<[VectorPool; 2]>,
}

struct VectorPool {
    memory: OwnedMemory,
    /// Vectors that there is room for.
    slots: u32,
}

/// A part as it is at one moment.
struct Snapshot {
    operands: LayerOperands,
    adapters: Vec<flora_plan::batch::AdapterSlots>,
}

fn lock<T>(mutex: &Mutex<T>) -> MutexGuard<'_, T> {
    mutex.lock().unwrap_or_else(PoisonError::into_inner)
}

/// A card's number, and folders with headers.
type CardAndHeaders = (u32, Vec<PathBuf>);

/// The kernels of a card, shared by its layers.
fn kernels(ordinal: u32, includes: Vec<PathBuf>) -> Result<Kernels, Error> {
    static KNOWN: Mutex<Option<HashMap<CardAndHeaders, Kernels>>> = Mutex::new(None);
    let mut known = lock(&KNOWN);
    let known = known.get_or_insert_default();
    if let Some(own) = known.get(&(ordinal, includes.clone())) {
        return Ok(own.clone());
    }
    let of_toolkit = Includes::of_toolkit().0;
    let folders = Includes(includes.iter().cloned().chain(of_toolkit).collect());
    let own = Kernels::new(Card::primary(ordinal)?, KernelCache::open()?, folders);
    known.insert((ordinal, includes), own.clone());
    Ok(own)
}

fn snapshot(part: &Part) -> Snapshot {
    part.projection.change(|projection| Snapshot {
        operands: projection.operands().clone(),
        adapters: projection.adapters().to_vec(),
    })
}

/// Numbers as they lie in memory.
fn bytes(values: Values<'_>) -> Vec<u8> {
    fn of<T: Copy, const N: usize>(values: &[T], bytes: impl Fn(T) -> [u8; N]) -> Vec<u8> {
        values.iter().flat_map(|value| bytes(*value)).collect()
    }
    match values {
        Values::F32(values) => of(values, f32::to_le_bytes),
        Values::F16(values) => of(values, f16::to_le_bytes),
        Values::Bf16(values) => of(values, bf16::to_le_bytes),
    }
}

impl CudaPart {
    fn new(card: &Card, part: &Part) -> Result<Self, Error> {
        let Snapshot { operands, .. } = snapshot(part);
        let LayerShape { d, k } = operands.shape();
        let WeightFormat::Float(element) = operands.format().weight else {
            return Err(Error::shape("the weight", "is quantised, which layers of this package aren't"));
        };
        let packed = PackedWeight::from_f32(WeightFormat::Float(element), LayerShape { d, k }, &part.weight())?;
        let weight = match packed.values() {
            WeightValues::F32(values) => bytes(Values::F32(values)),
            WeightValues::F16(values) => bytes(Values::F16(values)),
            WeightValues::Bf16(values) => bytes(Values::Bf16(values)),
            WeightValues::Words(words) => words.iter().flat_map(|word| word.to_le_bytes()).collect(),
        };
        let bias = part.bias.as_ref().map(|bias| OwnedMemory::with(card, &bytes(Values::F32(bias))));
        Ok(Self { weight: OwnedMemory::with(card, &weight)?, bias: bias.transpose()? })
    }
}

impl VectorPool {
    fn new(card: &Card, slots: u32, width: u32, number: u64) -> Result<Self, Error> {
        let bytes = u64::from(slots) * u64::from(width) * number;
        Ok(Self { memory: OwnedMemory::new(card, bytes)?, slots })
    }
}

impl CudaLinear {
    /// Copies a layer's weights to a card. `includes` are folders with CUDA's headers, before those of a toolkit.
    pub(crate) fn new(linear: Arc<Linear>, ordinal: u32, includes: Vec<PathBuf>) -> Result<Arc<Self>, Error> {
        let kernels = kernels(ordinal, includes)?;
        let card = kernels.card();
        let parts = linear.parts().iter().map(|part| CudaPart::new(card, part)).collect::<Result<_, _>>()?;
        let pools = Mutex::new(Pools { version: u64::MAX, parts: Vec::new() });
        Ok(Arc::new(Self { linear, kernels, parts, pools }))
    }

    /// Outputs of each part.
    pub(crate) fn part_sizes(&self) -> Vec<usize> {
        self.linear.part_sizes().collect()
    }

    /// How many kernels NVRTC has compiled for this process.
    pub(crate) fn compiled(&self) -> usize {
        self.kernels.compiled()
    }

    /// Brings the card's pools up to the layer's, behind what is on the stream. They stay where they are as long as they are long enough.
    fn follow(&self, pools: &mut Pools, stream: Stream) -> Result<Vec<Snapshot>, Error> {
        // Before the vectors are read: what comes between is copied once more.
        let version = self.linear.changes();
        let snapshots: Vec<_> = self.linear.parts().iter().map(snapshot).collect();
        if pools.version == version {
            return Ok(snapshots);
        }
        for (position, Snapshot { operands, .. }) in snapshots.iter().enumerate() {
            let LayerShape { d, k } = operands.shape();
            let number = operands.format().adapters.bytes();
            let needed = [(operands.in_pool().slots(), d), (operands.out_pool().slots(), k)];
            let grown = |slots: u32| slots.max(LEAST_VECTORS).checked_next_power_of_two().unwrap_or(slots);
            let card = self.kernels.card();
            if pools.parts.len() <= position {
                let [own_in, own_out] = needed.map(|(slots, width)| VectorPool::new(card, grown(slots), width, number));
                pools.parts.push([own_in?, own_out?]);
            }
            let host = flora_host::operands(operands)?;
            let own = pools.parts[position].iter_mut().zip(needed).zip([host.in_pool, host.out_pool]);
            for ((pool, (slots, width)), values) in own {
                if pool.slots < slots {
                    *pool = VectorPool::new(card, grown(slots), width, number)?;
                }
                let mut bytes = bytes(values);
                bytes.truncate((u64::from(slots) * u64::from(width) * number) as usize);
                // SAFETY: who calls says that the stream is alive, and launches on others are over.
                unsafe { pool.memory.write_behind(0, &bytes, stream)? };
            }
        }
        pools.version = version;
        Ok(snapshots)
    }

    /// The launches of a batch, part by part.
    fn lists(&self, pools: &Pools, snapshots: &[Snapshot], batch: &StepBatch) -> Result<Vec<LaunchList>, Error> {
        let parts = self.linear.parts().iter().zip(snapshots).zip(&pools.parts);
        let list =
            |((part, Snapshot { operands, adapters }), [in_pool, out_pool]): ((&Part, &Snapshot), &[VectorPool; 2])| {
                let elsewhere = match part.projection.scheduled(batch) {
                    Ok(scheduled) => !scheduled.offsets.is_empty(),
                    Err(ProjectionError::SparseSchedule) => true,
                    Err(error) => return Err(error.into()),
                };
                if elsewhere {
                    let kinds =
                        "adapters with sparse matrices or biases of their own are computed on the processor alone";
                    return Err(Error::Cuda(format!("{kinds}; move x there, or clear their slots")));
                }
                let known = |position: u32| if (position as usize) < adapters.len() { position } else { 0 };
                let segments = batch.segments().iter();
                let segments: Vec<_> = segments
                    .map(|own| Segment { adapter: known(own.adapter), ..*own })
                    .filter(|own| own.rows > 0)
                    .collect();
                let emission = Emission {
                    pass: Pass::Forward,
                    shape: operands.shape(),
                    format: operands.format(),
                    epilogue: operands.epilogue(),
                    plan: Plan::fixed(),
                    segments: &segments,
                    adapters,
                };
                let slots = (in_pool.slots, out_pool.slots);
                Ok(export_with_pools(self.kernels.card().capability(), &emission, slots)?)
            };
        parts.map(list).collect()
    }
}

/// A batch's launches, one list a part, whose tables lie at addresses that stay.
pub(crate) struct CudaBatch {
    linear: Arc<CudaLinear>,
    made: Mutex<Made>,
}

struct Made {
    batch: Arc<StepBatch>,
    /// The layer's changes that the tables know of.
    version: u64,
    launches: Vec<Launches>,
}

impl CudaBatch {
    /// Makes the launches of a batch, behind what is on the stream; not while it is captured.
    pub(crate) fn new(linear: &Arc<CudaLinear>, slots: RowSlots<'_>, stream: Stream) -> Result<Self, Error> {
        let batch = slots.batch(linear.linear.slots(), 1)?;
        if batch.rows() == 0 {
            return Err(Error::shape("the batch", "has no rows, which need no launches"));
        }
        let mut pools = lock(&linear.pools);
        let snapshots = linear.follow(&mut pools, stream)?;
        let lists = linear.lists(&pools, &snapshots, &batch)?;
        let launches = lists.into_iter().map(|list| Launches::new(&linear.kernels, list));
        let launches = launches.collect::<Result<_, _>>()?;
        let made = Made { batch, version: pools.version, launches };
        Ok(Self { linear: linear.clone(), made: Mutex::new(made) })
    }

    /// Makes this the batch of other rows, or of the adapters that its slots have now: whether anything was written. Graphs that have
    /// captured it run that from then on. Nothing changes where the launches are others.
    pub(crate) fn assign(&self, slots: Option<RowSlots<'_>>, stream: Stream) -> Result<bool, Error> {
        let linear = &self.linear;
        let mut made = lock(&self.made);
        let batch = match slots {
            Some(slots) => slots.batch(linear.linear.slots(), 1)?,
            None => made.batch.clone(),
        };
        let mut pools = lock(&linear.pools);
        let snapshots = linear.follow(&mut pools, stream)?;
        let lists = linear.lists(&pools, &snapshots, &batch)?;
        made.launches.iter().zip(&lists).try_for_each(|(launches, list)| launches.runs(list))?;
        let mut written = made.version != pools.version;
        for (launches, list) in made.launches.iter_mut().zip(lists) {
            // SAFETY: as in `follow`.
            written |= unsafe { launches.retable(list, stream)? };
        }
        (made.batch, made.version) = (batch, pools.version);
        Ok(written)
    }

    /// Queues y of x: x `[rows, inputs]`, one y `[rows, outputs]` for each part, without gaps.
    ///
    /// # Safety
    /// The stream is alive, and the memory is what it is said to be, until the launches are over.
    pub(crate) unsafe fn forward(&self, x: DeviceMemory, y: &[DeviceMemory], stream: Stream) -> Result<(), Error> {
        let stale = lock(&self.made).version != self.linear.linear.changes();
        if stale {
            self.assign(None, stream)?;
        }
        let (made, pools) = (lock(&self.made), lock(&self.linear.pools));
        if y.len() != made.launches.len() {
            let problem = format!("are {} tensors; the layer has {} parts", y.len(), made.launches.len());
            return Err(Error::shape("the outputs", problem));
        }
        let parts = made.launches.iter().zip(&self.linear.parts).zip(&pools.parts).zip(y);
        let bound = parts.map(|(((launches, part), [in_pool, out_pool]), y)| {
            let mut operands = vec![
                (Operand::X, x),
                (Operand::Y, *y),
                (Operand::BaseWeight, part.weight.memory()),
                (Operand::InPool, in_pool.memory.memory()),
                (Operand::OutPool, out_pool.memory.memory()),
            ];
            operands.extend(part.bias.as_ref().map(|bias| (Operand::Bias, bias.memory())));
            launches.bind(&operands)
        });
        // All of them, before any is launched.
        for bound in bound.collect::<Result<Vec<_>, _>>()? {
            // SAFETY: weights and pools are ours and held by the layer; the rest is the caller's.
            unsafe { bound.launch(stream)? };
        }
        Ok(())
    }
}
