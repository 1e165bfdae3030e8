//! What a batch runs on. A device holds buffers and executes schedules; everything above it is the same for all of them.

use std::any::Any;
use std::ops::Range;
use std::sync::Arc;

use flora_plan::blueprints::{Blueprints, Tile};
use flora_plan::layer::{Element, LayerFormat, WeightFormat};
use flora_plan::schedule::{BackwardSchedule, Materialised, Schedule};
use flora_plan::weight::PackedWeight;

use crate::backend::{Backend, Gradients, Queueing, RankGates, ReplacedRows, SparseRows, Storage, Wanted};
use crate::buffer::{Buffer, PoolBuffer, WeightBuffer};
use crate::info::DeviceInfo;
use crate::operands::{LayerOperands, OperandError, check_gates, check_recipe};

/// What goes wrong on a device.
#[derive(Debug, thiserror::Error)]
#[non_exhaustive]
pub enum DeviceError {
    /// No such device.
    #[error("no device `{wanted}` here; there are: {available}")]
    Unknown {
        /// What was asked for.
        wanted: String,
        /// What there is.
        available: String,
    },
    /// A device of a kind that this build has no code for.
    #[error("this build of flora has no support for `{wanted}`; build it with `--features {feature}`")]
    NotBuilt {
        /// What was asked for.
        wanted: String,
        /// The feature that brings it.
        feature: &'static str,
    },
    /// The device was found but doesn't start.
    #[error("the device `{id}` doesn't start: {reason}; `--device host` always works")]
    Start {
        /// Which device.
        id: String,
        /// The driver's words.
        reason: String,
    },
    /// Operands that make no layer, or a schedule that isn't one of theirs.
    #[error(transparent)]
    Operands(#[from] OperandError),
    /// A batch that is more than the device takes, before anything ran: a smaller batch or another plan may run.
    #[error(transparent)]
    Refused(Box<dyn std::error::Error + Send + Sync>),
    /// A backend found operands that don't fit, which what is asked before should have found.
    #[error("{0}; this is a defect of flora")]
    Mismatch(Box<dyn std::error::Error + Send + Sync>),
    /// A kernel failed, or its result can't be read.
    #[error("the device failed while it ran a batch: {0}")]
    Execution(String),
    /// A type that the device has no buffers of.
    #[error("the device `{device}` has no {element} buffers; keep the layer in f32")]
    NoElement {
        /// The type.
        element: Element,
        /// Which device.
        device: String,
    },
    /// Memory that somebody lends and that isn't of this device, or not of these numbers.
    #[error("memory that the device `{device}` can't read as {element} was lent to it; lend memory of its own kind")]
    ForeignMemory {
        /// The type.
        element: Element,
        /// Which device.
        device: String,
    },
    /// A backward pass on a device that has no kernels for it.
    #[error("the device `{device}` computes no gradients; train on `host`")]
    NoBackward {
        /// Which device.
        device: String,
    },
    /// Gates of low-rank sums on a device whose kernels multiply by none.
    #[error("the device `{device}` weighs no parts of an adapter for each token (gates); run the batch on `host`")]
    NoGates {
        /// Which device.
        device: String,
    },
    /// Activations in 8 bits on a device that multiplies floats alone.
    #[error(
        "the device `{device}` multiplies activations in floats alone; leave `--activations int8` out, or take `--device host`"
    )]
    NoRounding {
        /// Which device.
        device: String,
    },
    /// More keys and values than a device takes in one buffer.
    #[error(
        "the keys and values of a layer take {bytes} bytes, and the device `{device}` takes {limit} in one buffer; give the cache at most {tokens} tokens"
    )]
    CacheTooLarge {
        /// How many.
        bytes: u64,
        /// The device's limit.
        limit: u64,
        /// Tokens that fit.
        tokens: u64,
        /// Which device.
        device: String,
    },
    /// More numbers than the device takes in one buffer.
    #[error(
        "{bytes} bytes were to go into one buffer, and the device `{device}` takes {limit}; load fewer adapters or split the layer"
    )]
    BufferTooLarge {
        /// How many.
        bytes: u64,
        /// The device's limit.
        limit: u64,
        /// Which device.
        device: String,
    },
}

/// What the rows of a launch are computed of.
#[derive(Clone, Copy)]
pub(crate) struct RowInputs<'a> {
    /// `[tokens, d]`
    pub(crate) x: &'a Buffer,
    /// What is read in place of some of its rows.
    pub(crate) replaced: Option<ReplacedRows<'a>>,
    pub(crate) gates: Option<RankGates<'a>>,
}

/// A device that is ready to run.
#[derive(Clone)]
pub struct Device {
    info: Arc<DeviceInfo>,
    backend: Arc<dyn Backend>,
}

