//! Flex, Burn's backend of the processor: its tensors and the host's buffers pass each other their memory.

use std::sync::Arc;

use burn::tensor::{Bytes, Shape};
use burn_flex::{Flex, FlexDevice, FlexTensor, Layout};
use flora_host::{HostPlace, OwnedValues};
use flora_runtime::{Buffer, Device, DeviceError};

use crate::backend::{FloraBackend, TensorError, dtype, element, fits};

/// A contiguous tensor whose bytes are a buffer's.
struct Lent(FlexTensor);

impl AsRef<[u8]> for Lent {
    fn as_ref(&self) -> &[u8] {
        self.0.bytes()
    }
}

impl FloraBackend for Flex {
    fn open(_device: &FlexDevice) -> Result<Device, DeviceError> {
        Ok(flora_host::device())
    }

    fn device(device: &Device) -> Option<FlexDevice> {
        device.place::<HostPlace>().map(|_| FlexDevice)
    }

    fn buffer(device: &Device, tensor: FlexTensor) -> Result<Buffer, TensorError> {
        let element = element(tensor.dtype())?;
        Ok(flora_host::lend(device, Arc::new(Lent(tensor.to_contiguous())), element)?)
    }

    fn tensor(_device: &FlexDevice, buffer: Buffer, shape: Shape) -> Result<FlexTensor, TensorError> {
        fits(&buffer, &shape)?;
        let dtype = dtype(buffer.element());
        let bytes = match flora_host::into_values(buffer)? {
            OwnedValues::F32(values) => Bytes::from_elems(values),
            OwnedValues::F16(values) => Bytes::from_elems(values),
            OwnedValues::Bf16(values) => Bytes::from_elems(values),
        };
        Ok(FlexTensor::new(bytes, Layout::contiguous(shape), dtype))
    }
}
