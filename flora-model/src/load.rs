//! A model on whatever device there is. The one place where decoders meet the devices that they are compiled for.

#[cfg(feature = "burn")]
use flora_burn::{BurnDevice, FloraBackend};
use flora_checkpoint::Model;
use flora_engine::Decoder;
use flora_runtime::Device;

use crate::decoder::ServedModel;
use crate::error::ServeError;
use crate::host::HostOperations;
#[cfg(feature = "burn")]
use crate::on_burn::BurnOperations;
use crate::operations::Serving;
use crate::options::ServeOptions;
use crate::source::PreparedAdapter;

/// A model without its device's type.
pub type DeviceModel = Box<dyn Decoder<Prepared = PreparedAdapter, Error = ServeError> + Send>;

/// Puts a model on a device: natively on the host, by the Burn backend that shares its memory on any other.
///
/// # Errors
/// Files that aren't a decoder's, a device that can't hold it or that this build has no decoders for.
pub fn load(device: &Device, model: &Model, options: &ServeOptions<'_>) -> Result<DeviceModel, ServeError> {
    #[cfg(feature = "cuda")]
    if let Some(device) = BurnDevice::<flora_burn::Cuda>::of(device) {
        return load_on_burn(&device, model, options);
    }
    #[cfg(feature = "wgpu")]
    if let Some(device) = BurnDevice::<flora_burn::Wgpu>::of(device) {
        return load_on_burn(&device, model, options);
    }
    on::<HostOperations>(device, model, options)
}

/// Puts a model on a device, with the operations beside its projections on a Burn backend of the caller's choice.
///
/// # Errors
/// As [`load`].
#[cfg(feature = "burn")]
pub fn load_on_burn<B: FloraBackend>(
    device: &BurnDevice<B>,
    model: &Model,
    options: &ServeOptions<'_>,
) -> Result<DeviceModel, ServeError> {
    on::<BurnOperations<B>>(&device.flora, model, options)
}

fn on<O: Serving + 'static>(
    device: &Device,
    model: &Model,
    options: &ServeOptions<'_>,
) -> Result<DeviceModel, ServeError> {
    Ok(Box::new(ServedModel::<O>::load(device, model, options)?))
}
