//! Runs what `flora-codegen` plans: devices, base weights with their adapters, batches, and measuring.

pub mod adapters;
pub mod batch;
pub mod device;
pub mod measure;
pub mod oracle;
pub mod planner;
mod pool;
pub mod projection;
pub mod tune;
pub mod weights;

pub use adapters::{AdapterStore, Layers, LoadedAdapter, RegisterError, StoreError};
pub use batch::{Batch, BatchError, BatchSegment};
pub use device::{Buffer, Device, DeviceError, DeviceInfo, Place, WeightBuffer};
pub use planner::Planner;
pub use projection::{Projection, ProjectionError, ProjectionOptions};
pub use weights::{BaseError, BaseForm};
