//! Which Burn backends flora's layers run on, and how a tensor becomes a buffer and back.

use burn::tensor::backend::Backend;
use burn::tensor::ops::FloatTensor;
use burn::tensor::{DType, Shape, Tensor, TensorPrimitive};
use flora_plan::layer::Element;
use flora_runtime::{Buffer, Device, DeviceError};

/// A Burn backend whose float tensors are buffers of a flora device. A model on any other backend doesn't compile.
///
/// Burn's fusion wrapper is none of them: its tensors may be operations that haven't run yet.
pub trait FloraBackend: Backend {
    /// The flora device with the same memory and queue as a device of Burn's.
    ///
    /// # Errors
    /// It doesn't start.
    fn open(device: &Self::Device) -> Result<Device, DeviceError>;

    /// What Burn calls a flora device; `None` where it is another backend's.
    fn device(device: &Device) -> Option<Self::Device>;

    /// The tensor's numbers in row-major order: its own memory where it is contiguous, else a copy.
    ///
    /// # Errors
    /// Memory of another device, a type that layers don't have.
    fn buffer(device: &Device, tensor: FloatTensor<Self>) -> Result<Buffer, TensorError>;

    /// The numbers of a buffer as a tensor, in the same memory; on the host a copy where something else has the buffer too.
    ///
    /// # Errors
    /// A buffer of another device, or of another number of elements than the shape.
    fn tensor(device: &Self::Device, buffer: Buffer, shape: Shape) -> Result<FloatTensor<Self>, TensorError>;
}

/// Why a tensor can't be a buffer, or a buffer no tensor.
#[derive(Debug, thiserror::Error)]
#[non_exhaustive]
pub enum TensorError {
    /// A type that layers don't have.
    #[error("a tensor of {0:?} was passed; layers take F32, F16 and BF16")]
    Type(DType),
    /// A buffer of another kind of device.
    #[error("a tensor lies on another device than the layer; make both on one")]
    OtherDevice,
    /// Another number of elements.
    #[error("a buffer of {found} numbers can't be a tensor of {wanted}")]
    Size {
        /// What the shape has.
        wanted: usize,
        /// What the buffer has.
        found: usize,
    },
    /// The device refuses.
    #[error(transparent)]
    Device(#[from] DeviceError),
}

/// One device under both of its names.
#[derive(Clone, Debug)]
pub struct BurnDevice<B: Backend> {
    /// As Burn calls it.
    pub burn: B::Device,
    /// As flora calls it.
    pub flora: Device,
}

impl<B: FloraBackend> BurnDevice<B> {
    /// Starts the device.
    ///
    /// # Errors
    /// It doesn't start.
    pub fn open(device: &B::Device) -> Result<Self, DeviceError> {
        Ok(Self { burn: device.clone(), flora: B::open(device)? })
    }

    /// A device that flora has started; `None` where it is another backend's.
    pub fn of(device: &Device) -> Option<Self> {
        Some(Self { burn: B::device(device)?, flora: device.clone() })
    }

    /// A tensor of these numbers `[rows, columns]`, rounded to `element`.
    ///
    /// # Errors
    /// Another number of them, a type that the device doesn't have.
    pub fn upload<const D: usize>(
        &self,
        values: &[f32],
        shape: [usize; D],
        element: Element,
    ) -> Result<Tensor<B, D>, TensorError> {
        let buffer = self.flora.upload_as(values, element)?;
        let tensor = B::tensor(&self.burn, buffer, Shape::from(shape))?;
        Ok(Tensor::from_primitive(TensorPrimitive::Float(tensor)))
    }
}

#[cfg(any(feature = "flex", feature = "cuda", feature = "wgpu"))]
pub(crate) fn element(dtype: DType) -> Result<Element, TensorError> {
    match dtype {
        DType::F32 | DType::Flex32 => Ok(Element::F32),
        DType::F16 => Ok(Element::F16),
        DType::BF16 => Ok(Element::Bf16),
        other => Err(TensorError::Type(other)),
    }
}

#[cfg(any(feature = "flex", feature = "cuda", feature = "wgpu"))]
pub(crate) fn dtype(element: Element) -> DType {
    match element {
        Element::F32 => DType::F32,
        Element::F16 => DType::F16,
        Element::Bf16 => DType::BF16,
    }
}

#[cfg(any(feature = "flex", feature = "cuda", feature = "wgpu"))]
pub(crate) fn fits(buffer: &Buffer, shape: &Shape) -> Result<(), TensorError> {
    let (wanted, found) = (shape.num_elements(), buffer.len());
    if wanted == found { Ok(()) } else { Err(TensorError::Size { wanted, found }) }
}
