//! The one place that downloads into the cache folder and runs outside programs.
//!
//! flora needs three things that are not Rust crates: a real model to run on, a Vulkan device with cooperative matrices
//! where there is no GPU, and the CUDA compilers that say what generated CUDA costs. Each is fetched once, on first use,
//! into the [`Cache`], pinned and checked; each failure is a [`FetchError`] that says what to do, and a caller goes on
//! without the thing. Nothing here knows of layers, kernels or devices.

mod cache;
mod cuda;
mod error;
mod lavapipe;
mod program;
mod pypi;
mod wheel;

pub use cache::Cache;
pub use cuda::{
    Architecture, Block, Class, CompileError, Compiled, CudaCompiler, Defect, Expectations, Limiter, MAX_WARPS,
    MainLoop, Mix, Occupancy, OccupancyError, UnknownArchitecture,
};
pub use error::FetchError;
pub use lavapipe::Lavapipe;
pub use pypi::{smollm2, smollm2_from_environment, smollm2_in};
