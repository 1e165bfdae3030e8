//! A card, by its primary context: the one that CUDA's runtime, and so PyTorch, has for it.

use std::fmt;
use std::ptr;
use std::sync::Arc;

use cudarc::driver::result::{self, device};
use cudarc::driver::sys::{self, CUdevice_attribute as Attribute};
use flora_codegen::target::Capability;

use crate::error::DriverError;

/// A stream of the caller's, as the driver (`CUstream`) and PyTorch (`torch.cuda.Stream.cuda_stream`) number it; 0 is the default one.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
pub struct Stream(pub usize);

impl Stream {
    pub(crate) fn raw(self) -> sys::CUstream {
        ptr::with_exposed_provenance_mut(self.0)
    }
}

/// A card's primary context, kept for as long as a clone of this lives.
#[derive(Clone)]
pub struct Card(Arc<Retained>);

struct Retained {
    device: sys::CUdevice,
    context: sys::CUcontext,
    name: String,
    /// Ten times the compute capability.
    version: u32,
    /// Of a block, in bytes.
    shared_memory: u32,
}

// SAFETY: a context may be used from any thread; it is made current wherever it is used.
unsafe impl Send for Retained {}
// SAFETY: as above, and the driver's calls may be made by several threads at once.
unsafe impl Sync for Retained {}

impl Drop for Retained {
    fn drop(&mut self) {
        // SAFETY: it was retained once, when this was made. At the end of a process the driver may be gone, which is no matter.
        let _ = unsafe { sys::cuDevicePrimaryCtxRelease_v2(self.device) };
    }
}

impl fmt::Debug for Card {
    fn fmt(&self, formatter: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(formatter, "Card({}, {})", self.0.device, self.0.name)
    }
}

/// Whether there is a driver to ask; the answer stays the same.
fn driver() -> Result<(), DriverError> {
    static PRESENT: std::sync::OnceLock<bool> = std::sync::OnceLock::new();
    // SAFETY: NVIDIA's own library, which is made to be loaded.
    if *PRESENT.get_or_init(|| unsafe { sys::is_culib_present() }) {
        return call("cuInit", || "the process".to_owned(), result::init());
    }
    let help = "it comes with NVIDIA's driver, so that this machine has no card or no driver for it";
    Err(DriverError::NoLibrary { library: "CUDA's driver", help })
}

impl Card {
    /// The card whose primary context is current on this thread.
    ///
    /// # Errors
    /// No driver, no context, or one that isn't the primary one.
    pub fn current() -> Result<Self, DriverError> {
        driver()?;
        let about = || "this thread".to_owned();
        let current = call("cuCtxGetCurrent", about, result::ctx::get_current())?.ok_or(DriverError::NoContext)?;
        let mut device = 0;
        // SAFETY: the driver writes one number.
        call("cuCtxGetDevice", about, unsafe { sys::cuCtxGetDevice(&mut device) }.result())?;
        let card = Self::retain(device)?;
        if card.0.context == current { Ok(card) } else { Err(DriverError::NotPrimary) }
    }

    /// The primary context of a card by its number, which is made where nobody has it yet.
    ///
    /// # Errors
    /// No driver, no such card, one that is too old.
    pub fn primary(ordinal: u32) -> Result<Self, DriverError> {
        driver()?;
        let count = call("cuDeviceGetCount", || "this machine".to_owned(), device::get_count())?;
        let count = u32::try_from(count).unwrap_or(0);
        let Some(own) = i32::try_from(ordinal).ok().filter(|_| ordinal < count) else {
            return Err(DriverError::NoCard { ordinal, count });
        };
        Self::retain(call("cuDeviceGet", || format!("card {ordinal}"), device::get(own))?)
    }

