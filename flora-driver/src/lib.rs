//! Launches on a stream and memory of another program: what [`flora_codegen::target::export`] lists of a batch, made by CUDA's driver
//! alone.
//!
//! flora's own device for CUDA has a context's memory and streams managed by cubecl. A program that has tensors on the card already,
//! such as one that uses PyTorch, has its own, and may capture its launches in graphs. So nothing here allocates or waits while it
//! launches; tables lie at fixed addresses, and a graph that was captured runs the batch that they describe when it is replayed.
//!
//! 1. [`Card`] is a card's primary context, PyTorch's own.
//! 2. [`Kernels`] compiles by NVRTC what a list has, once for all programs of this user ([`KernelCache`]), and loads it.
//! 3. [`Launches`] has a list's tables, state and scratch memory on the card.
//! 4. [`Launches::bind`] checks the caller's operands, [`Bound::launch`] launches.
//!
//! The driver and NVRTC are loaded when they are first needed: a program with this library starts where there is neither.

mod cache;
mod card;
mod compile;
mod error;
mod kernels;
mod launches;
mod list;
mod memory;

pub use cache::KernelCache;
pub use card::{Card, Stream};
pub use compile::Includes;
pub use error::{DriverError, OperandProblem};
pub use kernels::Kernels;
pub use launches::{Bound, Launches};
pub use memory::{DeviceMemory, OwnedMemory};
