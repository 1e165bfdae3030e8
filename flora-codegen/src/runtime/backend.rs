//! Devices of cubecl: one implementation for every runtime.

use std::any::Any;
use std::fmt;
use std::ops::Range;
use std::sync::Arc;

use cubecl::prelude::*;
use cubecl::profile::TimingMethod;
use cubecl::server::Handle;
use flora_plan::blueprints::{Blueprints, Tile};
use flora_plan::layer::{Element, LayerFormat, WeightFormat};
use flora_plan::schedule::{BackwardSchedule, Materialised, Schedule};
use flora_plan::weight::{PackedWeight, WeightValues};
use flora_runtime::backend::{Backend, Gradients, Queueing, Wanted};
use flora_runtime::decoding::{AttentionOperands, DecoderKernels, Norm};
use flora_runtime::{Buffer, Device, DeviceError, LayerOperands, PoolBuffer, Storage, WeightBuffer};
use half::slice::HalfFloatSliceExt;
use half::{bf16, f16};

use crate::launch::decoder::{self, AttentionHandles};
use crate::launch::{LaunchError, LayerBuffers, LowRankSums, Merged, Pool, backward, copy, launch, merge};
use crate::routine::{Hardware, table};

/// A device of one of cubecl's runtimes: what [`Device::place`] answers.
#[derive(Clone)]
pub struct CubePlace<R: Runtime> {
    /// As the runtime calls it.
    pub device: R::Device,
    client: ComputeClient<R>,
}

impl<R: Runtime> fmt::Debug for CubePlace<R> {
    fn fmt(&self, formatter: &mut fmt::Formatter<'_>) -> fmt::Result {
        formatter.debug_tuple("CubePlace").field(&self.device).finish()
    }
}

pub(crate) struct CubeBackend<R: Runtime> {
    place: CubePlace<R>,
    /// What routines ask of the device, read once.
    hardware: Hardware,
    sums: Arc<LowRankSums>,
}

/// Memory of a client.
struct CubeMemory(Handle);

/// A weight of a client's.
struct CubeWeight {
    values: Handle,
    scales: Option<Handle>,
}

impl<R: Runtime> CubeBackend<R> {
    pub(crate) fn new(client: ComputeClient<R>, device: R::Device) -> Self {
        let hardware = Hardware::of(client.properties());
        Self { hardware, place: CubePlace { device, client }, sums: Arc::default() }
    }
}

impl From<LaunchError> for DeviceError {
    fn from(error: LaunchError) -> Self {
        match error {
            LaunchError::Operands(error) => DeviceError::Operands(error),
            other => DeviceError::Refused(Box::new(other)),
        }
    }
}

/// What cubecl calls a flora device; `None` where it is another runtime's.
pub fn device_of<R: Runtime>(device: &Device) -> Option<&R::Device> {
    device.place::<CubePlace<R>>().map(|place| &place.device)
}

/// The memory of a buffer, which may have bytes after the numbers; `None` where it is no device's of cubecl.
pub fn handle_of(buffer: &Buffer) -> Option<&Handle> {
    buffer.memory::<CubeMemory>().map(|memory| &memory.0)
}

/// Numbers that are on the device already, in a buffer of `client`.
///
/// # Errors
/// A client that isn't the device's own; a handle of fewer bytes than that.
pub fn share<R: Runtime>(
    device: &Device,
    client: &ComputeClient<R>,
    handle: Handle,
    elements: usize,
    element: Element,
) -> Result<Buffer, DeviceError> {
    // Clients of one device share what describes it, and clients of two don't.
    let same = |place: &CubePlace<R>| std::ptr::eq(place.client.properties(), client.properties());
    if !device.place::<CubePlace<R>>().is_some_and(same) {
        return Err(DeviceError::ForeignMemory { element, device: device.info().id.clone() });
    }
    device.share(Storage::new(CubeMemory(handle)), elements, element)
}

/// [`Device`] lets no other backend's storage through.
fn foreign() -> DeviceError {
    DeviceError::Execution("another backend's memory was passed to a device".to_owned())
}

fn handle(storage: &Storage) -> Result<&Handle, DeviceError> {
    storage.get::<CubeMemory>().map(|memory| &memory.0).ok_or_else(foreign)
}

fn weight(weight: &WeightBuffer) -> Result<&CubeWeight, DeviceError> {
    weight.memory().ok_or_else(foreign)
}

fn pool(pool: &PoolBuffer) -> Result<Pool, DeviceError> {
    let memory = pool.memory::<CubeMemory>().ok_or_else(foreign)?;
    Ok(Pool { handle: memory.0.clone(), slots: pool.slots() })
}

