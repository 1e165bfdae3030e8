//! A CUDA card that the processor plays: the text that a card would get is compiled by the system's C++ compiler, against a few
//! headers of our own, and executed. So planes of 32, fragments of 16×16×16 and bfloat16 run where there is no GPU, and a
//! sanitizer sees every access ([`flora_toolchain::Sanitizer`]).
//!
//! With a folder for it ([`flora_toolchain::KeptKernels`]), the machine code that a card would run is kept as well, so that a card has
//! it without compiling.
//!
//! There is one device for each compute capability that text is emitted for. It is slow, and it says nothing of a card's speed.

mod keep;
mod kernel;
mod memory;
mod program;
mod server;
#[cfg(test)]
mod tests;

use cubecl::prelude::*;
use cubecl_core::zspace::{Shape, Strides};
use flora_runtime::{BackendKind, DeviceInfo, Found};
use flora_toolchain::CxxCompiler;

use crate::runtime::start::start;
use crate::target::Capability;
use crate::target::cuda::Cuda;
use crate::target::recorder::{Dialect, Offline, OfflineDevice};
pub use kernel::{EmulatedKernel, EmulationError};
use server::EmulatedServer;

/// The runtime of emulated cards.
#[derive(Clone, Debug)]
pub(crate) struct Emulated;

impl Runtime for Emulated {
    type Compiler = <Cuda as Dialect>::Compiler;
    type Server = EmulatedServer;
    type Device = OfflineDevice;

    fn client(device: &Self::Device) -> ComputeClient<Self> {
        ComputeClient::load(device)
    }

    fn name(_client: &ComputeClient<Self>) -> &'static str {
        Cuda::NAME
    }

    fn require_array_lengths() -> bool {
        Offline::<Cuda>::require_array_lengths()
    }

    fn max_cube_count() -> (u32, u32, u32) {
        Cuda::MAX_CUBE_COUNT
    }

    fn can_read_tensor(shape: &Shape, strides: &Strides) -> bool {
        Offline::<Cuda>::can_read_tensor(shape, strides)
    }

    fn target_properties() -> cubecl::ir::TargetProperties {
        Cuda::target_properties()
    }

    fn enumerate_devices(_kind: u16, _info: &()) -> Vec<cubecl::device::DeviceId> {
        Vec::new()
    }
}

/// One device for each capability, where there is a C++ compiler.
pub(crate) fn found() -> Vec<Found> {
    let Ok(compiler) = CxxCompiler::find() else { return Vec::new() };
    let found = |(name, capability): (&str, Capability)| {
        let id = format!("cuda-emulated:{name}");
        let driver = compiler.name().to_owned();
        let info =
            DeviceInfo::unstarted(id, format!("{name}, played by the processor"), BackendKind::Cuda, driver, true);
        Found::new(info, move |info| start::<Emulated>(info, &OfflineDevice { variant: capability.version() }))
    };
    Capability::ALL.into_iter().map(found).collect()
}
