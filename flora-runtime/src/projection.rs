//! One base weight on a device with the adapters that were loaded for it: the place where a batch of mixed adapters becomes
//! launches.

mod error;

use std::collections::HashMap;
use std::ops::Range;
use std::sync::Arc;

use flora_ir::Activation;
use flora_ir::algebra::{FoldedAdapter, SparseParts};
use flora_plan::batch::{AdapterSlots, BatchShape, LowRankSlots, Segment, VirtualRowSlots};
use flora_plan::cost::{LayerPrices, PricedLayer};
use flora_plan::layer::{Element, Epilogue, LayerFormat, LayerShape, WeightFormat};
use flora_plan::pipeline::CompiledLayer;
use flora_plan::plan::{Plan, plan};
use flora_plan::schedule::{Schedule, schedule};
use flora_plan::weight::PackedWeight;

use crate::batch::{Batch, BatchError};
use crate::buffer::Buffer;
use crate::device::{Device, DeviceError};
use crate::gates::GatedRanks;
use crate::operands::LayerOperands;
use crate::passes::{Passes, RowPasses, Work};
use crate::pool::Pool;
use crate::step::StepBatch;
pub use error::ProjectionError;

/// A frozen weight with its adapters, on a device.
#[derive(Debug)]
pub struct Projection {
    pub(crate) device: Device,
    pub(crate) operands: LayerOperands,
    /// The base at 0, and in the places that no adapter has.
    pub(crate) adapters: Vec<AdapterSlots>,
    /// What the adapters hold of the pools.
    places: Vec<Option<Places>>,
    pub(crate) names: HashMap<String, u32>,
    /// By position, what an adapter does beside launches.
    passes: HashMap<u32, Arc<Passes>>,
    /// By position, of adapters whose parts are weighed for each row.
    pub(crate) gated: HashMap<u32, GatedRanks>,
    in_pool: Pool,
    out_pool: Pool,
}

/// The vectors of one adapter.
#[derive(Clone, Debug)]
struct Places {
    in_slots: Range<u32>,
    out_slots: Range<u32>,
    /// Whether it has no virtual row of its own, but one that is scaled by zeros.
    is_additive_alone: bool,
}

/// What a projection has beside its weight.
#[derive(Clone, Copy, Debug)]
pub struct ProjectionOptions<'a> {
    /// `[k]`
    pub bias: Option<&'a [f32]>,
    /// What follows the sum.
    pub activation: Activation,
    /// Whether a batch brings a residual, added last.
    pub residual: bool,
    /// The type of x, y and the residual.
    pub activations: Element,
    /// The type that adapters are kept in.
    pub adapters: Element,
    /// Whether half types go through the device's fragments where it has them.
    pub fragments: bool,
}

impl Default for ProjectionOptions<'_> {
    fn default() -> Self {
        Self {
            bias: None,
            activation: Activation::Identity,
            residual: false,
            activations: Element::F32,
            adapters: Element::F32,
            fragments: true,
        }
    }
}

impl Projection {
    /// Puts a base weight `[d, k]`, row-major, on a device, with its bias `[k]` and the activation that follows.
    ///
    /// # Errors
    /// A tensor whose size isn't the shape's.
    pub fn new(
        device: &Device,
        shape: LayerShape,
        base_weight: &[f32],
        bias: Option<&[f32]>,
        activation: Activation,
    ) -> Result<Self, ProjectionError> {
        let weight = packed(WeightFormat::default(), shape, base_weight)?;
        Self::from_packed(device, &weight, ProjectionOptions { bias, activation, ..ProjectionOptions::default() })
    }

    /// Puts a base weight `[d, k]`, row-major, on a device for adapters of `layer`: in the types that its equation names, with the
    /// activation and the residual that it has, and the bias `[k]`.
    ///
    /// # Errors
    /// A tensor whose size isn't the shape's, a bias that the equation has and isn't there, a type that the device doesn't have.
    pub fn of_layer(
        device: &Device,
        layer: &CompiledLayer,
        shape: LayerShape,
        base_weight: &[f32],
        bias: Option<&[f32]>,
    ) -> Result<Self, ProjectionError> {
        let LayerFormat { activations, adapters, weight, fragments } = layer.format();
        let epilogue = layer.epilogue();
        let bias = bias.or(epilogue.bias.then_some(&[]));
        let options = ProjectionOptions {
            bias,
            activation: epilogue.activation,
            residual: epilogue.residual,
            activations,
            adapters,
            fragments,
        };
        Self::from_packed(device, &packed(weight, shape, base_weight)?, options)
    }