fn buffers(layer: &LayerOperands) -> Result<LayerBuffers, DeviceError> {
    let base_weight = weight(layer.base_weight())?;
    let merged = layer.merged_adapter().zip(layer.merged_weight());
    let merged = merged
        .map(|(adapter, merged)| Ok::<_, DeviceError>(Merged { adapter, weight: weight(merged)?.values.clone() }));
    Ok(LayerBuffers {
        shape: layer.shape(),
        format: layer.format(),
        base_weight: base_weight.values.clone(),
        weight_scales: base_weight.scales.clone(),
        bias: layer.bias().map(|bias| handle_of(bias).cloned().ok_or_else(foreign)).transpose()?,
        in_pool: pool(layer.in_pool())?,
        out_pool: pool(layer.out_pool())?,
        epilogue: layer.epilogue(),
        merged: merged.transpose()?,
    })
}

impl<R: Runtime> CubeBackend<R> {
    /// No backend has buffers of no bytes, and halves are copied in pairs.
    fn bytes(&self, bytes: &[u8]) -> Handle {
        let mut padded = bytes.to_vec();
        padded.resize(bytes.len().max(1).next_multiple_of(4), 0);
        self.place.client.create_from_slice(&padded)
    }
}

impl<R: Runtime> Backend for CubeBackend<R> {
    fn upload(&self, values: &[f32], element: Element) -> Storage {
        Storage::new(CubeMemory(match element {
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
        }))
    }

    fn resized(&self, storage: &Storage, elements: usize, element: Element) -> Result<Storage, DeviceError> {
        let old = handle(storage)?;
        let kept = (old.size_in_used() / element.bytes()).min(elements as u64) as usize;
        let bytes = (elements as u64 * element.bytes()).max(1).next_multiple_of(4);
        let larger = self.place.client.empty(bytes as usize);
        // SAFETY: both buffers hold `kept` numbers.
        unsafe { copy(&self.place.client, element, old, &larger, 0, kept) }?;
        Ok(Storage::new(CubeMemory(larger)))
    }

    fn write(&self, storage: &mut Storage, first: usize, values: &[f32], element: Element) -> Result<(), DeviceError> {
        let source = self.upload(values, element);
        // SAFETY: `Device::write` has checked that the buffer holds the numbers.
        Ok(unsafe { copy(&self.place.client, element, handle(&source)?, handle(storage)?, first, values.len()) }?)
    }

    fn upload_weight(&self, weight: &PackedWeight) -> Storage {
        let values = self.bytes(match weight.values() {
            WeightValues::F32(values) => bytemuck::cast_slice(values),
            WeightValues::F16(values) => bytemuck::cast_slice(values),
            WeightValues::Bf16(values) => bytemuck::cast_slice(values),
            WeightValues::Words(words) => bytemuck::cast_slice(words),
        });
        let scales = weight.format().quantisation().map(|_| self.bytes(bytemuck::cast_slice(weight.scales())));
        Storage::new(CubeWeight { values, scales })
    }

    fn read(&self, storage: &Storage, parts: &[Range<usize>], element: Element) -> Result<Vec<f32>, DeviceError> {
        let bytes = self.place.client.read_one(handle(storage)?.clone());
        let bytes = bytes.map_err(|error| DeviceError::Execution(error.to_string()))?;
        let mut values: Vec<f32> = match element {
            Element::F32 => bytemuck::pod_collect_to_vec(&bytes),
            Element::F16 => bytemuck::pod_collect_to_vec::<u8, f16>(&bytes).to_f32_vec(),
            Element::Bf16 => bytemuck::pod_collect_to_vec::<u8, bf16>(&bytes).to_f32_vec(),
        };
        // Nearly always all of a buffer, which isn't copied again.
        if let [Range { start: 0, end }] = *parts {
            values.truncate(end);
            return Ok(values);
        }
        Ok(parts.iter().map(|part| &values[part.clone()]).collect::<Vec<_>>().concat())
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
        let y = unsafe {
            launch(&self.place.client, &self.hardware, &buffers(layer)?, &self.sums, schedule, handle(x)?, residual)
        };
        Ok(Storage::new(CubeMemory(y?)))
    }

