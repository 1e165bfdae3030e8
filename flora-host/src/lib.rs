//! The processor as a device of flora: the lowerings of a schedule as blocked loops over panels that stay in cache.
//!
//! A base weight W0 `[d, k]` is cut into strips of columns when it is loaded. A pass over it is cut into panels of columns and
//! blocks of rows, a task for each pair, and slices of the depth. A slice of the rows is packed into the second-level cache and
//! multiplied by one strip after the other: base rows and `stacked` virtual rows by the strip as it is, `on_chip` segments by what
//! they make of it, and the low-rank sum and the epilogue are applied to the outputs at the end. Kernels are written once over the
//! vectors of `pulp` and chosen at run time: AVX-512, AVX2 with FMA, NEON, or plain floats. Pairs of bf16 are multiplied by AMX where the
//! processor has it.
//!
//! The order of every sum depends on the layer alone, so that a row has the same bits whatever else is in its batch.

pub mod attached;
mod backward;
mod block_scales;
mod buffer;
mod byte_products;
mod byte_tiles;
mod call_memory;
mod check;
mod decode;
pub mod decoder;
mod device;
mod engine;
mod error;
mod expand;
mod factors;
mod fetch;
mod finish;
mod frame;
mod gemm;
mod kernel;
mod layout;
mod lookup;
mod materialise;
mod matmul;
mod matrix_unit;
mod memory;
mod one_row;
mod operands;
mod owned;
mod pack;
mod pairs;
mod partition;
mod pass;
mod pieces;
mod pool;
mod products;
mod rounded;
mod scratch;
mod shrink;
mod spare;
mod sparse;
mod stored_bytes;
mod straight;
mod team;
mod terms;
mod tiles;
mod transpose;
mod unpacked;
mod values;
mod vectorise;
mod weight;
mod widen;

pub use backward::GradientsMut;
pub use device::{describe, device, operands};
pub use engine::HostEngine;
pub use error::HostError;
pub use memory::{HostMemory, LentBytes, buffer, filled, into_values, lend, values};
pub use operands::Operands;
pub use owned::OwnedValues;
pub use spare::{HostPlace, SpareValues};
pub use team::Team;
pub use values::{NOT_REPLACED, Replaced, Rows, RowsMut, Values, ValuesMut};
pub use weight::Weight;