    /// Puts a base weight on a device in the form that it has.
    ///
    /// # Errors
    /// A bias whose size isn't the shape's, a type that the device doesn't have, a weight that it can't hold.
    pub fn from_packed(
        device: &Device,
        weight: &PackedWeight,
        options: ProjectionOptions,
    ) -> Result<Self, ProjectionError> {
        let ProjectionOptions { bias, activation, residual, activations, adapters, fragments } = options;
        let shape = weight.shape();
        let LayerShape { d, k } = shape;
        if let Some(bias) = bias.filter(|bias| bias.len() != k as usize) {
            let (what, expected) = ("the bias".to_owned(), k as usize);
            return Err(ProjectionError::WrongSize { what, d, k, expected, found: bias.len() });
        }
        let (in_pool, in_buffer) = Pool::new(device, d, adapters)?;
        let (out_pool, out_buffer) = Pool::new(device, k, adapters)?;
        let format = LayerFormat { activations, adapters, weight: weight.format(), fragments };
        let base_weight = device.upload_weight(weight)?;
        let bias_buffer = bias.map(|bias| device.upload(bias)).transpose()?;
        let epilogue = Epilogue { bias: bias.is_some(), activation, residual };
        let operands = LayerOperands::new(format, base_weight, bias_buffer, (in_buffer, out_buffer), epilogue)?;
        Ok(Self {
            device: device.clone(),
            operands,
            adapters: vec![AdapterSlots::base()],
            places: vec![None],
            names: HashMap::new(),
            passes: HashMap::new(),
            gated: HashMap::new(),
            in_pool,
            out_pool,
        })
    }

