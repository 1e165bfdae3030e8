//! GPUs: from a schedule's steps to launches. Blueprints, routines and the cubecl kernels; the CUDA and wgpu runtimes as devices of
//! flora; and the same launches as text, without a device.
//!
//! `flora-plan` prices a batch's lowerings and lays out its steps; [`routine`] fits tiles to a device, [`launch::launch`] runs the
//! kernels, or [`target::emit`] prints them.
//!
//! Features: `cuda` and `wgpu` bring the devices of these runtimes ([`runtime`]), `emit` the text for CUDA; WGSL and SPIR-V are
//! emitted with `wgpu`. `emulate` executes the CUDA text on the processor.

#[cfg(feature = "emulate")]
pub mod emulated;
pub mod kernels;
pub mod launch;
pub mod routine;
#[cfg(any(feature = "cuda", feature = "wgpu", feature = "emulate"))]
pub mod runtime;
#[cfg(feature = "emit")]
pub mod target;
pub mod traffic;
