//! Which Burn backends flora's layers run on, and how a tensor becomes a buffer and back.

use burn::tensor::backend::Backend;
use burn::tensor::ops::FloatTensor;
use burn::tensor::{DType, Element as Scalar, Shape, Slice, Tensor, TensorMetadata, TensorPrimitive, bf16, f16};
use burn_cubecl::element::BoolElement;
use burn_cubecl::kernel::into_contiguous;
use burn_cubecl::tensor::CubeTensor;
use burn_cubecl::{CubeBackend, CubeRuntime, FloatElement, IntElement};
use burn_flex::{Flex, FlexDevice, FlexTensor, Layout};
use bytemuck::Pod;
use cubecl::cuda::{CudaDevice, CudaRuntime};
use cubecl::wgpu::{WgpuDevice, WgpuRuntime};
use flora_codegen::layer::Element;
use flora_runtime::{Buffer, Device, DeviceError, Place};

/// A Burn backend whose float tensors are buffers of a flora device. A model on any other backend doesn't compile.
///
/// Burn's fusion wrapper is none of them: its tensors may be operations that haven't run yet.
pub trait FloraBackend: Backend {
    /// Whether several threads get further with work on independent tensors than one: so on the processor, where an operation is
    /// done when it returns, and not on a device, which has one queue.
    const CONCURRENT: bool;

    /// Whether attention copies keys and values that are a part of a tensor, where it reads a whole one in place.
    const COPIES_PARTS: bool;

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

    /// The numbers of a buffer as a tensor, in the same memory.
    ///
    /// # Errors
    /// A buffer of another device, or of another number of elements than the shape.
    fn tensor(device: &Self::Device, buffer: &Buffer, shape: Shape) -> Result<FloatTensor<Self>, TensorError>;

    /// Writes `new` `[1, heads, tokens, size]` over the tokens from `at` on of `held` `[1, heads, capacity, size]`, in the same
    /// memory where nothing else has it.
    ///
    /// # Panics
    /// As [`Tensor::slice_assign`] does, where those tokens are more than `held` has.
    fn write_tokens(held: FloatTensor<Self>, new: FloatTensor<Self>, at: usize) -> FloatTensor<Self> {
        let [one, heads, tokens, size] = new.shape().dims();
        let place = [0..one, 0..heads, at..at + tokens, 0..size].map(Slice::from);
        Self::float_slice_assign(held, &place, new)
    }
}

/// Why a tensor can't be a buffer, or a buffer no tensor.
#[derive(Debug, thiserror::Error)]
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
pub struct Target<B: Backend> {
    /// As Burn calls it.
    pub burn: B::Device,
    /// As flora calls it.
    pub flora: Device,
}

impl<B: FloraBackend> Target<B> {
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
        let tensor = B::tensor(&self.burn, &buffer, Shape::from(shape))?;
        Ok(Tensor::from_primitive(TensorPrimitive::Float(tensor)))
    }
}

fn element(dtype: DType) -> Result<Element, TensorError> {
    match dtype {
        DType::F32 | DType::Flex32 => Ok(Element::F32),
        DType::F16 => Ok(Element::F16),
        DType::BF16 => Ok(Element::Bf16),
        other => Err(TensorError::Type(other)),
    }
}

fn dtype(element: Element) -> DType {
    match element {
        Element::F32 => DType::F32,
        Element::F16 => DType::F16,
        Element::Bf16 => DType::BF16,
    }
}

fn fits(buffer: &Buffer, shape: &Shape) -> Result<(), TensorError> {
    let (wanted, found) = (shape.num_elements(), buffer.len());
    if wanted == found { Ok(()) } else { Err(TensorError::Size { wanted, found }) }
}

impl FloraBackend for Flex {
    const CONCURRENT: bool = true;
    const COPIES_PARTS: bool = true;

    fn open(_device: &FlexDevice) -> Result<Device, DeviceError> {
        Ok(Device::host())
    }

    fn device(device: &Device) -> Option<FlexDevice> {
        matches!(device.place(), Place::Host).then_some(FlexDevice)
    }

    fn buffer(device: &Device, tensor: FlexTensor) -> Result<Buffer, TensorError> {
        let element = element(tensor.dtype())?;
        Ok(device.share_bytes(tensor.to_contiguous().data_arc(), element)?)
    }

    fn tensor(_device: &FlexDevice, buffer: &Buffer, shape: Shape) -> Result<FlexTensor, TensorError> {
        fits(buffer, &shape)?;
        let bytes = buffer.bytes().ok_or(TensorError::OtherDevice)?.clone();
        Ok(FlexTensor::from_arc(bytes, Layout::contiguous(shape), dtype(buffer.element())))
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

/// A cubecl runtime that flora has a device for.
pub trait FloraRuntime: CubeRuntime {
    /// The flora device on the client of `device`.
    ///
    /// # Errors
    /// It doesn't start.
    fn open(device: &Self::Device) -> Result<Device, DeviceError>;

    /// What the runtime calls a flora device; `None` where it is another runtime's.
    fn device(device: &Device) -> Option<Self::Device>;
}

impl FloraRuntime for CudaRuntime {
    fn open(device: &CudaDevice) -> Result<Device, DeviceError> {
        Device::on_cuda(device)
    }

    fn device(device: &Device) -> Option<CudaDevice> {
        if let Place::Cuda(device) = device.place() { Some(device.clone()) } else { None }
    }
}

impl FloraRuntime for WgpuRuntime {
    fn open(device: &WgpuDevice) -> Result<Device, DeviceError> {
        Device::on_wgpu(device)
    }

    fn device(device: &Device) -> Option<WgpuDevice> {
        if let Place::Wgpu(device) = device.place() { Some(device.clone()) } else { None }
    }
}

impl<R, F, I, BT> FloraBackend for CubeBackend<R, F, I, BT>
where
    R: FloraRuntime,
    F: FloatElement,
    I: IntElement,
    BT: BoolElement,
    Self: Backend<Device = R::Device, FloatTensorPrimitive = CubeTensor<R>>,
{
    const CONCURRENT: bool = false;
    const COPIES_PARTS: bool = false;

    fn open(device: &R::Device) -> Result<Device, DeviceError> {
        R::open(device)
    }

    fn device(device: &Device) -> Option<R::Device> {
        R::device(device)
    }

    fn buffer(device: &Device, tensor: CubeTensor<R>) -> Result<Buffer, TensorError> {
        let element = element(tensor.dtype())?;
        let elements = tensor.shape().num_elements();
        if R::device(device).is_none_or(|own| own != tensor.device) {
            return Err(TensorError::OtherDevice);
        }
        // SAFETY: the tensor is of the runtime's device that this one is, and a runtime has one client for a device.
        Ok(unsafe { device.share_handle(into_contiguous(tensor).handle, elements, element) }?)
    }

    fn tensor(device: &R::Device, buffer: &Buffer, shape: Shape) -> Result<CubeTensor<R>, TensorError> {
        fits(buffer, &shape)?;
        let handle = buffer.handle().ok_or(TensorError::OtherDevice)?.clone();
        let client = R::client(device);
        Ok(CubeTensor::new_contiguous(client, device.clone(), shape, handle, dtype(buffer.element())))
    }
}
