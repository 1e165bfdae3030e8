//! Flex, Burn's backend of the processor: its tensors and the host's buffers pass each other their memory.

use std::sync::Arc;

use burn::tensor::{Bytes, DType, Element as Scalar, Shape, TensorMetadata, bf16, f16};
use burn_flex::{Flex, FlexDevice, FlexTensor, Layout};
use bytemuck::Pod;
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
    const CONCURRENT: bool = true;
    const COPIES_PARTS: bool = true;

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

    // Flex's own assignment holds its operand twice, and so copies it whole for every token.
    fn write_tokens(held: FlexTensor, new: FlexTensor, at: usize) -> FlexTensor {
        let mut written = held.to_contiguous();
        drop(held);
        let new = new.to_contiguous();
        match written.dtype() {
            DType::F16 => write_heads::<f16>(&mut written, &new, at),
            DType::BF16 => write_heads::<bf16>(&mut written, &new, at),
            DType::F64 => write_heads::<f64>(&mut written, &new, at),
            _ => write_heads::<f32>(&mut written, &new, at),
        }
        written
    }
}

/// [`FloraBackend::write_tokens`] of contiguous tensors.
fn write_heads<E: Scalar + Pod>(held: &mut FlexTensor, new: &FlexTensor, at: usize) {
    let [_, _, capacity, size] = held.shape().dims();
    let [_, _, tokens, _] = new.shape().dims();
    let from = new.storage::<E>();
    let heads = held.storage_mut::<E>().chunks_exact_mut((capacity * size).max(1));
    for (held, new) in heads.zip(from.chunks_exact((tokens * size).max(1))) {
        held[at * size..][..new.len()].copy_from_slice(new);
    }
}
