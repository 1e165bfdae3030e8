//! Devices of cubecl: one implementation for every runtime.

use cubecl::prelude::*;
use cubecl::server::Handle;
use flora_codegen::launch::{LayerBuffers, Pool, launch};
use flora_codegen::schedule::Schedule;

use super::{Backend, Buffer, DeviceError, LayerOperands, PoolBuffer, Storage};

pub(super) struct CubeBackend<R: Runtime> {
    pub(super) client: ComputeClient<R>,
}

fn handle(buffer: &Buffer) -> Result<&Handle, DeviceError> {
    match &buffer.storage {
        Storage::Device(handle) => Ok(handle),
        Storage::Host(_) => Err(DeviceError::ForeignBuffer),
    }
}

fn pool(pool: &PoolBuffer) -> Result<Pool, DeviceError> {
    Ok(Pool { handle: handle(&pool.buffer)?.clone(), slots: pool.slots })
}

impl<R: Runtime> Backend for CubeBackend<R> {
    fn upload(&self, values: &[f32]) -> Buffer {
        // No backend has buffers of no bytes.
        let padding = [0.0f32];
        let stored = if values.is_empty() { &padding } else { values };
        let handle = self.client.create_from_slice(bytemuck::cast_slice(stored));
        Buffer { storage: Storage::Device(handle), elements: values.len() }
    }

    fn read(&self, buffer: &Buffer) -> Result<Vec<f32>, DeviceError> {
        let bytes = self.client.read_one(handle(buffer)?.clone());
        let bytes = bytes.map_err(|error| DeviceError::Execution(error.to_string()))?;
        let mut values: Vec<f32> = bytemuck::pod_collect_to_vec(&bytes);
        values.truncate(buffer.elements);
        Ok(values)
    }

    fn execute(&self, layer: &LayerOperands, schedule: &Schedule, x: &Buffer) -> Result<Buffer, DeviceError> {
        let buffers = LayerBuffers {
            shape: layer.shape,
            base_weight: handle(&layer.base_weight)?.clone(),
            bias: layer.bias.as_ref().map(handle).transpose()?.cloned(),
            in_pool: pool(&layer.in_pool)?,
            out_pool: pool(&layer.out_pool)?,
            epilogue: layer.epilogue,
        };
        let y = launch(&self.client, &buffers, schedule, handle(x)?)?;
        let elements = schedule.tokens as usize * layer.shape.k as usize;
        Ok(Buffer { storage: Storage::Device(y), elements })
    }

    fn synchronize(&self) -> Result<(), DeviceError> {
        cubecl::future::block_on(self.client.sync()).map_err(|error| DeviceError::Execution(error.to_string()))
    }
}
