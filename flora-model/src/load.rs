//! A model on whatever device there is. The one place where decoders meet the backends that they are compiled for.

use std::sync::Arc;

use flora_burn::{Cuda, FloraBackend, Host, Target, Wgpu};
use flora_checkpoint::Model;
use flora_engine::Decoder;
use flora_runtime::{Device, Place};

use crate::decoder::ServedModel;
use crate::error::ServeError;
use crate::options::ServeOptions;
use crate::source::PreparedAdapter;

/// A model without its backend's type.
pub type DeviceModel = Box<dyn Decoder<Prepared = PreparedAdapter, Error = ServeError> + Send>;

/// Puts a model on a device, by the Burn backend that shares the device's memory.
///
/// # Errors
/// As [`ServedModel::load`].
pub fn load(device: &Device, model: &Arc<Model>, options: &ServeOptions<'_>) -> Result<DeviceModel, ServeError> {
    match device.place() {
        Place::Host => on::<Host>(device, model, options),
        Place::Wgpu(_) => on::<Wgpu>(device, model, options),
        Place::Cuda(_) => on::<Cuda>(device, model, options),
    }
}

fn on<B: FloraBackend>(
    device: &Device,
    model: &Arc<Model>,
    options: &ServeOptions<'_>,
) -> Result<DeviceModel, ServeError> {
    let target = Target::<B>::of(device).ok_or_else(|| ServeError::OtherBackend(device.info().id.clone()))?;
    Ok(Box::new(ServedModel::load(&target, model, options)?))
}