impl std::fmt::Debug for Device {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.debug_tuple("Device").field(&self.info.id).finish()
    }
}

impl Device {
    /// A device that was started, with what runs on it.
    pub fn new(info: DeviceInfo, backend: impl Backend + 'static) -> Self {
        Self { info: Arc::new(info), backend: Arc::new(backend) }
    }

    /// What the libraries below call it, for whoever shares its memory; `None` where it is another kind's.
    pub fn place<T: Any>(&self) -> Option<&T> {
        self.backend.place().downcast_ref()
    }

    pub(crate) fn backend(&self) -> &dyn Backend {
        &*self.backend
    }

    /// What it is, as its buffers know it.
    pub(crate) fn shared_info(&self) -> &Arc<DeviceInfo> {
        &self.info
    }

    /// What it is.
    pub fn info(&self) -> &DeviceInfo {
        &self.info
    }

    /// Copies numbers to the device, as f32.
    ///
    /// # Errors
    /// More than it takes in one buffer.
    pub fn upload(&self, values: &[f32]) -> Result<Buffer, DeviceError> {
        self.upload_as(values, Element::F32)
    }

    /// Copies numbers to the device, rounded to `element`.
    ///
    /// # Errors
    /// More than it takes in one buffer, a type that it doesn't have.
    pub fn upload_as(&self, values: &[f32], element: Element) -> Result<Buffer, DeviceError> {
        self.has(element)?;
        self.holds(values.len() as u64 * element.bytes())?;
        Ok(self.buffer(self.backend.upload(values, element), values.len(), element))
    }

    /// Numbers that are in the device's memory already, shared with whoever holds them; not to be changed while a buffer has them.
    ///
    /// # Errors
    /// Memory of another kind of device, or of fewer numbers than `elements`.
    pub fn share(&self, storage: Storage, elements: usize, element: Element) -> Result<Buffer, DeviceError> {
        let foreign = || DeviceError::ForeignMemory { element, device: self.info.id.clone() };
        let found = self.backend.capacity(&storage, element).ok_or_else(foreign)?;
        if found < elements {
            return Err(OperandError::WrongSize { what: "the buffer", expected: elements, found }.into());
        }
        Ok(self.buffer(storage, elements, element))
    }

    /// The numbers of `buffer` in one of `elements` numbers; those beyond it are undefined, and never read by a batch.
    pub(crate) fn resized(&self, buffer: &Buffer, elements: usize) -> Result<Buffer, DeviceError> {
        self.check_owner(&buffer.owner)?;
        self.holds(elements as u64 * buffer.element.bytes())?;
        Ok(self.buffer(self.backend.resized(&buffer.storage, elements, buffer.element)?, elements, buffer.element))
    }

    /// Writes vectors of `width` numbers into a pool, from the slot `first` on, behind everything that is queued.
    pub(crate) fn write(
        &self,
        pool: &mut PoolBuffer,
        first: u32,
        width: u32,
        vectors: &[f32],
    ) -> Result<(), DeviceError> {
        self.overwrite(&mut pool.buffer, first as usize * width as usize, vectors)
    }

    /// Writes into a buffer that nobody else reads, from its number `first` on, behind everything that is queued.
    pub(crate) fn overwrite(&self, buffer: &mut Buffer, first: usize, values: &[f32]) -> Result<(), DeviceError> {
        self.check_owner(&buffer.owner)?;
        let (expected, found) = (first + values.len(), buffer.elements);
        if expected > found {
            return Err(OperandError::WrongSize { what: "a buffer that is written", expected, found }.into());
        }
        self.backend.write(&mut buffer.storage, first, values, buffer.element)
    }

    /// Copies a weight to the device, in the form that it has.
    ///
    /// # Errors
    /// More than it takes in one buffer, a type that it doesn't have.
    pub fn upload_weight(&self, weight: &PackedWeight) -> Result<WeightBuffer, DeviceError> {
        if let WeightFormat::Float(element) = weight.format() {
            self.has(element)?;
        }
        self.holds(weight.format().bytes(weight.shape()))?;
        let (shape, format, owner) = (weight.shape(), weight.format(), self.info.clone());
        Ok(WeightBuffer { storage: self.backend.upload_weight(weight), shape, format, owner })
    }

    fn has(&self, element: Element) -> Result<(), DeviceError> {
        match self.info.element_types.iter().any(|name| name == element.name()) {
            true => Ok(()),
            false => Err(DeviceError::NoElement { element, device: self.info.id.clone() }),
        }
    }

    fn holds(&self, bytes: u64) -> Result<(), DeviceError> {
        match self.info.largest_buffer_bytes {
            Some(limit) if bytes > limit => {
                Err(DeviceError::BufferTooLarge { bytes, limit, device: self.info.id.clone() })
            }
            _ => Ok(()),
        }
    }

