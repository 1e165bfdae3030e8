//! A model on whatever device there is.

use flora_checkpoint::Model;
use flora_engine::Decoder;
use flora_runtime::Device;

use crate::decoder::ServedModel;
use crate::error::ServeError;
use crate::host::HostOperations;
use crate::on_device::DeviceOperations;
use crate::operations::Serving;
use crate::options::ServeOptions;
use crate::source::PreparedAdapter;

/// A model without its device's type.
pub type DeviceModel = Box<dyn Decoder<Prepared = PreparedAdapter, Error = ServeError> + Send>;

/// Puts a model on a device: by the kernels that it has for what is between projections, or by the host's engine.
///
/// # Errors
/// Files that aren't a decoder's, a device that can't hold it or has no such kernels.
pub fn load(device: &Device, model: &Model, options: &ServeOptions<'_>) -> Result<DeviceModel, ServeError> {
    match device.decoder_operations() {
        Some(_) => on::<DeviceOperations>(device, model, options),
        None => on::<HostOperations>(device, model, options),
    }
}

fn on<O: Serving + 'static>(
    device: &Device,
    model: &Model,
    options: &ServeOptions<'_>,
) -> Result<DeviceModel, ServeError> {
    Ok(Box::new(ServedModel::<O>::load(device, model, options)?))
}
