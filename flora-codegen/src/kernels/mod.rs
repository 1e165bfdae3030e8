//! The cubecl kernels, one source for CUDA, WGSL and SPIR-V.

pub(crate) mod blueprint;
pub(crate) mod decode;
mod epilogue;
pub(crate) mod expand;
mod item;
pub(crate) mod materialise;
mod multiply;
mod on_chip;
pub(crate) mod reduce;
pub(crate) mod rows;
pub(crate) mod shrink;
mod stage;
pub(crate) mod tables;
pub(crate) mod tile;
mod units;
mod words;

pub use blueprint::{Multiply, SegmentedBlueprint, Tile, TileBlueprint};
pub use reduce::ReduceBlueprint;
