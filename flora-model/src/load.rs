//! A model on whatever device there is. The one place where decoders meet the backends that they are compiled for.

use std::sync::Arc;

#[cfg(feature = "cuda")]
use flora_burn::Cuda;
#[cfg(feature = "wgpu")]
use flora_burn::Wgpu;
use flora_burn::{BurnDevice, FloraBackend, Host};
use flora_checkpoint::Model;
use flora_engine::Decoder;
use flora_runtime::Device;

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
    #[cfg(feature = "cuda")]
    if let Some(target) = BurnDevice::<Cuda>::of(device) {
        return on(&target, model, options);
    }
    #[cfg(feature = "wgpu")]
    if let Some(target) = BurnDevice::<Wgpu>::of(device) {
        return on(&target, model, options);
    }
    let target = BurnDevice::<Host>::of(device);
    on(&target.ok_or_else(|| ServeError::OtherBackend(device.info().id.clone()))?, model, options)
}

fn on<B: FloraBackend>(
    target: &BurnDevice<B>,
    model: &Arc<Model>,
    options: &ServeOptions<'_>,
) -> Result<DeviceModel, ServeError> {
    Ok(Box::new(ServedModel::load(target, model, options)?))
}
