//! What a batch runs on. A device holds buffers and executes schedules; everything above it is the same for all of them.

mod cube;
mod find;
mod host;

use std::sync::Arc;

use cubecl::server::Handle;
use flora_codegen::batch::LayerShape;
use flora_codegen::kernels::Epilogue;
use flora_codegen::launch::{self, LaunchError};
use flora_codegen::schedule::Schedule;
use serde::Serialize;

/// Numbers on a device, f32. Cloning shares them.
#[derive(Clone, Debug)]
pub struct Buffer {
    storage: Storage,
    elements: usize,
    owner: Arc<DeviceInfo>,
}

/// Where the numbers are; which of the two is the backend's own affair.
#[derive(Clone, Debug)]
enum Storage {
    Host(Arc<Vec<f32>>),
    Device(Handle),
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
    /// `[d, k]`
    pub base_weight: Buffer,
    /// `[k]`
    pub bias: Option<Buffer>,
    /// `[slots, d]`
    pub in_pool: PoolBuffer,
    /// `[slots, k]`
    pub out_pool: PoolBuffer,
    /// Bias and activation.
    pub epilogue: Epilogue,
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

/// How a device does what [`Device`] offers. Implemented by the host and by every cubecl runtime.
/// [`Device`] has checked that all storage is the backend's own and as long as the layer and the schedule say.
trait Backend: Send + Sync {
    fn upload(&self, values: &[f32]) -> Storage;
    fn read(&self, storage: &Storage, elements: usize) -> Result<Vec<f32>, DeviceError>;
    fn execute(&self, layer: &LayerOperands, schedule: &Schedule, x: &Storage) -> Result<Storage, DeviceError>;
    fn synchronize(&self) -> Result<(), DeviceError>;
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
    /// The best device here: CUDA, else a GPU through wgpu, else the host. A software rasteriser is never chosen.
    pub fn auto() -> Self {
        let found = find::all().into_iter().filter(|found| !found.info.software);
        found.map(find::Found::start).find_map(Result::ok).unwrap_or_else(Self::host)
    }

    /// This machine's processor.
    pub fn host() -> Self {
        let (info, backend) = host::open();
        Self { info: Arc::new(info), backend: Arc::new(backend) }
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

    /// What it is.
    pub fn info(&self) -> &DeviceInfo {
        &self.info
    }

    /// Copies numbers to the device.
    ///
    /// # Errors
    /// More than it takes in one buffer.
    pub fn upload(&self, values: &[f32]) -> Result<Buffer, DeviceError> {
        let bytes = size_of_val(values) as u64;
        match self.info.largest_buffer_bytes {
            Some(limit) if bytes > limit => {
                Err(DeviceError::BufferTooLarge { bytes, limit, device: self.info.id.clone() })
            }
            _ => Ok(self.own(self.backend.upload(values), values.len())),
        }
    }

    fn own(&self, storage: Storage, elements: usize) -> Buffer {
        Buffer { storage, elements, owner: self.info.clone() }
    }

    /// Copies numbers back, after everything that was queued before.
    ///
    /// # Errors
    /// A buffer of another device; a launch before it failed.
    pub fn read(&self, buffer: &Buffer) -> Result<Vec<f32>, DeviceError> {
        self.check("the buffer", buffer, buffer.elements)?;
        self.backend.read(&buffer.storage, buffer.elements)
    }

    /// Queues a schedule; x `[tokens, d]`, the result `[tokens, k]`.
    ///
    /// # Errors
    /// Buffers of another device or of the wrong size, a launch that the device can't make. Failures of the kernels themselves
    /// show when the result is read.
    pub fn execute(&self, layer: &LayerOperands, schedule: &Schedule, x: &Buffer) -> Result<Buffer, DeviceError> {
        let (d, k, tokens) = (layer.shape.d as usize, layer.shape.k as usize, schedule.tokens() as usize);
        self.check("x", x, tokens * d)?;
        self.check("the base weight", &layer.base_weight, d * k)?;
        self.check("the in-vectors", &layer.in_pool.buffer, layer.in_pool.slots as usize * d)?;
        self.check("the out-vectors", &layer.out_pool.buffer, layer.out_pool.slots as usize * k)?;
        match &layer.bias {
            Some(bias) => self.check("the bias", bias, k)?,
            None if layer.epilogue.bias => {
                return Err(DeviceError::WrongSize { what: "the bias", expected: k, found: 0 });
            }
            None => {}
        }
        launch::check(schedule, layer.shape, layer.in_pool.slots, layer.out_pool.slots)?;
        let y = self.backend.execute(layer, schedule, &x.storage)?;
        Ok(self.own(y, tokens * k))
    }

    fn check(&self, what: &'static str, buffer: &Buffer, expected: usize) -> Result<(), DeviceError> {
        if !Arc::ptr_eq(&buffer.owner, &self.info) {
            let (owner, device) = (buffer.owner.id.clone(), self.info.id.clone());
            return Err(DeviceError::ForeignBuffer { owner, device });
        }
        if buffer.elements != expected {
            return Err(DeviceError::WrongSize { what, expected, found: buffer.elements });
        }
        Ok(())
    }

    /// Waits until everything queued is done.
    ///
    /// # Errors
    /// Some of it failed.
    pub fn synchronize(&self) -> Result<(), DeviceError> {
        self.backend.synchronize()
    }
}
