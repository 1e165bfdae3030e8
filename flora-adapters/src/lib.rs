//! Where files meet layers: an adapter's tensors become the vectors of the projections that they adapt, and a model's weights the
//! form in which a device keeps them. The crate that reads files knows no layer, and the crate that runs layers knows no file.

pub mod adapted;
mod compose;
mod derive;
pub mod layers;
pub mod register;
pub mod store;
pub mod weights;
pub mod zoo;

pub use adapted::{AdaptedEmbedding, AdaptedHead, AdaptedModel};
pub use compose::MixedAdapters;
pub use derive::DeriveError;
pub use layers::Layers;
pub use register::RegisterError;
pub use store::{AdapterStore, LoadedAdapter, StoreError};
pub use weights::{BaseError, BaseForm};
