//! Finds the devices of this machine without starting them: what a driver library lists, checked before cubecl, which panics
//! on a missing driver, is asked for a client.

use std::panic::{AssertUnwindSafe, catch_unwind};
use std::sync::Arc;

use cubecl::Runtime;
use cubecl::cuda::{CudaDevice, CudaRuntime};
use cubecl::prelude::ComputeClient;
use cubecl::wgpu::{AutoGraphicsApi, GraphicsApi, WgpuDevice, WgpuRuntime};

use super::cube::CubeBackend;
use super::{BackendKind, Device, DeviceError, DeviceInfo};

enum Kind {
    Cuda(CudaDevice),
    Wgpu(WgpuDevice),
}

/// A device that may be started.
pub(super) struct Found {
    pub(super) info: DeviceInfo,
    kind: Kind,
}

/// All devices but the host, best first.
pub(super) fn all() -> Vec<Found> {
    cuda().into_iter().chain(wgpu()).collect()
}

impl Found {
    pub(super) fn start(self) -> Result<Device, DeviceError> {
        match self.kind {
            Kind::Cuda(device) => start::<CudaRuntime>(self.info, &device),
            Kind::Wgpu(device) => start::<WgpuRuntime>(self.info, &device),
        }
    }

    /// The info with the features, for which the device has to be started; without them when it doesn't start.
    pub(super) fn describe(self) -> DeviceInfo {
        let unstarted = self.info.clone();
        self.start().map_or(unstarted, |device| device.info().clone())
    }
}

fn start<R: Runtime>(info: DeviceInfo, device: &R::Device) -> Result<Device, DeviceError> {
    let client = catch_unwind(AssertUnwindSafe(|| R::client(device))).map_err(|panic| {
        let words = panic.downcast_ref::<String>().map(String::as_str);
        let reason = words.or_else(|| panic.downcast_ref::<&str>().copied()).unwrap_or("its driver panicked").to_owned();
        DeviceError::Start { id: info.id.clone(), reason }
    })?;
    let info = with_features(info, &client);
    Ok(Device { info: Arc::new(info), backend: Arc::new(CubeBackend { client }) })
}

fn with_features<R: Runtime>(mut info: DeviceInfo, client: &ComputeClient<R>) -> DeviceInfo {
    use cubecl::features::TypeUsage;
    use cubecl::ir::{ElemType, FloatKind};
    let properties = client.properties();
    info.plane_size = Some(properties.hardware.plane_size_max);
    info.shared_memory_bytes = Some(properties.hardware.max_shared_memory_size);
    info.largest_buffer_bytes = Some(properties.memory.max_page_size);
    let floats = [("f32", FloatKind::F32), ("f16", FloatKind::F16), ("bf16", FloatKind::BF16)];
    info.element_types = floats
        .into_iter()
        .filter(|(_, kind)| {
            properties.type_usage(ElemType::Float(*kind).into()).contains(TypeUsage::Buffer)
        })
        .map(|(name, _)| name.to_owned())
        .collect();
    let fragments = properties.features.matmul.cmma.iter();
    info.fragments = fragments
        .map(|fragment| {
            let (m, n, k) = (fragment.m, fragment.n, fragment.k);
            format!("{m}x{n}x{k} {}*{}->{}", fragment.a_type, fragment.b_type, fragment.cd_type)
        })
        .collect();
    info.fragments.sort();
    info
}

fn unstarted(id: String, name: String, backend: BackendKind, driver: String, software: bool) -> DeviceInfo {
    DeviceInfo {
        id,
        name,
        backend,
        driver,
        software,
        plane_size: None,
        shared_memory_bytes: None,
        largest_buffer_bytes: None,
        element_types: Vec::new(),
        fragments: Vec::new(),
    }
}

/// The driver's own list. Needs the driver, NVRTC and the CUDA headers, all of which cubecl loads when it compiles.
fn cuda() -> Vec<Found> {
    let libraries = if cfg!(windows) { ["nvcuda.dll"] } else { ["libcuda.so.1"] };
    // SAFETY: the driver's library has no initialisers that depend on this process.
    let present = libraries.iter().any(|library| unsafe { libloading::Library::new(library) }.is_ok());
    if !present || cubecl::cuda::install::cuda_path().is_none() {
        return Vec::new();
    }
    let listed = catch_unwind(|| CudaRuntime::enumerate_devices(0, &()));
    let devices = listed.unwrap_or_default();
    (0..devices.len())
        .map(|index| Found {
            info: unstarted(
                format!("cuda:{index}"),
                format!("CUDA device {index}"),
                BackendKind::Cuda,
                "cuda".to_owned(),
                false,
            ),
            kind: Kind::Cuda(CudaDevice::new(index)),
        })
        .collect()
}

/// Adapters of the graphics interface that cubecl uses here, GPUs before software.
fn wgpu() -> Vec<Found> {
    let adapters = catch_unwind(|| {
        let instance = wgpu::Instance::new(wgpu::InstanceDescriptor::new_without_display_handle());
        let adapters = cubecl::future::block_on(instance.enumerate_adapters(AutoGraphicsApi::backend().into()));
        adapters.into_iter().map(|adapter| adapter.get_info()).collect::<Vec<_>>()
    });
    let mut counts = [0usize; 3];
    let mut found: Vec<_> = adapters
        .unwrap_or_default()
        .into_iter()
        .filter_map(|info| {
            let mut next = |kind: usize| {
                counts[kind] += 1;
                counts[kind] - 1
            };
            let device = match info.device_type {
                wgpu::DeviceType::DiscreteGpu => WgpuDevice::DiscreteGpu(next(0)),
                wgpu::DeviceType::IntegratedGpu => WgpuDevice::IntegratedGpu(next(1)),
                wgpu::DeviceType::VirtualGpu => WgpuDevice::VirtualGpu(next(2)),
                wgpu::DeviceType::Cpu => WgpuDevice::Cpu,
                wgpu::DeviceType::Other => return None,
            };
            Some((info, device))
        })
        .collect();
    found.sort_by_key(|(info, _)| match info.device_type {
        wgpu::DeviceType::DiscreteGpu => 0,
        wgpu::DeviceType::IntegratedGpu => 1,
        wgpu::DeviceType::VirtualGpu => 2,
        _ => 3,
    });
    found
        .into_iter()
        .enumerate()
        .map(|(index, (adapter, device))| Found {
            info: unstarted(
                format!("wgpu:{index}"),
                adapter.name,
                BackendKind::Wgpu,
                format!("{} {}", adapter.driver, adapter.driver_info).trim().to_owned(),
                adapter.device_type == wgpu::DeviceType::Cpu,
            ),
            kind: Kind::Wgpu(device),
        })
        .collect()
}
