//! Finds the devices of this machine without starting them: what a driver library lists, checked before cubecl, which panics
//! on a missing driver, is asked for a client.

use std::panic::{AssertUnwindSafe, catch_unwind};
use std::sync::Arc;

use cubecl::Runtime;
use cubecl::cuda::{CudaDevice, CudaRuntime};
use cubecl::prelude::ComputeClient;
use cubecl::wgpu::{AutoGraphicsApi, GraphicsApi, WgpuDevice, WgpuRuntime};
use flora_codegen::batch::{AdapterSlots, LowRankSlots, Segment, VirtualRowSlots};
use flora_codegen::layer::{Epilogue, LayerFormat, LayerShape, WeightFormat};
use flora_codegen::plan::Plan;
use flora_codegen::schedule::schedule;
use flora_codegen::weight::PackedWeight;

use super::cube::CubeBackend;
use super::{BackendKind, Device, DeviceError, DeviceInfo, LayerOperands, Place, PoolBuffer};

/// A device that may be started.
pub(super) struct Found {
    pub(super) info: DeviceInfo,
    place: Place,
}

/// All devices but the host, best first.
pub(super) fn all() -> Vec<Found> {
    cuda().into_iter().chain(wgpu()).collect()
}

impl Found {
    pub(super) fn start(self) -> Result<Device, DeviceError> {
        match &self.place {
            Place::Host => Ok(Device::host()),
            Place::Cuda(device) => start::<CudaRuntime>(self.info, device, self.place.clone()),
            Place::Wgpu(device) => start::<WgpuRuntime>(self.info, device, self.place.clone()),
        }
    }

    /// The one that cubecl calls `device`; where the driver's list hasn't it (the default device, which is a client of its own),
    /// it is named after the runtime.
    fn of_cuda(device: &CudaDevice) -> Self {
        let same = |found: &Found| matches!(&found.place, Place::Cuda(other) if other == device);
        cuda().into_iter().find(same).unwrap_or_else(|| {
            let info =
                unstarted(format!("cuda:{}", device.index), "CUDA".to_owned(), BackendKind::Cuda, String::new(), false);
            Found { info, place: Place::Cuda(device.clone()) }
        })
    }

    fn of_wgpu(device: &WgpuDevice) -> Self {
        let same = |found: &Found| matches!(&found.place, Place::Wgpu(other) if other == device);
        wgpu().into_iter().find(same).unwrap_or_else(|| {
            let software = matches!(device, WgpuDevice::Cpu);
            let info =
                unstarted("wgpu:default".to_owned(), format!("{device:?}"), BackendKind::Wgpu, String::new(), software);
            Found { info, place: Place::Wgpu(device.clone()) }
        })
    }

    /// The info with the features, for which the device has to be started; without them when it doesn't start.
    pub(super) fn describe(self) -> DeviceInfo {
        let unstarted = self.info.clone();
        self.start().map_or(unstarted, |device| device.info().clone())
    }
}

impl Device {
    /// The device on the client that cubecl, and what is built on it, uses for `device`: buffers are shared.
    ///
    /// # Errors
    /// It doesn't start.
    pub fn on_cuda(device: &CudaDevice) -> Result<Self, DeviceError> {
        Found::of_cuda(device).start()
    }

    /// As [`Self::on_cuda`], of wgpu's.
    ///
    /// # Errors
    /// It doesn't start.
    pub fn on_wgpu(device: &WgpuDevice) -> Result<Self, DeviceError> {
        Found::of_wgpu(device).start()
    }
}

fn start<R: Runtime>(info: DeviceInfo, device: &R::Device, place: Place) -> Result<Device, DeviceError> {
    let client = catch_unwind(AssertUnwindSafe(|| R::client(device))).map_err(|panic| {
        let words = panic.downcast_ref::<String>().map(String::as_str);
        let reason =
            words.or_else(|| panic.downcast_ref::<&str>().copied()).unwrap_or("its driver panicked").to_owned();
        DeviceError::Start { id: info.id.clone(), reason }
    })?;
    let info = with_features(info, &client);
    let device = Device { info: Arc::new(info), backend: Arc::new(CubeBackend::new(client)), place };
    try_out(&device).map_err(|reason| DeviceError::Start { id: device.info.id.clone(), reason })?;
    Ok(device)
}

/// Runs one small batch. A kernel that can't be compiled is no error of cubecl's: its result is whatever the memory held.
fn try_out(device: &Device) -> Result<(), String> {
    let adapters = [AdapterSlots {
        virtual_rows: vec![VirtualRowSlots { in_scale: None, out_scale: Some(0) }],
        low_rank: LowRankSlots::default(),
    }];
    let shape = LayerShape { d: 2, k: 1 };
    let schedule = schedule(&Plan::default(), shape, &[Segment { rows: 1, adapter: 0 }], &adapters, false);
    let schedule = schedule.map_err(|error| error.to_string())?;
    let weight =
        PackedWeight::from_f32(WeightFormat::default(), shape, &[3.0, 5.0]).map_err(|error| error.to_string())?;
    let run = || {
        let operands = LayerOperands {
            shape,
            format: LayerFormat::default(),
            base_weight: device.upload_weight(&weight)?,
            bias: None,
            in_pool: PoolBuffer { buffer: device.upload(&[0.0, 0.0])?, slots: 1 },
            out_pool: PoolBuffer { buffer: device.upload(&[7.0])?, slots: 1 },
            epilogue: Epilogue::default(),
            merged: None,
        };
        device.read(&device.execute(&operands, &schedule, &device.upload(&[11.0, 13.0])?, None)?)
    };
    let y = run().map_err(|error: DeviceError| error.to_string())?;
    let expected = (11.0 * 3.0 + 13.0 * 5.0) * 7.0;
    match y[..] {
        [found] if found == expected => Ok(()),
        _ => Err(format!("a first kernel gave {y:?} instead of [{expected}]; is its compiler installed?")),
    }
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
        .filter(|(_, kind)| properties.type_usage(ElemType::Float(*kind).into()).contains(TypeUsage::Buffer))
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

/// The driver's own list. Needs the driver, NVRTC and the CUDA headers, all of which cubecl takes for granted once asked.
fn cuda() -> Vec<Found> {
    // SAFETY: both only try to load the vendor's libraries.
    let present = unsafe { cudarc::driver::sys::is_culib_present() && cudarc::nvrtc::sys::is_culib_present() };
    if !present || !cubecl::cuda::install::cuda_path().is_some_and(|path| path.join("include").is_dir()) {
        return Vec::new();
    }
    let count = catch_unwind(|| CudaRuntime::enumerate_devices(0, &()).len()).unwrap_or(0);
    (0..count)
        .filter_map(|index| {
            let (name, driver) = catch_unwind(|| describe_cuda(index)).ok()?.ok()?;
            let info = unstarted(format!("cuda:{index}"), name, BackendKind::Cuda, driver, false);
            Some(Found { info, place: Place::Cuda(CudaDevice::new(index)) })
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

/// Adapters of the graphics interface that cubecl uses here, GPUs before software.
fn wgpu() -> Vec<Found> {
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
        .map(|(index, (adapter, device))| Found {
            info: unstarted(
                format!("wgpu:{index}"),
                adapter.name,
                BackendKind::Wgpu,
                format!("{} {}", adapter.driver, adapter.driver_info).trim().to_owned(),
                adapter.device_type == wgpu::DeviceType::Cpu,
            ),
            place: Place::Wgpu(device),
        })
        .collect()
}