    pub(crate) fn buffer(&self, storage: Storage, elements: usize, element: Element) -> Buffer {
        Buffer { storage, elements, element, owner: self.info.clone() }
    }

    /// Copies numbers back, after everything that was queued before.
    ///
    /// # Errors
    /// A buffer of another device; a launch before it failed.
    pub fn read(&self, buffer: &Buffer) -> Result<Vec<f32>, DeviceError> {
        self.read_parts(buffer, std::slice::from_ref(&(0..buffer.elements)))
    }

    /// Some parts of a buffer, one behind the other. None of them goes beyond it.
    pub(crate) fn read_parts(&self, buffer: &Buffer, parts: &[Range<usize>]) -> Result<Vec<f32>, DeviceError> {
        self.check_owner(&buffer.owner)?;
        if let Some(beyond) = parts.iter().find(|part| part.end > buffer.elements) {
            let (expected, found) = (beyond.end, buffer.elements);
            return Err(OperandError::WrongSize { what: "a buffer that is read", expected, found }.into());
        }
        self.backend.read(&buffer.storage, parts, buffer.element)
    }

    /// Queues a schedule; x `[tokens, d]`, residual `[tokens, k]` where the epilogue adds one, the result `[tokens, k]`, all in
    /// the type of the layer's activations.
    ///
    /// # Errors
    /// Buffers of another device, size or type, a schedule that is too large for the layer, of adapters that it lacks or of the merged weight of
    /// another adapter, a launch that the device can't make. Failures of the kernels themselves show when the result is read.
    pub fn execute(
        &self,
        layer: &LayerOperands,
        schedule: &Schedule,
        x: &Buffer,
        residual: Option<&Buffer>,
    ) -> Result<Buffer, DeviceError> {
        self.execute_inputs(layer, schedule, RowInputs { x, replaced: None, gates: None }, residual)
    }

    /// Whether low-rank sums may be multiplied by gates here, so that adapters whose parts are weighed for each token can be run.
    pub fn has_gates(&self) -> bool {
        self.backend.has_gates()
    }

    /// The same with other rows in place of some of x's, and with gates.
    pub(crate) fn execute_inputs(
        &self,
        layer: &LayerOperands,
        schedule: &Schedule,
        RowInputs { x, replaced, gates }: RowInputs<'_>,
        residual: Option<&Buffer>,
    ) -> Result<Buffer, DeviceError> {
        let (shape, tokens) = (layer.shape(), schedule.tokens() as usize);
        let (d, k) = (shape.d as usize, shape.k as usize);
        let activations = layer.format().activations;
        self.check_owner(&layer.base_weight().owner)?;
        layer.check()?;
        layer.check_buffer("x", x, tokens * d, activations)?;
        let residual = residual.filter(|_| layer.epilogue().residual);
        match residual {
            Some(residual) => layer.check_buffer("the residual", residual, tokens * k, activations)?,
            None if layer.epilogue().residual => return Err(OperandError::NoResidual.into()),
            None => {}
        }
        layer.check_schedule(schedule)?;
        let residual = residual.map(|residual| &residual.storage);
        let y = match (replaced, gates) {
            (None, None) => self.backend.execute(layer, schedule, &x.storage, residual)?,
            (Some(replaced), None) => self.backend.execute_replaced(layer, schedule, &x.storage, replaced, residual)?,
            (replaced, Some(gates)) => {
                check_gates(schedule, gates)?;
                let gated = self.backend.execute_gated(layer, schedule, (&x.storage, replaced), gates, residual);
                gated.ok_or_else(|| DeviceError::NoGates { device: self.info.id.clone() })??
            }
        };
        Ok(self.buffer(y, tokens * k, activations))
    }

    /// Queues a backward pass; x `[tokens, d]` and the gradient g `[tokens, k]` of the sum before bias, activation and residual, both
    /// in the type of the layer's activations.
    ///
    /// # Errors
    /// As [`Self::execute`], and [`DeviceError::NoBackward`].
    pub fn backward(
        &self,
        layer: &LayerOperands,
        schedule: &BackwardSchedule,
        (x, g): (&Buffer, &Buffer),
        wanted: Wanted,
    ) -> Result<Gradients<Buffer>, DeviceError> {
        let (shape, tokens) = (layer.shape(), schedule.tokens() as usize);
        let (d, k) = (shape.d as usize, shape.k as usize);
        let activations = layer.format().activations;
        self.check_owner(&layer.base_weight().owner)?;
        layer.check()?;
        layer.check_buffer("x", x, tokens * d, activations)?;
        layer.check_buffer("the output's gradient", g, tokens * k, activations)?;
        layer.check_backward(schedule)?;
        let queued = self.backend.backward(layer, schedule, &x.storage, &g.storage, wanted);
        let Gradients { input, vectors } =
            queued.ok_or_else(|| DeviceError::NoBackward { device: self.info.id.clone() })??;
        let vectors = vectors.map(|[in_vectors, out_vectors]| {
            let (in_count, out_count) = (schedule.in_vectors() as usize, schedule.out_vectors() as usize);
            [self.buffer(in_vectors, in_count * d, Element::F32), self.buffer(out_vectors, out_count * k, Element::F32)]
        });
        Ok(Gradients { input: input.map(|input| self.buffer(input, tokens * d, activations)), vectors })
    }