    /// Loads adapters under names, folded for this weight, and makes the pools larger for them. An adapter that leaves this
    /// projection alone is loaded as `None`: its rows are base rows here. Nothing changes when one of them can't be loaded.
    ///
    /// # Errors
    /// A vector of the wrong length, a name that is taken.
    pub fn load<'a>(
        &mut self,
        adapters: impl IntoIterator<Item = (&'a str, Option<&'a FoldedAdapter>)>,
    ) -> Result<(), ProjectionError> {
        let mut vectors = Vec::new();
        for (name, adapter) in adapters {
            let is_new = vectors.iter().all(|(other, _)| *other != name);
            if self.names.contains_key(name) || !is_new {
                return Err(ProjectionError::DuplicateAdapter(name.to_owned()));
            }
            let wrong = |error| match error {
                ProjectionError::WrongSize { what, d, k, expected, found } => {
                    let what = format!("{what} of adapter `{name}`");
                    ProjectionError::WrongSize { what, d, k, expected, found }
                }
                other => other,
            };
            vectors.push((name, adapter.map(|adapter| self.vectors(adapter)).transpose().map_err(wrong)?));
        }
        let needed = |count: fn(&AdapterVectors) -> u32| {
            vectors.iter().filter_map(|(_, adapter)| adapter.as_ref()).map(count).sum::<u32>()
        };
        let (in_slots, out_slots) = (needed(AdapterVectors::in_count), needed(AdapterVectors::out_count));
        self.reserve(self.in_pool.used() + in_slots, self.out_pool.used() + out_slots)?;
        for (name, adapter) in vectors {
            let position = match adapter {
                Some(adapter) => {
                    let position = self.places.len() as u32;
                    match self.put(position, &adapter) {
                        // What is free lies in pieces: more at the end doesn't.
                        Err(ProjectionError::PoolFull { in_vectors, out_vectors }) => {
                            let (in_slots, out_slots) = self.slots();
                            self.reserve(in_slots + in_vectors, out_slots + out_vectors)?;
                            self.put(position, &adapter)?;
                        }
                        other => other?,
                    }
                    position
                }
                None => 0,
            };
            self.names.insert(name.to_owned(), position);
        }
        Ok(())
    }

    /// Makes room for so many vectors in all, in-vectors `[d]` and out-vectors `[k]`: what [`Self::place`] fills.
    ///
    /// # Errors
    /// More than the device takes in one buffer.
    pub fn reserve(&mut self, in_slots: u32, out_slots: u32) -> Result<(), ProjectionError> {
        self.in_pool.grow(&self.device, &mut self.operands.in_pool, in_slots)?;
        Ok(self.out_pool.grow(&self.device, &mut self.operands.out_pool, out_slots)?)
    }

    /// Gives back the room behind the last vectors of the pools. What is there keeps its place.
    ///
    /// # Errors
    /// The device can't copy them; nothing has changed then.
    pub fn trim(&mut self) -> Result<(), ProjectionError> {
        self.in_pool.trim(&self.device, &mut self.operands.in_pool)?;
        Ok(self.out_pool.trim(&self.device, &mut self.operands.out_pool)?)
    }

    /// Vectors that there has to be room for in all (see [`Self::reserve`]) before [`Self::place`] finds any for an adapter: as many
    /// as there is room for now where it would. `u32::MAX` where no kernel could index them.
    pub fn slots_with(&mut self, adapter: &FoldedAdapter) -> (u32, u32) {
        let (in_count, out_count) = vector_counts(adapter);
        (self.in_pool.slots_with(in_count), self.out_pool.slots_with(out_count))
    }

    /// Vectors that there is room for in all: in-vectors and out-vectors.
    pub fn slots(&self) -> (u32, u32) {
        (self.operands.in_pool().slots(), self.operands.out_pool().slots())
    }

    /// Puts an adapter at a position of the table, for segments that name positions; batches that are queued already aren't
    /// disturbed. Only the adapter's own vectors are written.
    ///
    /// # Errors
    /// A position that is taken, a vector of the wrong length, and [`ProjectionError::PoolFull`], where nothing has changed.
    pub fn place(&mut self, position: u32, adapter: &FoldedAdapter) -> Result<(), ProjectionError> {
        let vectors = self.vectors(adapter)?;
        self.put(position, &vectors)
    }

    /// Adds `offset` `[k]` to the outputs of the rows of the adapter at a position, as a bias of its own would, until the position is
    /// removed. An adapter may have an offset and nothing else. [`forward`](Self::forward) and
    /// [`PlannedProjection`](crate::PlannedProjection) add it.
    ///
    /// # Errors
    /// Another length than k, or a layer with an activation, which a bias comes before.
    pub fn set_offset(&mut self, position: u32, offset: &[f32]) -> Result<(), ProjectionError> {
        let LayerShape { d, k } = self.operands.shape();
        if offset.len() != k as usize {
            let (what, expected, found) = ("the bias of an adapter".to_owned(), k as usize, offset.len());
            return Err(ProjectionError::WrongSize { what, d, k, expected, found });
        }
        if self.operands.epilogue().activation != Activation::Identity {
            return Err(ProjectionError::OffsetBeforeActivation);
        }
        self.passes_mut(position).offset = Some(offset.to_vec());
        Ok(())
    }

    /// What the adapters of segments do to their rows beside launches, where they do something.
    pub(crate) fn passes_of(&self, segments: &[Segment]) -> Vec<RowPasses> {
        if self.passes.is_empty() {
            return Vec::new();
        }
        let mut first = 0;
        let mut found = Vec::new();
        for segment in segments.iter().filter(|segment| segment.rows > 0) {
            let rows = first..first + segment.rows as usize;
            first = rows.end;
            if let Some(own) = self.passes.get(&segment.adapter) {
                found.push(RowPasses { rows, own: own.clone() });
            }
        }
        found
    }

    fn passes_mut(&mut self, position: u32) -> &mut Passes {
        Arc::make_mut(self.passes.entry(position).or_default())
    }

    /// Bytes that sparse matrices take in host memory.
    pub fn sparse_bytes(&self) -> u64 {
        self.passes.values().map(|passes| passes.sparse.bytes() as u64).sum()
    }

    /// Frees a position of the table and its place in the pools: its rows are base rows from now on, and a name that it had is no
    /// adapter's any more. Nothing where it is free.
    pub fn remove(&mut self, position: u32) {
        self.passes.remove(&position);
        self.gated.remove(&position);
        let Some(places) = self.places.get_mut(position as usize).and_then(Option::take) else { return };
        self.unmerge_at(position);
        self.in_pool.give_back(places.in_slots);
        self.out_pool.give_back(places.out_slots);
        self.adapters[position as usize] = AdapterSlots::base();
        self.names.retain(|_, named| *named != position);
    }

    fn put(&mut self, position: u32, adapter: &AdapterVectors) -> Result<(), ProjectionError> {
        let at = position as usize;
        if at == 0 || self.places.get(at).is_some_and(Option::is_some) {
            return Err(ProjectionError::TakenPosition(position));
        }
        let (in_vectors, out_vectors) = (adapter.in_count(), adapter.out_count());
        let full = ProjectionError::PoolFull { in_vectors, out_vectors };
        let Some(in_slots) = self.in_pool.take(in_vectors) else { return Err(full) };
        let Some(out_slots) = self.out_pool.take(out_vectors) else {
            self.in_pool.give_back(in_slots);
            return Err(full);
        };
        if let Err(error) = self.write(in_slots.start, out_slots.start, adapter) {
            self.in_pool.give_back(in_slots);
            self.out_pool.give_back(out_slots);
            return Err(error.into());
        }
        if self.places.len() <= at {
            self.places.resize(at + 1, None);
            self.adapters.resize(at + 1, AdapterSlots::base());
        }
        self.adapters[at] = adapter.slots(in_slots.start, out_slots.start);
        if !adapter.sparse.is_empty() {
            self.passes_mut(position).sparse = adapter.sparse.clone();
        }
        self.places[at] = Some(Places { in_slots, out_slots, is_additive_alone: adapter.is_additive_alone });
        Ok(())
    }

    fn write(&mut self, in_slot: u32, out_slot: u32, adapter: &AdapterVectors) -> Result<(), DeviceError> {
        let LayerShape { d, k } = self.operands.shape();
        self.device.write(&mut self.operands.in_pool, in_slot, d, &adapter.in_vectors)?;
        self.device.write(&mut self.operands.out_pool, out_slot, k, &adapter.out_vectors)
    }

    /// The adapter's vectors one after the other, and where each is.
    fn vectors(&self, adapter: &FoldedAdapter) -> Result<AdapterVectors, ProjectionError> {
        let LayerShape { d, k } = self.operands.shape();
        let append = |pool: &mut Vec<f32>, what: &str, vector: &[f32], width: u32| {
            if vector.len() != width as usize {
                let what = format!("the {what}");
                return Err(ProjectionError::WrongSize { what, d, k, expected: width as usize, found: vector.len() });
            }
            pool.extend_from_slice(vector);
            Ok((pool.len() / width as usize - 1) as u32)
        };
        if !adapter.sparse.is_empty() {
            adapter.check(d as usize, k as usize).map_err(ProjectionError::Sparse)?;
        }
        let (mut in_vectors, mut out_vectors) = (Vec::new(), Vec::new());
        let mut virtual_rows = Vec::with_capacity(adapter.virtual_rows.len());
        for row in &adapter.virtual_rows {
            let in_scale = row.in_scale.as_ref().map(|scale| append(&mut in_vectors, "in-scale", scale, d));
            let out_scale = row.out_scale.as_ref().map(|scale| append(&mut out_vectors, "out-scale", scale, k));
            virtual_rows.push(VirtualRowSlots { in_scale: in_scale.transpose()?, out_scale: out_scale.transpose()? });
        }
        let is_additive_alone = virtual_rows.is_empty();
        if is_additive_alone {
            // An additive part alone: the product with the base weight counts for nothing, but the rows have to be written.
            let out_scale = append(&mut out_vectors, "out-scale", &vec![0.0; k as usize], k)?;
            virtual_rows.push(VirtualRowSlots { in_scale: None, out_scale: Some(out_scale) });
        }
        let shrink = (in_vectors.len() / d as usize) as u32;
        let expand = (out_vectors.len() / k as usize) as u32;
        for pair in &adapter.low_rank {
            append(&mut in_vectors, "shrink vector", &pair.shrink, d)?;
            append(&mut out_vectors, "expand vector", &pair.expand, k)?;
        }
        let low_rank = LowRankSlots { shrink, expand, rank: adapter.low_rank.len() as u32 };
        let shape = self.operands.shape();
        let sparse = adapter.sparse.clone();
        Ok(AdapterVectors { shape, in_vectors, out_vectors, virtual_rows, low_rank, is_additive_alone, sparse })
    }

    /// Extents.
    pub fn shape(&self) -> LayerShape {
        self.operands.shape()
    }

    /// Types of its operands.
    pub fn format(&self) -> LayerFormat {
        self.operands.format()
    }

    /// The device that it is on.
    pub fn device(&self) -> &Device {
        &self.device
    }

    /// What its prices depend on.
    pub fn layer(&self) -> PricedLayer {
        PricedLayer { shape: self.operands.shape(), format: self.operands.format() }
    }

    /// The operands on the device.
    pub fn operands(&self) -> &LayerOperands {
        &self.operands
    }

    /// Where the adapters lie; the base is at 0.
    pub fn adapters(&self) -> &[AdapterSlots] {
        &self.adapters
    }

    /// Where the adapter at a position of the table lies; `None` where there is none, so that its rows are base rows.
    pub fn slots_at(&self, position: u32) -> Option<&AdapterSlots> {
        self.places.get(position as usize)?.as_ref()?;
        self.adapters.get(position as usize)
    }

    /// The same without a virtual row that stands for none.
    pub(crate) fn own_slots_at(&self, position: u32) -> Option<(&[VirtualRowSlots], LowRankSlots)> {
        let places = self.places.get(position as usize)?.as_ref()?;
        let AdapterSlots { virtual_rows, low_rank, .. } = self.adapters.get(position as usize)?;
        Some((if places.is_additive_alone { &[] } else { virtual_rows }, *low_rank))
    }

    /// The batch's segments with their adapters looked up.
    ///
    /// # Errors
    /// A name that isn't loaded.
    pub fn segments(&self, batch: &Batch) -> Result<Vec<Segment>, BatchError> {
        let segments = batch.segments().iter().enumerate();
        segments
            .map(|(position, segment)| {
                let adapter = match &segment.adapter {
                    None => 0,
                    Some(name) => *self.names.get(name).ok_or_else(|| self.unknown(position, name))?,
                };
                Ok(Segment { rows: segment.rows, adapter })
            })
            .collect()
    }

    pub(crate) fn unknown(&self, segment: usize, name: &str) -> BatchError {
        const SHOWN: usize = 8;
        let mut names: Vec<_> = self.names.keys().map(String::as_str).collect();
        names.sort_unstable();
        let more = if names.len() > SHOWN { format!(", and {} more", names.len() - SHOWN) } else { String::new() };
        names.truncate(SHOWN);
        let known = if names.is_empty() { "none".to_owned() } else { names.join(", ") + &more };
        BatchError::UnknownAdapter { segment, name: name.to_owned(), known }
    }

    /// What the planner has to know of a batch.
    ///
    /// # Errors
    /// A name that isn't loaded.
    pub fn batch_shape(&self, batch: &Batch) -> Result<BatchShape, BatchError> {
        Ok(BatchShape::of(&self.segments(batch)?, &self.adapters))
    }

    /// Lays out a batch.
    ///
    /// # Errors
    /// A name that isn't loaded, a batch too large to index, an adapter that multiplies rows by sparse matrices, which no schedule does.
    pub fn schedule(&self, batch: &Batch, plan: &Plan) -> Result<Schedule, ProjectionError> {
        let segments = self.segments(batch)?;
        if self.passes_of(&segments).iter().any(|pass| !pass.own.sparse.is_empty()) {
            return Err(ProjectionError::SparseSchedule);
        }
        self.refuse_gates(&segments)?;
        let finishes = !self.operands.epilogue().is_identity();
        Ok(schedule(plan, self.operands.shape(), &segments, &self.adapters, finishes)?)
    }

    /// Runs batches of zeros as they would be planned, so that their kernels are compiled and their memory is there when the first
    /// of them comes. One batch of each size class is enough: rows from 1 to the most, few and many adapters.
    ///
    /// # Errors
    /// As [`Self::schedule`] and [`Self::execute`], and whatever fails on the device.
    pub fn warm_up(&self, prices: &LayerPrices, batches: &[Batch]) -> Result<(), ProjectionError> {
        let LayerShape { d, k } = self.operands.shape();
        let finishes = !self.operands.epilogue().is_identity();
        for batch in batches {
            let plan = plan(prices, &self.batch_shape(batch)?, finishes);
            let schedule = self.schedule(batch, &plan)?;
            let zeros = |width: u32| {
                let numbers = vec![0.0; schedule.tokens() as usize * width as usize];
                self.device.upload_as(&numbers, self.operands.format().activations)
            };
            let residual = if self.operands.epilogue().residual { Some(zeros(k)?) } else { None };
            self.execute(&schedule, &zeros(d)?, residual.as_ref())?;
        }
        Ok(self.device.synchronize()?)
    }

    /// Queues a batch whose input, and residual where the layer adds one, is on the device already; the result is `[rows, k]`.
    ///
    /// # Errors
    /// An input of the wrong size or type, a launch that the device can't make.
    pub fn execute(
        &self,
        schedule: &Schedule,
        x: &Buffer,
        residual: Option<&Buffer>,
    ) -> Result<Buffer, ProjectionError> {
        run(&self.device, &self.operands, schedule, x, residual)
    }

    /// Runs a batch: x `[rows, d]`, the result `[rows, k]`.
    ///
    /// # Errors
    /// As [`Self::schedule`] and [`Self::execute`], and whatever fails on the device.
    pub fn forward(&self, batch: &Batch, plan: &Plan, x: &[f32]) -> Result<Vec<f32>, ProjectionError> {
        self.forward_with_residual(batch, plan, x, None)
    }

    /// Runs a batch of a layer that adds a residual `[rows, k]`.
    ///
    /// # Errors
    /// As [`Self::forward`].
    pub fn forward_with_residual(
        &self,
        batch: &Batch,
        plan: &Plan,
        x: &[f32],
        residual: Option<&[f32]>,
    ) -> Result<Vec<f32>, ProjectionError> {
        let segments = self.segments(batch)?;
        let step = StepBatch::new(segments.iter().map(|segment| (segment.adapter, segment.rows)));
        let work = match self.passes_of(&segments).is_empty() {
            true => None,
            false => Some(Work::of(self, &step, |_, _| *plan)?),
        };
        let upload = |values: &[f32]| self.device.upload_as(values, self.operands.format().activations);
        let residual = residual.map(upload).transpose()?;
        let x = upload(x)?;
        let y = match work {
            None => self.execute(&self.schedule(batch, plan)?, &x, residual.as_ref())?,
            Some(work) => work.run(&self.device, &x, residual.as_ref())?,
        };
        Ok(self.device.read(&y)?)
    }
}

