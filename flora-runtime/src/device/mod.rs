//! What a batch runs on. A device holds buffers and executes schedules; everything above it is the same for all of them.

mod cube;
mod find;
mod host;

use std::sync::Arc;

use cubecl::bytes::Bytes;
use cubecl::cuda::CudaDevice;
use cubecl::server::Handle;
use cubecl::wgpu::WgpuDevice;
use flora_codegen::blueprints::{Blueprints, Tile};
use flora_codegen::launch::{self, LaunchError};
use flora_codegen::layer::{Element, Epilogue, LayerFormat, LayerShape, WeightFormat};
use flora_codegen::schedule::{Materialised, Schedule};
use flora_codegen::weight::PackedWeight;
use flora_host::HostError;
use serde::Serialize;

/// Numbers on a device. Cloning shares them.
#[derive(Clone, Debug)]
pub struct Buffer {
    storage: Storage,
    elements: usize,
    element: Element,
    owner: Arc<DeviceInfo>,
}

/// Where the numbers are; which of the two is the backend's own affair.
#[derive(Clone, Debug)]
enum Storage {
    Host(Arc<Bytes>),
    Device(Handle),
}

/// A base weight, or a W_i, on a device. Cloning shares it.
#[derive(Clone, Debug)]
pub struct WeightBuffer {
    storage: WeightStorage,
    shape: LayerShape,
    format: WeightFormat,
    owner: Arc<DeviceInfo>,
}

#[derive(Clone, Debug)]
enum WeightStorage {
    Host(Arc<flora_host::Weight>),
    Device { values: Handle, scales: Option<Handle> },
}

impl Buffer {
    /// How many numbers.
    pub fn len(&self) -> usize {
        self.elements
    }

    /// Whether there are none.
    pub fn is_empty(&self) -> bool {
        self.elements == 0
    }

    /// Their type.
    pub fn element(&self) -> Element {
        self.element
    }

    /// The numbers of a host's buffer.
    pub fn bytes(&self) -> Option<&Arc<Bytes>> {
        match &self.storage {
            Storage::Host(bytes) => Some(bytes),
            Storage::Device(_) => None,
        }
    }

    /// The handle of a cubecl device's buffer; it may have bytes after the numbers.
    pub fn handle(&self) -> Option<&Handle> {
        match &self.storage {
            Storage::Host(_) => None,
            Storage::Device(handle) => Some(handle),
        }
    }
}

/// Vectors of adapters on a device: `[slots, width]`.
#[derive(Clone, Debug)]
pub struct PoolBuffer {
    /// The vectors, one after the other.
    pub buffer: Buffer,
    /// How many; at least one.
    pub slots: u32,
}

/// The operands of one layer on a device.
#[derive(Clone, Debug)]
pub struct LayerOperands {
    /// Extents.
    pub shape: LayerShape,
    /// Types.
    pub format: LayerFormat,
    /// `[d, k]`
    pub base_weight: WeightBuffer,
    /// `[k]`, f32
    pub bias: Option<Buffer>,
    /// `[slots, d]`
    pub in_pool: PoolBuffer,
    /// `[slots, k]`
    pub out_pool: PoolBuffer,
    /// Bias, activation, residual.
    pub epilogue: Epilogue,
    /// The adapter (its position in the batch's table) whose W_i is resident.
    pub merged: Option<(u32, WeightBuffer)>,
}

/// Which kind of device.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash, Serialize)]
#[serde(rename_all = "lowercase")]
pub enum BackendKind {
    /// This machine's processor.
    Host,
    /// An NVIDIA GPU.
    Cuda,
    /// A GPU through wgpu (Vulkan, Metal, DirectX, WebGPU).
    Wgpu,
}

/// A device as the libraries below call it.
#[derive(Clone, Debug)]
pub enum Place {
    /// This machine's processor.
    Host,
    /// A device of cubecl's CUDA runtime.
    Cuda(CudaDevice),
    /// A device of cubecl's wgpu runtime.
    Wgpu(WgpuDevice),
}

/// What a device is and which of its features matter.
#[derive(Clone, Debug, PartialEq, Serialize)]
pub struct DeviceInfo {
    /// What `--device` takes to choose it.
    pub id: String,
    /// The device's own name.
    pub name: String,
    /// The kind.
    pub backend: BackendKind,
    /// Driver or compiler.
    pub driver: String,
    /// Whether it is a rasteriser that runs on the processor; never chosen by itself.
    pub software: bool,
    /// Units that run in lockstep; `None` for the host.
    pub plane_size: Option<u32>,
    /// Bytes of shared memory of one cube; `None` for the host.
    pub shared_memory_bytes: Option<usize>,
    /// The most bytes in one buffer; `None` where nothing but memory limits it.
    pub largest_buffer_bytes: Option<u64>,
    /// Element types that buffers may hold.
    pub element_types: Vec<String>,
    /// Matrix-multiply fragments (cmma): "16x16x16 f16*f16->f32".
    pub fragments: Vec<String>,
}

