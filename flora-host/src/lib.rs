//! The processor as a device of flora: the lowerings of a schedule as blocked loops over panels that stay in cache.
//!
//! A pass over the base weight W0 `[d, k]` is cut into panels of columns, a task each, and slices of the depth. A slice of a
//! panel is decoded once into the second-level cache and serves every row of the batch: base rows and `stacked` virtual rows
//! multiply it as it is, `on_chip` segments turn it strip by strip into their own W_i, and the low-rank sum and the epilogue are
//! applied to the outputs while they are still there. Kernels are written once over the vectors of `pulp` and chosen at run
//! time: AVX-512, AVX2 with FMA, NEON, or plain floats.
//!
//! The order of every sum depends on the layer alone, so that a row has the same bits whatever else is in its batch.

mod check;
mod engine;
mod error;
mod fetch;
mod finish;
mod frame;
mod gemm;
mod kernel;
mod low_rank;
mod materialise;
mod pack;
mod strips;
mod values;
mod workspace;

pub use engine::{Engine, Operands};
pub use error::HostError;
pub use values::{Values, ValuesMut};
