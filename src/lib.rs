//! flora compiles the equation of a low-rank-adapted layer into kernels that serve a batch in which every request brings its
//! own adapter.
//!
//! ```
//! use flora::prelude::*;
//!
//! /// StarCoder's query projection with per-request fLoRA adapters (Eq. 5 of the paper).
//! #[flora::layer]
//! fn query(x: Tokens<D>, w0: Weight<D, K>, b: Adapter<D, R>, a: Adapter<R, K>) -> Tokens<K> {
//!     x.matmul(w0 * b.matmul(a))
//! }
//!
//! # fn main() -> Result<(), Box<dyn std::error::Error>> {
//! let device = Device::host();
//! let layer = compile_verified(query::layer())?;
//! let (d, k, rank) = (3, 2, 1);
//!
//! // Each user's tensors, folded once, when they are loaded.
//! let tensors = Bindings::from_iter([
//!     ("b", Value::matrix(d, rank, vec![1.0, 2.0, 3.0])?),
//!     ("a", Value::matrix(rank, k, vec![10.0, 100.0])?),
//! ]);
//! let alice = layer.linear.fold(&tensors)?;
//!
//! let base_weight = [1.0, 1.0, 1.0, 1.0, 1.0, 1.0];
//! let mut projection = Projection::new(&device, LayerShape { d: 3, k: 2 }, &base_weight, None, layer.activation())?;
//! projection.load([("alice", Some(&alice))])?;
//!
//! // One row of alice's, one of the base model's, in one batch.
//! let batch = Batch::new([(Some("alice"), 1), (None, 1)]);
//! let plan = Plan::new(Lowering::Stacked, Lowering::Segmented)?;
//! let y = projection.forward(&batch, &plan, &[1.0, 1.0, 1.0, 1.0, 1.0, 1.0])?;
//! assert_eq!(y, [60.0, 600.0, 3.0, 3.0]);
//! # Ok(())
//! # }
//! ```

extern crate self as flora;

pub use flora_burn as burn;
pub use flora_checkpoint as checkpoint;
pub use flora_codegen as codegen;
pub use flora_engine as engine;
pub use flora_ir as ir;
pub use flora_macros::layer;
pub use flora_model as model;
pub use flora_runtime as runtime;
pub use flora_server as server;
pub use flora_tokenizer as tokenizer;

/// What a serving engine uses.
pub mod prelude {
    pub use flora_codegen::cost::DeviceCoefficients;
    pub use flora_codegen::layer::{Element, LayerFormat, LayerShape, WeightFormat};
    pub use flora_codegen::lowering::Lowering;
    pub use flora_codegen::pipeline::{CompiledLayer, compile, compile_verified};
    pub use flora_codegen::plan::Plan;
    pub use flora_codegen::target::Target;
    pub use flora_codegen::weight::PackedWeight;
    pub use flora_ir::{Activation, Bindings, Value};
    pub use flora_runtime::{Batch, Device, Planner, Projection, ProjectionOptions};
}
