//! Runs what `flora-plan` plans: devices, base weights with their adapters, and batches.
//!
//! This is the core that every device stands on, and it knows none: no GPU library, no processor's kernels, no files. What a kind
//! of device does is behind [`backend::Backend`]; what a kernel trusts is checked in [`operands`], once for all of them.

pub mod backend;
mod backward;
pub mod batch;
pub mod buffer;
pub mod decoding;
pub mod device;
pub mod found;
mod gates;
pub mod info;
mod merged;
pub mod operands;
mod passes;
pub mod planned;
mod pool;
pub mod projection;
pub mod step;

pub use backend::{Backend, Gradients, RankGates, SparseRows, Storage, Wanted};
pub use backward::{BackwardPass, ProjectionGradient};
pub use batch::{Batch, BatchError, BatchSegment};
pub use buffer::{Buffer, PoolBuffer, WeightBuffer};
pub use device::{Device, DeviceError};
pub use found::Found;
pub use gates::RowGates;
pub use info::{BackendKind, DeviceInfo};
pub use operands::{LayerOperands, OperandError};
pub use planned::{PlannedProjection, Planning, Scheduled};
pub use projection::{Projection, ProjectionError, ProjectionOptions};
pub use step::StepBatch;
