//! flora for other people's programs: adapted layers whose inputs and outputs stay where those programs have them.
//!
//! Two interfaces stand on the same functions: that of C (`include/flora.h`), and, with the feature `python`, the native module of
//! the Python package `flora`. Neither brings a device's library or PyTorch: tensors come as addresses, extents and strides.
//! With the feature `cuda`, layers run on cards of NVIDIA's as well, whose driver is loaded when it is first asked for one.
#![deny(unsafe_code)]

pub mod c;
#[cfg(feature = "cuda")]
mod cuda;
mod error;
mod kinds;
mod linear;
mod memory;
#[cfg(feature = "python")]
mod openmp;
#[cfg(feature = "python")]
mod python;
mod step;
mod threads;
#[cfg(feature = "python")]
mod trained;
