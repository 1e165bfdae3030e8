//! Devices of cubecl: one implementation for every runtime.

use cubecl::prelude::*;
use cubecl::server::Handle;
use flora_codegen::launch::{LayerBuffers, Pool, launch};
use flora_codegen::schedule::Schedule;

use super::{Backend, DeviceError, LayerOperands, PoolBuffer, Storage};

pub(super) struct CubeBackend<R: Runtime> {
    pub(super) client: ComputeClient<R>,
}

/// [`super::Device`] lets no other backend's storage through.
fn handle(storage: &Storage) -> Result<&Handle, DeviceError> {
    match storage {
        Storage::Device(handle) => Ok(handle),
        Storage::Host(_) => Err(DeviceError::Execution("host memory was passed to a device".to_owned())),
    }
}

fn pool(pool: &PoolBuffer) -> Result<Pool, DeviceError> {
    Ok(Pool { handle: handle(&pool.buffer.storage)?.clone(), slots: pool.slots })
}

impl<R: Runtime> Backend for CubeBackend<R> {
    fn upload(&self, values: &[f32]) -> Storage {
        // No backend has buffers of no bytes.
        let padding = [0.0f32];
        let stored = if values.is_empty() { &padding } else { values };
        Storage::Device(self.client.create_from_slice(bytemuck::cast_slice(stored)))
    }

    fn read(&self, storage: &Storage, elements: usize) -> Result<Vec<f32>, DeviceError> {
        let bytes = self.client.read_one(handle(storage)?.clone());
        let bytes = bytes.map_err(|error| DeviceError::Execution(error.to_string()))?;
        let mut values: Vec<f32> = bytemuck::pod_collect_to_vec(&bytes);
        values.truncate(elements);
        Ok(values)
    }

    fn execute(&self, layer: &LayerOperands, schedule: &Schedule, x: &Storage) -> Result<Storage, DeviceError> {
        let buffers = LayerBuffers {
            shape: layer.shape,
            base_weight: handle(&layer.base_weight.storage)?.clone(),
            bias: layer.bias.as_ref().map(|bias| handle(&bias.storage)).transpose()?.cloned(),
            in_pool: pool(&layer.in_pool)?,
            out_pool: pool(&layer.out_pool)?,
            epilogue: layer.epilogue,
        };
        // SAFETY: `Device::execute` has checked every buffer's owner and length.
        Ok(Storage::Device(unsafe { launch(&self.client, &buffers, schedule, handle(x)?) }?))
    }

    fn synchronize(&self) -> Result<(), DeviceError> {
        cubecl::future::block_on(self.client.sync()).map_err(|error| DeviceError::Execution(error.to_string()))
    }
}
