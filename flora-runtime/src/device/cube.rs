//! Devices of cubecl: one implementation for every runtime.

use std::sync::Arc;

use cubecl::prelude::*;
use cubecl::profile::TimingMethod;
use cubecl::server::Handle;
use flora_codegen::blueprints::{Blueprints, Tile};
use flora_codegen::launch::{LayerBuffers, Merged, Pool, copy, launch, merge};
use flora_codegen::layer::{Element, LayerFormat, WeightFormat};
use flora_codegen::routine::{Hardware, table};
use flora_codegen::schedule::{Materialised, Schedule};
use flora_codegen::weight::{PackedWeight, WeightValues};
use half::slice::HalfFloatSliceExt;
use half::{bf16, f16};

use super::{Backend, DeviceError, LayerOperands, PoolBuffer, Queueing, Storage, WeightBuffer, WeightStorage};

pub(super) struct CubeBackend<R: Runtime> {
    client: ComputeClient<R>,
    /// What routines ask of the device, read once.
    hardware: Hardware,
}

impl<R: Runtime> CubeBackend<R> {
    pub(super) fn new(client: ComputeClient<R>) -> Self {
        Self { hardware: Hardware::of(client.properties()), client }
    }
}

/// [`super::Device`] lets no other backend's storage through.
fn foreign() -> DeviceError {
    DeviceError::Execution("host memory was passed to a device".to_owned())
}

fn handle(storage: &Storage) -> Result<&Handle, DeviceError> {
    match storage {
        Storage::Device(handle) => Ok(handle),
        Storage::Host(_) => Err(foreign()),
    }
}

fn weight_handles(weight: &WeightBuffer) -> Result<(Handle, Option<Handle>), DeviceError> {
    match &weight.storage {
        WeightStorage::Device { values, scales } => Ok((values.clone(), scales.clone())),
        WeightStorage::Host(_) => Err(foreign()),
    }
}

fn pool(pool: &PoolBuffer) -> Result<Pool, DeviceError> {
    Ok(Pool { handle: handle(&pool.buffer.storage)?.clone(), slots: pool.slots })
}

fn buffers(layer: &LayerOperands) -> Result<LayerBuffers, DeviceError> {
    let (base_weight, weight_scales) = weight_handles(&layer.base_weight)?;
    let merged = |(adapter, weight): &(u32, WeightBuffer)| {
        Ok::<_, DeviceError>(Merged { adapter: *adapter, weight: weight_handles(weight)?.0 })
    };
    Ok(LayerBuffers {
        shape: layer.shape,
        format: layer.format,
        base_weight,
        weight_scales,
        bias: layer.bias.as_ref().map(|bias| handle(&bias.storage)).transpose()?.cloned(),
        in_pool: pool(&layer.in_pool)?,
        out_pool: pool(&layer.out_pool)?,
        epilogue: layer.epilogue,
        merged: layer.merged.as_ref().map(merged).transpose()?,
    })
}

impl<R: Runtime> CubeBackend<R> {
    /// No backend has buffers of no bytes, and halves are copied in pairs.
    fn bytes(&self, bytes: &[u8]) -> Handle {
        let mut padded = bytes.to_vec();
        padded.resize(bytes.len().max(1).next_multiple_of(4), 0);
        self.client.create_from_slice(&padded)
    }
}

impl<R: Runtime> Backend for CubeBackend<R> {
    fn upload(&self, values: &[f32], element: Element) -> Storage {
        Storage::Device(match element {
            Element::F32 => self.bytes(bytemuck::cast_slice(values)),
            Element::F16 => {
                let mut rounded = vec![f16::ZERO; values.len()];
                rounded.convert_from_f32_slice(values);
                self.bytes(bytemuck::cast_slice(&rounded))
            }
            Element::Bf16 => {
                let mut rounded = vec![bf16::ZERO; values.len()];
                rounded.convert_from_f32_slice(values);
                self.bytes(bytemuck::cast_slice(&rounded))
            }
        })
    }

