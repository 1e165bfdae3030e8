//! The one place that downloads into the cache folder and runs outside programs.
//!
//! flora needs four things that are not Rust crates: a real model to run on, a Vulkan device with cooperative matrices
//! where there is no GPU, the CUDA compilers that say what generated CUDA costs, and clients that others wrote (OpenAI's,
//! lm-eval, a browser), to test its server with. Each is fetched once, on first use, into the [`Cache`], pinned and checked;
//! each failure is a [`FetchError`] that says what to do, and a caller goes on without the thing. A fifth, a C++ compiler
//! for text that is to be executed, is the system's ([`CxxCompiler`]). The Python package is built and tested by what comes
//! from PyPI likewise. Nothing here knows of layers, kernels or devices.

mod apt;
mod cache;
mod chromium;
mod cuda;
mod cxx;
mod error;
mod lavapipe;
mod pip;
mod program;
mod pypi;
mod python;
mod wheel;

pub use cache::Cache;
pub use chromium::Chromium;
pub use cuda::{
    Architecture, Block, Bound, Class, CompileError, Compiled, CudaCompiler, Defect, Expectations, KeptKernels,
    Limiter, MAX_WARPS, MainLoop, Mix, Occupancy, OccupancyError, Source, Unit, UnknownArchitecture, heading,
};
pub use cxx::{CxxCompiler, CxxError, Sanitizer, UnknownSanitizer};
pub use error::FetchError;
pub use lavapipe::Lavapipe;
pub use pypi::{smollm2, smollm2_from_environment, smollm2_in};
pub use python::{
    PythonPackages, lm_eval, lm_eval_from_environment, maturin, openai_client, openai_client_from_environment, pytest,
    torch_from_environment,
};
