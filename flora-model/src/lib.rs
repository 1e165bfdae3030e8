//! Decoders built of adapted layers, for a continuous-batching engine: Llama and the families that differ from it in fields (Mistral,
//! Qwen2, Qwen3), and GPTBigCode (StarCoder), from GGUF files and Hugging Face folders, on any device that flora has.
//!
//! A decoder is written once, over projections ([`flora_runtime::PlannedProjection`]) and the few operations beside them. On the
//! host these are `flora-host`'s own; with the feature `burn` (which `cuda` and `wgpu` bring) they are Burn's on other devices. What
//! one row computes depends on its own sequence and adapter alone, and on nothing else that is in its batch. The same decoder gives
//! losses and gradients of many adapters in one batch ([`training`]).

mod block;
mod build;
mod decoder;
mod embedding;
pub mod error;
mod form;
mod head;
mod host;
pub mod load;
mod memory;
mod merge;
mod mixture;
mod on_device;
mod operations;
pub mod options;
mod rounding;
mod shared;
pub mod source;
pub mod training;

pub use build::adapted_in_the_paper;
pub use error::ServeError;
pub use load::{DeviceModel, load};
pub use merge::MergeError;
pub use mixture::PreparedGates;
pub use options::{PlanningChoice, ServeOptions};
pub use rounding::{RoundingCost, rounding_cost};
pub use source::{AdapterDirectory, DirectoryError, PreparedAdapter, UpdateError};
pub use training::{TargetScore, TrainError, TrainOptions, TrainedModel};