    fn backward(
        &self,
        layer: &LayerOperands,
        schedule: &BackwardSchedule,
        x: &Storage,
        g: &Storage,
        wanted: Wanted,
    ) -> Option<Result<Gradients<Storage>, DeviceError>> {
        let queued = || {
            let rows = (handle(x)?, handle(g)?);
            let layer = buffers(layer)?;
            // SAFETY: `Device::backward` has checked every buffer's owner, type and length.
            let gradients =
                unsafe { backward(&self.place.client, &self.hardware, &layer, &self.sums, schedule, rows, wanted) }?;
            let storage = |handle: Handle| Storage::new(CubeMemory(handle));
            Ok(Gradients {
                input: gradients.input.map(storage),
                vectors: gradients.vectors.map(|both| both.map(storage)),
            })
        };
        Some(queued())
    }

    fn merge(&self, layer: &LayerOperands, step: &Materialised) -> Result<Storage, DeviceError> {
        // SAFETY: `Device::merge` has checked every buffer's owner, type and length, and the slots.
        let values = unsafe { merge(&self.place.client, &self.hardware, &buffers(layer)?, step) }?;
        Ok(Storage::new(CubeWeight { values, scales: None }))
    }

    fn merged_format(&self, format: LayerFormat) -> WeightFormat {
        WeightFormat::Float(format.activations)
    }

    fn device_seconds(&self, work: &mut Queueing<'_>) -> Option<Result<f64, DeviceError>> {
        if self.place.client.properties().timing_method != TimingMethod::Device {
            return None;
        }
        let failed = |error: &dyn std::fmt::Debug| DeviceError::Execution(format!("{error:?}"));
        Some(match self.place.client.profile(work, "timed batches") {
            Ok((queued, duration)) => {
                queued.map(|()| cubecl::future::block_on(duration.resolve()).duration().as_secs_f64())
            }
            Err(error) => Err(failed(&error)),
        })
    }

    fn decoder_kernels(&self) -> Option<&dyn DecoderKernels> {
        Some(self)
    }

    fn tuned(&self, blueprints: &Blueprints) -> Arc<dyn Backend> {
        let (place, sums) = (self.place.clone(), Arc::clone(&self.sums));
        Arc::new(Self { place, hardware: self.hardware.tuned(blueprints), sums })
    }

    fn tiles(&self, format: LayerFormat) -> Vec<Tile> {
        table(self.hardware.multiply(format))
    }

    fn capacity(&self, storage: &Storage, element: Element) -> Option<usize> {
        Some((handle(storage).ok()?.size_in_used() / element.bytes()) as usize)
    }

    fn place(&self) -> &dyn Any {
        &self.place
    }

    fn synchronize(&self) -> Result<(), DeviceError> {
        cubecl::future::block_on(self.place.client.sync()).map_err(|error| DeviceError::Execution(error.to_string()))
    }
}

impl<R: Runtime> DecoderKernels for CubeBackend<R> {
    fn normalise(
        &self,
        x: &Storage,
        shape: [usize; 2],
        Norm { gamma, beta, epsilon }: Norm<&Storage>,
        element: Element,
    ) -> Result<Storage, DeviceError> {
        let norm = Norm { gamma: handle(gamma)?, beta: beta.map(handle).transpose()?, epsilon };
        // SAFETY: `DecoderOperations` has checked every buffer's owner, type and length, here and below.
        let y = unsafe { decoder::normalise(&self.place.client, &self.hardware, handle(x)?, shape, norm, element) }?;
        Ok(Storage::new(CubeMemory(y)))
    }

    fn multiply(&self, [one, other]: [&Storage; 2], count: usize, element: Element) -> Result<Storage, DeviceError> {
        let factors = [handle(one)?, handle(other)?];
        // SAFETY: as above.
        let y = unsafe { decoder::multiply(&self.place.client, &self.hardware, factors, count, element) }?;
        Ok(Storage::new(CubeMemory(y)))
    }

    fn select(&self, x: &Storage, width: usize, rows: &[u32], element: Element) -> Result<Storage, DeviceError> {
        // SAFETY: as above; every row is one of x's.
        let y = unsafe { decoder::select(&self.place.client, &self.hardware, handle(x)?, width, rows, element) }?;
        Ok(Storage::new(CubeMemory(y)))
    }

    fn attend(&self, attention: &AttentionOperands<'_>) -> Result<Storage, DeviceError> {
        let AttentionOperands { queries, keys, values, rotary, pool, .. } = *attention;
        let handles = AttentionHandles {
            rows: [handle(queries.matrix)?, handle(keys.matrix)?, handle(values.matrix)?],
            rotary: rotary.map(handle).transpose()?,
            pool: handle(pool)?,
        };
        // SAFETY: as above; blocks are the pool's, and there are enough for every row.
        let y = unsafe { decoder::attend(&self.place.client, &self.hardware, attention, handles) }?;
        Ok(Storage::new(CubeMemory(y)))
    }
}