/// The in-vectors and out-vectors that the pools hold of an adapter.
fn vector_counts(adapter: &FoldedAdapter) -> (u32, u32) {
    let rows = &adapter.virtual_rows;
    let in_scales = rows.iter().filter(|row| row.in_scale.is_some()).count();
    let out_scales = rows.iter().filter(|row| row.out_scale.is_some()).count();
    // Without virtual rows, one that is scaled by zeros.
    let out_scales = if rows.is_empty() { 1 } else { out_scales };
    let count = |count: usize| u32::try_from(count).unwrap_or(u32::MAX);
    (count(in_scales + adapter.low_rank.len()), count(out_scales + adapter.low_rank.len()))
}

/// An adapter as the pools hold it; positions count from the first of its own vectors.
struct AdapterVectors {
    shape: LayerShape,
    /// `[in_count, d]`
    in_vectors: Vec<f32>,
    /// `[out_count, k]`
    out_vectors: Vec<f32>,
    virtual_rows: Vec<VirtualRowSlots>,
    low_rank: LowRankSlots,
    is_additive_alone: bool,
    sparse: SparseParts,
}

impl AdapterVectors {
    fn in_count(&self) -> u32 {
        (self.in_vectors.len() / self.shape.d as usize) as u32
    }

    fn out_count(&self) -> u32 {
        (self.out_vectors.len() / self.shape.k as usize) as u32
    }

