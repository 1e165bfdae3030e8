//! GPUs as devices of flora: finds them without starting them (what a driver library lists, checked before cubecl is asked for a
//! client), starts them, and runs schedules on them.

pub(crate) mod backend;
#[cfg(feature = "cuda")]
mod cuda;
pub(crate) mod start;
#[cfg(feature = "wgpu")]
mod wgpu;

#[cfg(feature = "cuda")]
pub use self::cuda::on_cuda;
#[cfg(feature = "wgpu")]
pub use self::wgpu::on_wgpu;
pub use backend::{CubePlace, device_of, handle_of, share};
use flora_runtime::Found;

/// Every GPU of the runtimes that this build has, best first.
pub fn found() -> Vec<Found> {
    let mut found = Vec::new();
    #[cfg(feature = "cuda")]
    found.extend(cuda::found());
    #[cfg(feature = "wgpu")]
    found.extend(wgpu::found());
    #[cfg(feature = "emulate")]
    found.extend(crate::emulated::found());
    found
}
