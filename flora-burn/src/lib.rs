//! Adapted linear layers as Burn modules: [`AdaptedLinear`] stands where `nn::Linear` stood, and every row of its input has its
//! own request's adapter.
//!
//! Burn's tensors are flora's buffers: on CUDA and wgpu both are handles of one cubecl client, on the processor (Burn's Flex
//! backend) both are shared bytes. Nothing is copied in or out, except for tensors that aren't contiguous.

pub mod backend;
pub mod linear;

/// Burn's backend on this machine's processor.
pub type Host = burn_flex::Flex;
/// Burn's backend on a GPU through wgpu; Vulkan's element types.
pub type Wgpu = burn::backend::Vulkan;
/// Burn's backend on an NVIDIA GPU.
pub type Cuda = burn::backend::Cuda;

pub use backend::{FloraBackend, Target, TensorError};
pub use linear::{AdaptedLinear, LinearError, Planning, StepBatch};