    /// With the first vectors at these slots.
    fn slots(&self, in_slot: u32, out_slot: u32) -> AdapterSlots {
        let moved = |row: &VirtualRowSlots| VirtualRowSlots {
            in_scale: row.in_scale.map(|slot| slot + in_slot),
            out_scale: row.out_scale.map(|slot| slot + out_slot),
        };
        let LowRankSlots { shrink, expand, rank } = self.low_rank;
        AdapterSlots {
            virtual_rows: self.virtual_rows.iter().map(moved).collect(),
            low_rank: LowRankSlots { shrink: shrink + in_slot, expand: expand + out_slot, rank },
            is_merged: false,
        }
    }
}

/// [`Projection::execute`] on operands that were taken out of a projection, so that nobody has to keep it from changing meanwhile.
fn run(
    device: &Device,
    operands: &LayerOperands,
    schedule: &Schedule,
    x: &Buffer,
    residual: Option<&Buffer>,
) -> Result<Buffer, ProjectionError> {
    let (rows, d) = (schedule.tokens() as usize, operands.shape().d as usize);
    if x.len() != rows * d {
        return Err(BatchError::WrongInput { rows, d, expected: rows * d, found: x.len() }.into());
    }
    Ok(device.execute(operands, schedule, x, residual)?)
}

/// A base weight `[d, k]` in a format.
fn packed(format: WeightFormat, shape: LayerShape, values: &[f32]) -> Result<PackedWeight, ProjectionError> {
    let LayerShape { d, k } = shape;
    let expected = d as usize * k as usize;
    if expected != values.len() || expected == 0 {
        let what = "the base weight".to_owned();
        return Err(ProjectionError::WrongSize { what, d, k, expected, found: values.len() });
    }
    Ok(PackedWeight::from_f32(format, shape, values)?)
}
