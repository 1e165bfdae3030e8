//! NVIDIA's GPUs through cubecl's CUDA runtime.

use std::panic::catch_unwind;

use cubecl::Runtime;
use cubecl::cuda::{CudaDevice, CudaRuntime};
use flora_runtime::{BackendKind, Device, DeviceError, DeviceInfo};

use super::start::start;
use flora_runtime::Found;

/// The device on the client that cubecl, and what is built on it, uses for `device`: buffers are shared.
///
/// # Errors
/// It doesn't start.
pub fn on_cuda(device: &CudaDevice) -> Result<Device, DeviceError> {
    // Where the driver's list hasn't it (the default device is a client of its own), it is named after the runtime.
    let listed = listed().into_iter().find(|(_, other)| other == device);
    let info = listed.map_or_else(|| info(device.index, "CUDA".to_owned(), String::new()), |(info, _)| info);
    start::<CudaRuntime>(info, device)
}

/// The devices that may be started.
pub(super) fn found() -> Vec<Found> {
    let found =
        |(info, device): (DeviceInfo, CudaDevice)| Found::new(info, move |info| start::<CudaRuntime>(info, &device));
    listed().into_iter().map(found).collect()
}

fn info(index: usize, name: String, driver: String) -> DeviceInfo {
    DeviceInfo::unstarted(format!("cuda:{index}"), name, BackendKind::Cuda, driver, false)
}

/// The driver's own list. Needs the driver, NVRTC and the CUDA headers, all of which cubecl takes for granted once asked.
fn listed() -> Vec<(DeviceInfo, CudaDevice)> {
    // SAFETY: both only try to load the vendor's libraries.
    let present = unsafe { cudarc::driver::sys::is_culib_present() && cudarc::nvrtc::sys::is_culib_present() };
    if !present || !cubecl::cuda::install::cuda_path().is_some_and(|path| path.join("include").is_dir()) {
        return Vec::new();
    }
    let count = catch_unwind(|| CudaRuntime::enumerate_devices(0, &()).len()).unwrap_or(0);
    (0..count)
        .filter_map(|index| {
            let (name, driver) = catch_unwind(|| describe_cuda(index)).ok()?.ok()?;
            Some((info(index, name, driver), CudaDevice::new(index)))
        })
        .collect()
}

/// The card's name and the driver's version, which a tuning file is bound to.
fn describe_cuda(index: usize) -> Result<(String, String), cudarc::driver::DriverError> {
    use cudarc::driver::{result, sys};
    result::init()?;
    let name = result::device::get_name(result::device::get(index as i32)?)?;
    let mut version = 0;
    // SAFETY: the driver writes one integer.
    unsafe { sys::cuDriverGetVersion(&mut version) }.result()?;
    Ok((name, format!("CUDA driver {}.{}", version / 1000, version % 1000 / 10)))
}
