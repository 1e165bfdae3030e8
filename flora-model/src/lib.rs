//! Decoders built of adapted layers, for a continuous-batching engine: Llama (SmolLM2 and others) and GPTBigCode (StarCoder), from
//! GGUF files and Hugging Face folders, on any device that flora has.
//!
//! Attention, norms and tensors are Burn's; the projections are [`flora_burn::AdaptedLinear`]s. What one row computes depends on
//! its own sequence and adapter alone, and on nothing else that is in its batch.

mod attention;
mod block;
mod build;
mod cache;
pub mod decoder;
mod embedding;
pub mod error;
pub mod load;
pub mod options;
mod rotary;
pub mod source;

pub use build::adapted_by_default;
pub use decoder::ServedModel;
pub use error::ServeError;
pub use load::{DeviceModel, load};
pub use options::{PlanningChoice, ServeOptions};
pub use source::{AdapterDirectory, PreparedAdapter};
