//! The devices of this machine that this build of flora has code for. The one place that knows which kinds there are: everything
//! above it takes a [`Device`], and the crates below it know one kind each.
//!
//! The host is always there. The features `cuda` and `wgpu` bring GPUs, `emulate` CUDA cards that the processor plays. [`unsupported`] names those that are here and that this
//! build has no code for.

mod seen;

use flora_runtime::{Device, DeviceError, DeviceInfo, Found};
pub use seen::{Unsupported, unsupported};

/// Kinds of devices beside the host, the feature that brings each, and whether this build has it.
const KINDS: [(&str, &str, bool); 3] = [
    ("cuda", "cuda", cfg!(feature = "cuda")),
    ("wgpu", "wgpu", cfg!(feature = "wgpu")),
    ("cuda-emulated", "emulate", cfg!(feature = "emulate")),
];

/// This machine's processor.
pub fn host() -> Device {
    flora_host::device()
}

/// The best device here: CUDA, else a GPU through wgpu, else the host. Software that plays a GPU is never chosen.
pub fn auto() -> Device {
    let hardware = found().into_iter().filter(|found| !found.info().software);
    hardware.map(Found::start).find_map(Result::ok).unwrap_or_else(host)
}

/// The device with this id (see [`list`]); `cuda`, `wgpu` and `cuda-emulated` stand for the first of their kind, `auto` for the best.
///
/// # Errors
/// There is none, it doesn't start, or this build has no code for its kind.
pub fn open(id: &str) -> Result<Device, DeviceError> {
    match id {
        "auto" => return Ok(auto()),
        "host" => return Ok(host()),
        _ => {}
    }
    let kind = id.split(':').next().unwrap_or(id);
    for (name, feature, built) in KINDS {
        if kind == name && !built {
            return Err(DeviceError::NotBuilt { wanted: id.to_owned(), feature });
        }
    }
    let mut found = found();
    let matches = |found: &Found| found.info().id == id || found.info().id.split(':').next() == Some(id);
    match found.iter().position(matches) {
        Some(position) => found.swap_remove(position).start(),
        None => {
            let ids = found.iter().map(|found| found.info().id.as_str());
            let available = std::iter::once("host").chain(ids).collect::<Vec<_>>().join(", ");
            Err(DeviceError::Unknown { wanted: id.to_owned(), available })
        }
    }
}

/// Every device here, the host last; without the features of those that don't start.
pub fn list() -> Vec<DeviceInfo> {
    let describe = |found: Found| {
        let unstarted = found.info().clone();
        found.start().map_or(unstarted, |device| device.info().clone())
    };
    found().into_iter().map(describe).chain([flora_host::describe()]).collect()
}

/// GPUs, best first.
#[cfg(any(feature = "cuda", feature = "wgpu", feature = "emulate"))]
fn found() -> Vec<Found> {
    flora_codegen::runtime::found()
}

/// No GPU: this build has no code for any.
#[cfg(not(any(feature = "cuda", feature = "wgpu", feature = "emulate")))]
fn found() -> Vec<Found> {
    Vec::new()
}