impl DeviceInfo {
    /// What identifies the device in a tuning file.
    pub fn fingerprint(&self) -> String {
        format!("{} / {} / {}", self.id, self.name, self.driver)
    }
}

/// What goes wrong on a device.
#[derive(Debug, thiserror::Error)]
pub enum DeviceError {
    /// No such device.
    #[error("no device `{wanted}` here; there are: {available}")]
    Unknown {
        /// What was asked for.
        wanted: String,
        /// What there is.
        available: String,
    },
    /// The device was found but doesn't start.
    #[error("the device `{id}` doesn't start: {reason}; `--device host` always works")]
    Start {
        /// Which device.
        id: String,
        /// The driver's words.
        reason: String,
    },
    /// A launch is impossible on this device.
    #[error(transparent)]
    Launch(#[from] LaunchError),
    /// A kernel failed, or its result can't be read.
    #[error("the device failed while it ran a batch: {0}")]
    Execution(String),
    /// The host can't run a schedule with these operands.
    #[error(transparent)]
    Host(#[from] HostError),
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
    /// A type that the device has no buffers of.
    #[error("the device `{device}` has no {element} buffers; keep the layer in f32")]
    NoElement {
        /// The type.
        element: Element,
        /// Which device.
        device: String,
    },
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

/// Queues something on a device.
pub(crate) type Queueing<'a> = dyn FnMut() -> Result<(), DeviceError> + Send + 'a;

/// How a device does what [`Device`] offers. Implemented by the host and by every cubecl runtime.
/// [`Device`] has checked that all storage is the backend's own and as long as the layer and the schedule say.
trait Backend: Send + Sync {
    fn upload(&self, values: &[f32], element: Element) -> Storage;
    fn upload_weight(&self, weight: &PackedWeight) -> WeightStorage;
    /// The same numbers in a larger buffer, and whatever after them.
    fn resized(&self, storage: &Storage, elements: usize, element: Element) -> Result<Storage, DeviceError>;
    /// Writes into a buffer from its number `first` on. [`Device`] has checked that they fit.
    fn write(&self, storage: &mut Storage, first: usize, values: &[f32], element: Element) -> Result<(), DeviceError>;
    fn read(&self, storage: &Storage, elements: usize, element: Element) -> Result<Vec<f32>, DeviceError>;
    fn execute(
        &self,
        layer: &LayerOperands,
        schedule: &Schedule,
        x: &Storage,
        residual: Option<&Storage>,
    ) -> Result<Storage, DeviceError>;
    fn merge(&self, layer: &LayerOperands, step: &Materialised) -> Result<WeightStorage, DeviceError>;
    /// The format of what [`Self::merge`] makes, and of what a step that is merged multiplies by.
    fn merged_format(&self, format: LayerFormat) -> WeightFormat;
    fn synchronize(&self) -> Result<(), DeviceError>;
    /// Seconds of what `work` queues, by the device's own clock; `None`, and nothing done, where it has none.
    fn device_seconds(&self, work: &mut Queueing<'_>) -> Option<Result<f64, DeviceError>>;
    /// The same backend with what tuning chose.
    fn tuned(&self, blueprints: &Blueprints) -> Arc<dyn Backend>;
    /// Tiles to choose from; none where there is no choice.
    fn tiles(&self, format: LayerFormat) -> Vec<Tile>;
}

/// A device that is ready to run.
#[derive(Clone)]
pub struct Device {
    info: Arc<DeviceInfo>,
    backend: Arc<dyn Backend>,
    place: Place,
}

impl std::fmt::Debug for Device {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.debug_tuple("Device").field(&self.info.id).finish()
    }
}

impl Device {
    /// The best device here: CUDA, else a GPU through wgpu, else the host. A software rasteriser is never chosen.
    pub fn auto() -> Self {
        let found = find::all().into_iter().filter(|found| !found.info.software);
        found.map(find::Found::start).find_map(Result::ok).unwrap_or_else(Self::host)
    }

    /// This machine's processor.
    pub fn host() -> Self {
        let (info, backend) = host::open();
        Self { info: Arc::new(info), backend: Arc::new(backend), place: Place::Host }
    }

    /// The device with this id (see [`Device::list`]); `cuda` and `wgpu` stand for the first of their kind.
    ///
    /// # Errors
    /// There is none, or it doesn't start.
    pub fn open(id: &str) -> Result<Self, DeviceError> {
        match id {
            "auto" => return Ok(Self::auto()),
            "host" => return Ok(Self::host()),
            _ => {}
        }
        let mut found = find::all();
        let matches = |found: &find::Found| found.info.id == id || found.info.id.split(':').next() == Some(id);
        match found.iter().position(matches) {
            Some(position) => found.swap_remove(position).start(),
            None => {
                let ids = found.iter().map(|found| found.info.id.as_str());
                let available = std::iter::once("host").chain(ids).collect::<Vec<_>>().join(", ");
                Err(DeviceError::Unknown { wanted: id.to_owned(), available })
            }
        }
    }

    /// Every device here, the host last.
    pub fn list() -> Vec<DeviceInfo> {
        let (host, _) = host::open();
        find::all().into_iter().map(|found| found.describe()).chain([host]).collect()
    }

    /// Where it is, for whoever shares its memory.
    pub fn place(&self) -> &Place {
        &self.place
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
        Ok(self.own(self.backend.upload(values, element), values.len(), element))
    }

    /// The numbers of `buffer` in one of `elements` numbers; those beyond it are undefined, and never read by a batch.
    pub(crate) fn resized(&self, buffer: &Buffer, elements: usize) -> Result<Buffer, DeviceError> {
        self.check_owner(&buffer.owner)?;
        self.holds(elements as u64 * buffer.element.bytes())?;
        Ok(self.own(self.backend.resized(&buffer.storage, elements, buffer.element)?, elements, buffer.element))
    }

    /// Writes vectors of `width` numbers into a pool, from the slot `first` on, behind everything that is queued.
    pub(crate) fn write(
        &self,
        pool: &mut PoolBuffer,
        first: u32,
        width: u32,
        vectors: &[f32],
    ) -> Result<(), DeviceError> {
        self.check_owner(&pool.buffer.owner)?;
        let first = first as usize * width as usize;
        let (expected, found) = (first + vectors.len(), pool.buffer.elements);
        if expected > found {
            return Err(DeviceError::WrongSize { what: "a pool", expected, found });
        }
        self.backend.write(&mut pool.buffer.storage, first, vectors, pool.buffer.element)
    }

    /// Numbers that are in the host's memory already, shared with whoever holds them; not to be changed while a buffer has them.
    ///
    /// # Errors
    /// Another device than the host; bytes that aren't whole numbers, or lie where such numbers can't be read.
    pub fn share_bytes(&self, bytes: Arc<Bytes>, element: Element) -> Result<Buffer, DeviceError> {
        if self.info.backend != BackendKind::Host {
            return Err(DeviceError::ForeignBuffer { owner: "host".to_owned(), device: self.info.id.clone() });
        }
        let elements = bytes.len() / element.bytes() as usize;
        let buffer = self.own(Storage::Host(bytes), elements, element);
        host::values(&buffer.storage, element)?;
        Ok(buffer)
    }

    /// Numbers that are on the device already, in a buffer of the same cubecl client.
    ///
    /// # Errors
    /// The host; a handle of fewer bytes than that.
    ///
    /// # Safety
    /// The handle is of the client that this device runs on. A handle doesn't say whose it is, and another client's would name other
    /// memory here.
    pub unsafe fn share_handle(
        &self,
        handle: Handle,
        elements: usize,
        element: Element,
    ) -> Result<Buffer, DeviceError> {
        if self.info.backend == BackendKind::Host {
            return Err(DeviceError::ForeignBuffer { owner: "a device".to_owned(), device: self.info.id.clone() });
        }
        let found = (handle.size_in_used() / element.bytes()) as usize;
        if found < elements {
            return Err(DeviceError::WrongSize { what: "the buffer", expected: elements, found });
        }
        Ok(self.own(Storage::Device(handle), elements, element))
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

    fn own(&self, storage: Storage, elements: usize, element: Element) -> Buffer {
        Buffer { storage, elements, element, owner: self.info.clone() }
    }

    /// Copies numbers back, after everything that was queued before.
    ///
    /// # Errors
    /// A buffer of another device; a launch before it failed.
    pub fn read(&self, buffer: &Buffer) -> Result<Vec<f32>, DeviceError> {
        self.check("the buffer", buffer, buffer.elements, buffer.element)?;
        self.backend.read(&buffer.storage, buffer.elements, buffer.element)
    }

    /// Queues a schedule; x `[tokens, d]`, residual `[tokens, k]` where the epilogue adds one, the result `[tokens, k]`, all in
    /// the type of the layer's activations.
    ///
    /// # Errors
    /// Buffers of another device, size or type, a launch that the device can't make. Failures of the kernels themselves show
    /// when the result is read.
    pub fn execute(
        &self,
        layer: &LayerOperands,
        schedule: &Schedule,
        x: &Buffer,
        residual: Option<&Buffer>,
    ) -> Result<Buffer, DeviceError> {
        let (k, tokens) = (layer.shape.k as usize, schedule.tokens() as usize);
        let activations = layer.format.activations;
        self.check_layer(layer)?;
        self.check("x", x, tokens * layer.shape.d as usize, activations)?;
        let residual = residual.filter(|_| layer.epilogue.residual);
        match residual {
            Some(residual) => self.check("the residual", residual, tokens * k, activations)?,
            None if layer.epilogue.residual => return Err(LaunchError::NoResidual.into()),
            None => {}
        }
        let merged = layer.merged.as_ref().map(|(adapter, _)| *adapter);
        launch::check(schedule, layer.shape, layer.in_pool.slots, layer.out_pool.slots, merged)?;
        let residual = residual.map(|residual| &residual.storage);
        let y = self.backend.execute(layer, schedule, &x.storage, residual)?;
        Ok(self.own(y, tokens * k, activations))
    }

    /// Makes the W_i that `step` describes, for [`LayerOperands::merged`].
    ///
    /// # Errors
    /// Operands of another device or size, slots beyond the pools, a weight that the device can't hold.
    pub fn merge(&self, layer: &LayerOperands, step: &Materialised) -> Result<WeightBuffer, DeviceError> {
        self.check_layer(layer)?;
        launch::check_slots(step, layer.in_pool.slots, layer.out_pool.slots)?;
        let storage = self.backend.merge(layer, step)?;
        let format = self.backend.merged_format(layer.format);
        Ok(WeightBuffer { storage, shape: layer.shape, format, owner: self.info.clone() })
    }

    /// Whether a layer's operands are this device's and as large as its shape says.
    fn check_layer(&self, layer: &LayerOperands) -> Result<(), DeviceError> {
        let (d, k) = (layer.shape.d as usize, layer.shape.k as usize);
        let adapters = layer.format.adapters;
        let merged = layer.merged.as_ref().map(|(_, weight)| weight);
        for weight in std::iter::once(&layer.base_weight).chain(merged) {
            self.check_owner(&weight.owner)?;
            if weight.shape != layer.shape {
                let found = weight.shape.d as usize * weight.shape.k as usize;
                return Err(DeviceError::WrongSize { what: "a weight", expected: d * k, found });
            }
        }
        if layer.base_weight.format != layer.format.weight {
            let (expected, found) = (layer.format.weight, layer.base_weight.format);
            return Err(DeviceError::WrongFormat { what: "the base weight", expected, found });
        }
        if let Some(merged) = merged {
            let (expected, found) = (self.backend.merged_format(layer.format), merged.format);
            if found != expected {
                return Err(DeviceError::WrongFormat { what: "the merged weight", expected, found });
            }
        }
        self.check("the in-vectors", &layer.in_pool.buffer, layer.in_pool.slots as usize * d, adapters)?;
        self.check("the out-vectors", &layer.out_pool.buffer, layer.out_pool.slots as usize * k, adapters)?;
        match &layer.bias {
            Some(bias) => self.check("the bias", bias, k, Element::F32),
            None if layer.epilogue.bias => Err(DeviceError::WrongSize { what: "the bias", expected: k, found: 0 }),
            None => Ok(()),
        }
    }

    fn check_owner(&self, owner: &Arc<DeviceInfo>) -> Result<(), DeviceError> {
        if Arc::ptr_eq(owner, &self.info) {
            return Ok(());
        }
        Err(DeviceError::ForeignBuffer { owner: owner.id.clone(), device: self.info.id.clone() })
    }

    fn check(&self, what: &'static str, buffer: &Buffer, expected: usize, element: Element) -> Result<(), DeviceError> {
        self.check_owner(&buffer.owner)?;
        if buffer.elements != expected {
            return Err(DeviceError::WrongSize { what, expected, found: buffer.elements });
        }
        if buffer.element != element {
            return Err(DeviceError::WrongElement { what, expected: element, found: buffer.element });
        }
        Ok(())
    }

    /// Seconds of what `work` queues, by the device's own clock; `None`, and nothing done, where it has none.
    pub(crate) fn device_seconds(&self, work: &mut Queueing<'_>) -> Option<Result<f64, DeviceError>> {
        // A rasteriser on the processor stamps its queries when it likes: lavapipe's say that 576 × 576 weights take a fifth of a
        // millisecond for 16 rows and 13 ms for 256.
        if self.info.software { None } else { self.backend.device_seconds(work) }
    }

    /// The same device, sharing every buffer, with what tuning chose.
    #[must_use]
    pub fn tuned(&self, blueprints: &Blueprints) -> Self {
        Self { info: self.info.clone(), backend: self.backend.tuned(blueprints), place: self.place.clone() }
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
