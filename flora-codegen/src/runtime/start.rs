//! Starts a device on its client, and tries it out: cubecl panics on a missing driver, and keeps silent about kernels that don't
//! compile.

use std::panic::{AssertUnwindSafe, catch_unwind};

use cubecl::Runtime;
use cubecl::prelude::ComputeClient;
use flora_plan::batch::{AdapterSlots, Segment, VirtualRowSlots};
use flora_plan::layer::{Epilogue, LayerFormat, LayerShape, WeightFormat};
use flora_plan::plan::Plan;
use flora_plan::schedule::schedule;
use flora_plan::weight::PackedWeight;
use flora_runtime::{Device, DeviceError, DeviceInfo, LayerOperands, PoolBuffer};

use super::backend::CubeBackend;

pub(crate) fn start<R: Runtime>(info: DeviceInfo, device: &R::Device) -> Result<Device, DeviceError> {
    let client = catch_unwind(AssertUnwindSafe(|| R::client(device))).map_err(|panic| {
        let words = panic.downcast_ref::<String>().map(String::as_str);
        let reason =
            words.or_else(|| panic.downcast_ref::<&str>().copied()).unwrap_or("its driver panicked").to_owned();
        DeviceError::Start { id: info.id.clone(), reason }
    })?;
    let info = with_features(info, &client);
    let device = Device::new(info, CubeBackend::new(client, device.clone()));
    try_out(&device).map_err(|reason| DeviceError::Start { id: device.info().id.clone(), reason })?;
    Ok(device)
}

/// Runs one small batch. A kernel that can't be compiled is no error of cubecl's: its result is whatever the memory held.
fn try_out(device: &Device) -> Result<(), String> {
    let adapters = [AdapterSlots {
        virtual_rows: vec![VirtualRowSlots { in_scale: None, out_scale: Some(0) }],
        ..AdapterSlots::base()
    }];
    let shape = LayerShape { d: 2, k: 1 };
    let schedule = schedule(&Plan::default(), shape, &[Segment { rows: 1, adapter: 0 }], &adapters, false);
    let schedule = schedule.map_err(|error| error.to_string())?;
    let weight =
        PackedWeight::from_f32(WeightFormat::default(), shape, &[3.0, 5.0]).map_err(|error| error.to_string())?;
    let run = || {
        let pools = (PoolBuffer::new(device.upload(&[0.0, 0.0])?, 1), PoolBuffer::new(device.upload(&[7.0])?, 1));
        let weight = device.upload_weight(&weight)?;
        let operands = LayerOperands::new(LayerFormat::default(), weight, None, pools, Epilogue::default())?;
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