    fn retain(device: sys::CUdevice) -> Result<Self, DriverError> {
        let about = || format!("card {device}");
        let name = call("cuDeviceGetName", about, device::get_name(device))?;
        let attribute = |attribute| {
            // SAFETY: the driver gave the device.
            let value = unsafe { device::get_attribute(device, attribute) };
            call("cuDeviceGetAttribute", about, value).map(|value| u32::try_from(value).unwrap_or(0))
        };
        let major = attribute(Attribute::CU_DEVICE_ATTRIBUTE_COMPUTE_CAPABILITY_MAJOR)?;
        let minor = attribute(Attribute::CU_DEVICE_ATTRIBUTE_COMPUTE_CAPABILITY_MINOR)?;
        let shared_memory = attribute(Attribute::CU_DEVICE_ATTRIBUTE_MAX_SHARED_MEMORY_PER_BLOCK_OPTIN)?;
        let version = 10 * major + minor;
        if version < 80 {
            return Err(DriverError::TooOld { card: name, version });
        }
        // SAFETY: as above; what is retained is released when the last clone is dropped.
        let context = call("cuDevicePrimaryCtxRetain", about, unsafe { result::primary_ctx::retain(device) })?;
        Ok(Self(Arc::new(Retained { device, context, name, version, shared_memory })))
    }

    /// Its number.
    pub fn ordinal(&self) -> u32 {
        self.0.device.unsigned_abs()
    }

    /// The driver's name for it.
    pub fn name(&self) -> &str {
        &self.0.name
    }

    /// What kernels are emitted for it: the latest generation that isn't later than its own.
    pub fn capability(&self) -> Capability {
        match self.0.version {
            100.. => Capability::Sm100,
            90.. => Capability::Sm90,
            _ => Capability::Sm80,
        }
    }

    /// What NVRTC calls its architecture; of Hopper with the instructions of that generation alone, as a launch there uses.
    pub(crate) fn architecture(&self) -> String {
        match self.0.version {
            90 => "sm_90a".to_owned(),
            version => format!("sm_{version}"),
        }
    }

    pub(crate) fn shared_memory(&self) -> u32 {
        self.0.shared_memory
    }

    /// Makes the context current on this thread until what is returned is dropped.
    pub(crate) fn enter(&self) -> Result<Entered, DriverError> {
        let about = || format!("card {}", self.0.device);
        let before = call("cuCtxGetCurrent", about, result::ctx::get_current())?;
        if before == Some(self.0.context) {
            return Ok(Entered(None));
        }
        // SAFETY: it is retained.
        call("cuCtxSetCurrent", about, unsafe { result::ctx::set_current(self.0.context) })?;
        Ok(Entered(Some(before.unwrap_or(ptr::null_mut()))))
    }

    /// Whether a stream is of this context.
    ///
    /// # Errors
    /// It isn't, or the driver doesn't know it.
    pub(crate) fn owns(&self, stream: Stream) -> Result<(), DriverError> {
        let mut context = ptr::null_mut();
        // SAFETY: the caller's word that the stream is alive, if it isn't the default one; the driver writes one pointer.
        let status = unsafe { sys::cuStreamGetCtx(stream.raw(), &mut context) };
        call("cuStreamGetCtx", || format!("the stream {:#x}", stream.0), status.result())?;
        if context == self.0.context { Ok(()) } else { Err(DriverError::ForeignStream { ordinal: self.ordinal() }) }
    }
}

impl Card {
    /// Whether host memory may be copied behind what is on a stream now: it is of this context, and isn't captured.
    ///
    /// # Safety
    /// The stream is alive.
    ///
    /// # Errors
    /// It is another's, or captured.
    pub(crate) unsafe fn is_writable(&self, stream: Stream) -> Result<(), DriverError> {
        self.owns(stream)?;
        let about = || format!("the stream {:#x}", stream.0);
        // SAFETY: the caller's.
        match call("cuStreamIsCapturing", about, unsafe { result::stream::is_capturing(stream.raw()) })? {
            sys::CUstreamCaptureStatus::CU_STREAM_CAPTURE_STATUS_NONE => Ok(()),
            _ => Err(DriverError::Capturing),
        }
    }
}

/// A context that is current, in place of the one before.
pub(crate) struct Entered(Option<sys::CUcontext>);

impl Drop for Entered {
    fn drop(&mut self) {
        if let Some(before) = self.0 {
            // SAFETY: it was current on this thread, or is null, which makes none current.
            let _ = unsafe { result::ctx::set_current(before) };
        }
    }
}

/// A result of the driver's with what the call was for.
pub(crate) fn call<T>(
    call: &'static str,
    about: impl FnOnce() -> String,
    result: Result<T, result::DriverError>,
) -> Result<T, DriverError> {
    result.map_err(|error| DriverError::Call { call, about: about(), status: format!("{:?}", error.0) })
}
