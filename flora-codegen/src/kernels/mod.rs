//! The cubecl kernels, one source for CUDA, WGSL and SPIR-V.

pub(crate) mod epilogue;
pub(crate) mod materialise;
pub(crate) mod rows;
pub(crate) mod segmented;
pub(crate) mod stacked;

pub use epilogue::Epilogue;
pub use stacked::StackedBlueprint;
