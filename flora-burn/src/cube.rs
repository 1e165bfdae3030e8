//! Burn's backends on cubecl: tensors and buffers are memory of one client.

use burn::tensor::backend::Backend;
use burn::tensor::{Shape, TensorMetadata};
use burn_cubecl::element::BoolElement;
use burn_cubecl::kernel::into_contiguous;
use burn_cubecl::tensor::CubeTensor;
use burn_cubecl::{CubeBackend, CubeRuntime, FloatElement, IntElement};
#[cfg(feature = "cuda")]
use cubecl::cuda::{CudaDevice, CudaRuntime};
#[cfg(feature = "wgpu")]
use cubecl::wgpu::{WgpuDevice, WgpuRuntime};
use flora_codegen::runtime::{device_of, handle_of, share};
use flora_runtime::{Buffer, Device, DeviceError};

use crate::backend::{FloraBackend, TensorError, dtype, element, fits};

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

#[cfg(feature = "cuda")]
impl FloraRuntime for CudaRuntime {
    fn open(device: &CudaDevice) -> Result<Device, DeviceError> {
        flora_codegen::runtime::on_cuda(device)
    }

    fn device(device: &Device) -> Option<CudaDevice> {
        device_of::<Self>(device).cloned()
    }
}

#[cfg(feature = "wgpu")]
impl FloraRuntime for WgpuRuntime {
    fn open(device: &WgpuDevice) -> Result<Device, DeviceError> {
        flora_codegen::runtime::on_wgpu(device)
    }

    fn device(device: &Device) -> Option<WgpuDevice> {
        device_of::<Self>(device).cloned()
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
    fn open(device: &R::Device) -> Result<Device, DeviceError> {
        R::open(device)
    }

    fn device(device: &Device) -> Option<R::Device> {
        R::device(device)
    }

    fn buffer(device: &Device, tensor: CubeTensor<R>) -> Result<Buffer, TensorError> {
        let element = element(tensor.dtype())?;
        let elements = tensor.shape().num_elements();
        let tensor = into_contiguous(tensor);
        Ok(share(device, &tensor.client, tensor.handle, elements, element)?)
    }

    fn tensor(device: &R::Device, buffer: Buffer, shape: Shape) -> Result<CubeTensor<R>, TensorError> {
        fits(&buffer, &shape)?;
        let handle = handle_of(&buffer).ok_or(TensorError::OtherDevice)?.clone();
        let client = R::client(device);
        Ok(CubeTensor::new_contiguous(client, device.clone(), shape, handle, dtype(buffer.element())))
    }
}
