//! The cubecl kernels, one source for CUDA, WGSL and SPIR-V.

pub(crate) mod attention;
pub(crate) mod blueprint;
pub(crate) mod decode;
mod decode_pairs;
mod epilogue;
pub(crate) mod expand;
mod fetched;
pub(crate) mod gradients;
mod item;
pub(crate) mod key_values;
pub(crate) mod materialise;
pub(crate) mod merge_splits;
mod multiply;
mod multiply_registers;
pub(crate) mod norm;
mod on_chip;
pub(crate) mod outer;
mod outer_scales;
mod output;
mod places;
mod quantised;
pub(crate) mod reduce;
mod registers;
pub(crate) mod rows;
pub(crate) mod shrink;
mod stage;
mod staged;
pub(crate) mod tables;
pub(crate) mod tile;
pub(crate) mod transposed;
mod units;
mod words;

pub use attention::AttentionBlueprint;
pub use blueprint::{Multiply, OuterBlueprint, SegmentedBlueprint, Tile, TileBlueprint};
pub use norm::NormBlueprint;
pub use reduce::ReduceBlueprint;
