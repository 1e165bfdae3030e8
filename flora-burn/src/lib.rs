//! Adapted linear layers as Burn modules: [`AdaptedLinear`] stands where `nn::Linear` stood, and every row of its input has its
//! own request's adapter.
//!
//! Burn's tensors are flora's buffers: on CUDA and wgpu both are handles of one cubecl client, on the processor (Burn's Flex
//! backend) a tensor lends its bytes to a buffer, and a buffer that nothing else has becomes a tensor. What isn't contiguous, or is
//! shared, is copied.
//!
//! ```
//! use burn::tensor::Tensor;
//! use flora_burn::{AdaptedLinear, Host, Planning, StepBatch, BurnDevice};
//! use flora_plan::layer::{LayerShape, WeightFormat};
//! use flora_plan::plan::Plan;
//! use flora_plan::weight::PackedWeight;
//! use flora_ir::algebra::{FoldedAdapter, VirtualRow};
//! use flora_runtime::ProjectionOptions;
//!
//! # fn main() -> Result<(), Box<dyn std::error::Error>> {
//! let target = BurnDevice::<Host>::open(&Default::default())?;
//! let weight = PackedWeight::from_f32(WeightFormat::default(), LayerShape { d: 32, k: 2 }, &[0.5; 64])?;
//! let planning = Planning::Fixed(Plan::default());
//! let query = AdaptedLinear::new(&target, &weight, ProjectionOptions::default(), planning)?;
//!
//! // IA3: outputs are scaled by 1 and 10.
//! let scaled = VirtualRow { in_scale: None, out_scale: Some(vec![1.0, 10.0]) };
//! let alice = FoldedAdapter { virtual_rows: vec![scaled], ..FoldedAdapter::default() };
//! query.change(|projection| {
//!     projection.reserve(8, 8)?;
//!     projection.place(1, &alice)
//! })?;
//!
//! // A row of the base model's, then two of the adapter at position 1.
//! let batch = StepBatch::new([(0, 1), (1, 2)]);
//! let y = query.forward(Tensor::<Host, 2>::ones([3, 32], &target.burn), &batch, None)?;
//! assert_eq!(y.into_data().to_vec::<f32>().unwrap(), [16.0, 16.0, 16.0, 160.0, 16.0, 160.0]);
//! # Ok(())
//! # }
//! ```

pub mod backend;
#[cfg(any(feature = "cuda", feature = "wgpu"))]
mod cube;
#[cfg(feature = "flex")]
mod flex;
pub mod linear;
#[cfg(feature = "autodiff")]
pub mod recompute;
#[cfg(feature = "autodiff")]
pub mod trained;

/// Burn's backend on this machine's processor.
#[cfg(feature = "flex")]
pub type Host = burn_flex::Flex;
#[cfg(feature = "wgpu")]
/// Burn's backend on a GPU through wgpu; Vulkan's element types.
pub type Wgpu = burn::backend::Vulkan;
#[cfg(feature = "cuda")]
/// Burn's backend on an NVIDIA GPU.
pub type Cuda = burn::backend::Cuda;

pub use backend::{BurnDevice, FloraBackend, TensorError};
#[cfg(any(feature = "cuda", feature = "wgpu"))]
pub use cube::FloraRuntime;
pub use linear::{AdaptedLinear, LinearError};
#[cfg(feature = "autodiff")]
pub use recompute::recomputed;
#[cfg(feature = "autodiff")]
pub use trained::{AdapterParameters, ParametersError};
// What a forward pass takes.
pub use flora_runtime::{Planning, StepBatch};
