//! GPUs through cubecl's wgpu runtime: Vulkan, Metal, DirectX, WebGPU.

use std::panic::catch_unwind;

use cubecl::wgpu::{AutoGraphicsApi, GraphicsApi, WgpuDevice, WgpuRuntime};
use flora_runtime::{BackendKind, Device, DeviceError, DeviceInfo};

use super::start::start;
use flora_runtime::Found;

/// The device on the client that cubecl, and what is built on it, uses for `device`: buffers are shared.
///
/// # Errors
/// It doesn't start.
pub fn on_wgpu(device: &WgpuDevice) -> Result<Device, DeviceError> {
    let listed = listed().into_iter().find(|(_, other)| other == device);
    let info = listed.map(|(info, _)| info).unwrap_or_else(|| {
        let software = matches!(device, WgpuDevice::Cpu);
        let name = format!("{device:?}");
        DeviceInfo::unstarted("wgpu:default".to_owned(), name, BackendKind::Wgpu, String::new(), software)
    });
    start::<WgpuRuntime>(info, device)
}

/// The devices that may be started.
pub(super) fn found() -> Vec<Found> {
    let found =
        |(info, device): (DeviceInfo, WgpuDevice)| Found::new(info, move |info| start::<WgpuRuntime>(info, &device));
    listed().into_iter().map(found).collect()
}

/// Adapters of the graphics interface that cubecl uses here, GPUs before software.
fn listed() -> Vec<(DeviceInfo, WgpuDevice)> {
    let adapters = catch_unwind(|| {
        let instance = wgpu::Instance::new(wgpu::InstanceDescriptor::new_without_display_handle());
        let adapters = cubecl::future::block_on(instance.enumerate_adapters(AutoGraphicsApi::backend().into()));
        adapters.into_iter().map(|adapter| adapter.get_info()).collect::<Vec<_>>()
    });
    let mut counts = [0usize; 4];
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
                // cubecl reaches the first software adapter alone.
                wgpu::DeviceType::Cpu if next(3) == 0 => WgpuDevice::Cpu,
                wgpu::DeviceType::Cpu => return None,
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
        .map(|(index, (adapter, device))| {
            let driver = format!("{} {}", adapter.driver, adapter.driver_info).trim().to_owned();
            let software = adapter.device_type == wgpu::DeviceType::Cpu;
            let id = format!("wgpu:{index}");
            (DeviceInfo::unstarted(id, adapter.name, BackendKind::Wgpu, driver, software), device)
        })
        .collect()
}