    fn resized(&self, storage: &Storage, elements: usize, element: Element) -> Result<Storage, DeviceError> {
        let old = handle(storage)?;
        let kept = (old.size_in_used() / element.bytes()).min(elements as u64) as usize;
        let bytes = (elements as u64 * element.bytes()).max(1).next_multiple_of(4);
        let larger = self.client.empty(bytes as usize);
        // SAFETY: both buffers hold `kept` numbers.
        unsafe { copy(&self.client, element, old, &larger, 0, kept) }?;
        Ok(Storage::Device(larger))
    }

    fn write(&self, storage: &mut Storage, first: usize, values: &[f32], element: Element) -> Result<(), DeviceError> {
        let source = self.upload(values, element);
        // SAFETY: `Device::write` has checked that the buffer holds the numbers.
        Ok(unsafe { copy(&self.client, element, handle(&source)?, handle(storage)?, first, values.len()) }?)
    }

    fn upload_weight(&self, weight: &PackedWeight) -> WeightStorage {
        let values = self.bytes(match weight.values() {
            WeightValues::F32(values) => bytemuck::cast_slice(values),
            WeightValues::F16(values) => bytemuck::cast_slice(values),
            WeightValues::Bf16(values) => bytemuck::cast_slice(values),
            WeightValues::Words(words) => bytemuck::cast_slice(words),
        });
        let scales = weight.format().quantisation().map(|_| self.bytes(bytemuck::cast_slice(weight.scales())));
        WeightStorage::Device { values, scales }
    }

    fn read(&self, storage: &Storage, elements: usize, element: Element) -> Result<Vec<f32>, DeviceError> {
        let bytes = self.client.read_one(handle(storage)?.clone());
        let bytes = bytes.map_err(|error| DeviceError::Execution(error.to_string()))?;
        let mut values: Vec<f32> = match element {
            Element::F32 => bytemuck::pod_collect_to_vec(&bytes),
            Element::F16 => bytemuck::pod_collect_to_vec::<u8, f16>(&bytes).to_f32_vec(),
            Element::Bf16 => bytemuck::pod_collect_to_vec::<u8, bf16>(&bytes).to_f32_vec(),
        };
        values.truncate(elements);
        Ok(values)
    }

    fn execute(
        &self,
        layer: &LayerOperands,
        schedule: &Schedule,
        x: &Storage,
        residual: Option<&Storage>,
    ) -> Result<Storage, DeviceError> {
        let residual = residual.map(handle).transpose()?;
        // SAFETY: `Device::execute` has checked every buffer's owner, type and length.
        Ok(Storage::Device(unsafe {
            launch(&self.client, &self.hardware, &buffers(layer)?, schedule, handle(x)?, residual)
        }?))
    }

    fn merge(&self, layer: &LayerOperands, step: &Materialised) -> Result<WeightStorage, DeviceError> {
        // SAFETY: `Device::merge` has checked every buffer's owner, type and length, and the slots.
        let values = unsafe { merge(&self.client, &self.hardware, &buffers(layer)?, step) }?;
        Ok(WeightStorage::Device { values, scales: None })
    }

    fn merged_format(&self, format: LayerFormat) -> WeightFormat {
        WeightFormat::Float(format.activations)
    }

    fn device_seconds(&self, work: &mut Queueing<'_>) -> Option<Result<f64, DeviceError>> {
        if self.client.properties().timing_method != TimingMethod::Device {
            return None;
        }
        let failed = |error: &dyn std::fmt::Debug| DeviceError::Execution(format!("{error:?}"));
        Some(match self.client.profile(work, "timed batches") {
            Ok((queued, duration)) => {
                queued.map(|()| cubecl::future::block_on(duration.resolve()).duration().as_secs_f64())
            }
            Err(error) => Err(failed(&error)),
        })
    }

    fn tuned(&self, blueprints: &Blueprints) -> Arc<dyn Backend> {
        Arc::new(Self { client: self.client.clone(), hardware: self.hardware.tuned(blueprints) })
    }

    fn tiles(&self, format: LayerFormat) -> Vec<Tile> {
        table(self.hardware.multiply(format))
    }

    fn synchronize(&self) -> Result<(), DeviceError> {
        cubecl::future::block_on(self.client.sync()).map_err(|error| DeviceError::Execution(error.to_string()))
    }
}