    /// Multiplies rows in host memory by sparse matrices that they fit.
    pub(crate) fn multiply_sparse(&self, mut products: Vec<SparseRows<'_>>) {
        products.retain(|SparseRows { x, matrix, y }| {
            let [inputs, outputs] = matrix.shape();
            debug_assert_eq!(x.len() * outputs, y.len() * inputs, "rows of other extents");
            !y.is_empty()
        });
        self.backend.multiply_sparse(&mut products);
    }

    /// Makes the W_i that `step` describes.
    ///
    /// # Errors
    /// Operands of another device, slots beyond the pools, a weight that the device can't hold.
    pub(crate) fn merge(&self, layer: &LayerOperands, step: &Materialised) -> Result<WeightBuffer, DeviceError> {
        self.check_owner(&layer.base_weight().owner)?;
        layer.check()?;
        check_recipe(step, (layer.in_pool().slots(), layer.out_pool().slots()))?;
        let storage = self.backend.merge(layer, step)?;
        let format = self.backend.merged_format(layer.format());
        Ok(WeightBuffer { storage, shape: layer.shape(), format, owner: self.info.clone() })
    }

    /// The same layer, keeping the W_i that `step` describes for the adapter at a position of its table.
    ///
    /// # Errors
    /// Operands of another device, slots beyond the pools, a weight that the device can't hold.
    pub fn merged(
        &self,
        layer: &LayerOperands,
        adapter: u32,
        step: &Materialised,
    ) -> Result<LayerOperands, DeviceError> {
        let mut merged = layer.clone();
        merged.set_merged(adapter, self.merge(layer, step)?);
        Ok(merged)
    }

    pub(crate) fn check_owner(&self, owner: &Arc<DeviceInfo>) -> Result<(), DeviceError> {
        if Arc::ptr_eq(owner, &self.info) {
            return Ok(());
        }
        Err(OperandError::ForeignBuffer { owner: owner.id.clone(), device: self.info.id.clone() }.into())
    }

    /// Seconds of what `work` queues, by the device's own clock; `None`, and nothing done, where it has none.
    pub fn device_seconds(&self, work: &mut Queueing<'_>) -> Option<Result<f64, DeviceError>> {
        // A rasteriser on the processor stamps its queries when it likes: lavapipe's say that 576 × 576 weights take a fifth of a
        // millisecond for 16 rows and 13 ms for 256.
        if self.info.software { None } else { self.backend.device_seconds(work) }
    }

    /// The same device, sharing every buffer, with what tuning chose.
    #[must_use]
    pub fn tuned(&self, blueprints: &Blueprints) -> Self {
        Self { info: self.info.clone(), backend: self.backend.tuned(blueprints) }
    }

    /// The same device, sharing every buffer, with activations rounded to 8 bits where they are multiplied by quantised base weights:
    /// faster, and less exact by what [`Self::unrounded`] shows. Weights that adapters make, low-rank sums and gradients stay in floats.
    ///
    /// # Errors
    /// A device without such products: all but the host.
    pub fn rounding_activations(&self) -> Result<Self, DeviceError> {
        match self.backend.rounding_activations() {
            Some(backend) => Ok(Self { info: self.info.clone(), backend }),
            None => Err(DeviceError::NoRounding { device: self.info.id.clone() }),
        }
    }

    /// Does `work`, and everything that runs on this device meanwhile, with activations as they are, where
    /// [`Self::rounding_activations`] rounds them: to see what that costs.
    ///
    /// # Errors
    /// What `work` says.
    pub fn unrounded(&self, work: &mut Queueing<'_>) -> Result<(), DeviceError> {
        self.backend.unrounded(work)
    }

    /// The tiles that layers of `format` can be cut into; none where there is no choice.
    pub fn tiles(&self, format: LayerFormat) -> Vec<Tile> {
        self.backend.tiles(format)
    }

    /// Waits until everything queued is done.
    ///
    /// # Errors
    /// Some of it failed.
    pub fn synchronize(&self) -> Result<(), DeviceError> {
        self.backend.synchronize()
    }
}
