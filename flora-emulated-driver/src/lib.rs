//! Stands in for CUDA's driver and NVRTC: the same functions, with the types of `cuda.h` and `nvrtc.h`, on cards that the processor
//! plays.
//!
//! What launches kernels by the driver (`flora-driver`) can't be run without a card otherwise. This library lies under the names
//! `libcuda.so` and `libnvrtc.so` in a folder that a test's process looks in first. It has the functions that are called there and no others. "Machine code"
//! is the text; what a kernel computes is computed by the emulated card of `flora-codegen`. There is one card for each compute
//! capability, and where a card leaves something open, what is done is what shows mistakes: streams do nothing before somebody waits
//! for them, new memory holds NaN, and what a graph can't have breaks a capture.

mod calls;
mod nvrtc;
mod state;
mod status;
mod streams;
