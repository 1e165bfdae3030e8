//! Numbers from one buffer into another on the device: how adapters come into pools that batches are reading from, and how pools
//! grow. No backend writes into the middle of a buffer by itself.

use cubecl::prelude::*;
use cubecl::server::Handle;
use flora_runtime::OperandError;

use super::LaunchError;
use super::prepare::{AXIS_LIMIT, ELEMENTWISE_UNITS};
use super::run::array;
use crate::kernels::rows::copy_numbers;
use crate::routine::storage;
use flora_plan::layer::Element;

/// Queues the copy of the first `count` numbers of `source` into `destination`, from its number `first` on.
///
/// # Errors
/// More numbers than kernels index.
///
/// # Safety
/// Both are `client`'s buffers of `element`, `source` of at least `count` numbers and `destination` of `first + count`.
pub unsafe fn copy<R: Runtime>(
    client: &ComputeClient<R>,
    element: Element,
    source: &Handle,
    destination: &Handle,
    first: usize,
    count: usize,
) -> Result<(), LaunchError> {
    let end = first as u64 + count as u64;
    if end > i32::MAX as u64 {
        return Err(OperandError::PoolTooLarge { pool: "copied", elements: end }.into());
    }
    if count == 0 {
        return Ok(());
    }
    let cubes = count.div_ceil(ELEMENTWISE_UNITS as usize);
    let x = cubes.min(AXIS_LIMIT as usize);
    // SAFETY: the kernel guards its indices by `count`; the caller vouches for the buffers.
    unsafe {
        copy_numbers::launch_unchecked::<R>(
            client,
            CubeCount::Static(x as u32, cubes.div_ceil(x) as u32, 1),
            CubeDim::new_1d(ELEMENTWISE_UNITS),
            array(source, count),
            array(destination, first + count),
            first as u32,
            count as u32,
            storage(element),
        )
    };
    Ok(())
}
