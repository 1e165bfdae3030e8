//! The peaks of a device, measured in the run whose times they are held against: MACs a second of a large base GEMM, and bytes a
//! second of what only moves them.

use std::collections::BTreeMap;
use std::sync::Arc;

use flora::prelude::*;
use flora_plan::schedule::Schedule;
use flora_runtime::ProjectionError;

use super::timed::{Clock, Timed, random_input, random_operands};
use crate::commands::error::CommandError;

/// A GEMM is large when it takes this long, or at this extent.
const LARGE_SECONDS: f64 = 0.05;
const LARGEST_EXTENT: u32 = 8192;
/// Bytes that bandwidth is measured over unless others are asked for: more than the last-level caches of most devices.
pub(super) const BANDWIDTH_BYTES: u64 = 128 << 20;
/// Outputs of a row of the epilogue that is timed.
const EPILOGUE_WIDTH: u32 = 2048;

/// The best of everything measured so far.
pub(super) struct Peaks {
    /// Bytes that bandwidth is measured over.
    bandwidth_bytes: u64,
    large: BTreeMap<Element, Large>,
    /// One row by a weight, and an epilogue by itself; devices differ in which of them something else slows down.
    movers: Vec<(u64, Timed)>,
    bytes_per_second: f64,
}

struct Large {
    macs: f64,
    gemm: Timed,
    macs_per_second: f64,
}

/// A layer with a schedule.
fn timed(device: &Device, shape: LayerShape, format: LayerFormat, schedule: Schedule) -> Result<Timed, CommandError> {
    let x = random_input(device, shape, format, schedule.tokens())?;
    Ok(Timed { operands: Arc::new(random_operands(device, shape, format, 1)?), schedule, x })
}

/// What only moves numbers, with the bytes that it moves.
fn movers(device: &Device, bytes: u64) -> Result<Vec<(u64, Timed)>, CommandError> {
    let bytes = device.info().largest_buffer_bytes.map_or(bytes, |limit| limit.min(bytes));
    let format = LayerFormat::default();
    let side = ((bytes / 4) as f64).sqrt() as u32;
    let weight = LayerShape { d: side, k: side };
    let gemm = Schedule::base_gemm(weight, 1).map_err(ProjectionError::from)?;
    let rows = (bytes / 4 / u64::from(EPILOGUE_WIDTH)) as u32;
    let narrow = LayerShape { d: 8, k: EPILOGUE_WIDTH };
    let epilogue = Schedule::finish(narrow, rows, 1).map_err(ProjectionError::from)?;
    Ok(vec![
        (4 * u64::from(side) * u64::from(side), timed(device, weight, format, gemm)?),
        (2 * 4 * u64::from(rows) * u64::from(EPILOGUE_WIDTH), timed(device, narrow, format, epilogue)?),
    ])
}

impl Peaks {
    /// Nothing measured yet.
    pub(super) fn over(bandwidth_bytes: u64) -> Self {
        Self { bandwidth_bytes, large: BTreeMap::new(), movers: Vec::new(), bytes_per_second: 0.0 }
    }

    /// Raises the peaks to what is reached now.
    pub(super) fn measure(&mut self, clock: Clock, element: Element) -> Result<(), CommandError> {
        if let Some(large) = self.large.get_mut(&element) {
            large.macs_per_second = large.macs_per_second.max(large.macs / clock.best(&large.gemm)?);
        } else {
            let mut extent = 256u32;
            loop {
                let shape = LayerShape { d: extent, k: extent };
                let schedule = Schedule::base_gemm(shape, extent).map_err(ProjectionError::from)?;
                let gemm = timed(clock.device, shape, LayerFormat::uniform(element), schedule)?;
                let (macs, best) = (f64::from(extent).powi(3), clock.best(&gemm)?);
                if best >= LARGE_SECONDS || extent >= LARGEST_EXTENT {
                    self.large.insert(element, Large { macs, gemm, macs_per_second: macs / best });
                    break;
                }
                extent *= 2;
            }
        }
        if self.movers.is_empty() {
            self.movers = movers(clock.device, self.bandwidth_bytes)?;
        }
        for (bytes, mover) in &self.movers {
            self.bytes_per_second = self.bytes_per_second.max(*bytes as f64 / clock.best(mover)?);
        }
        Ok(())
    }

    /// MACs a second of operands of this type.
    pub(super) fn macs_per_second(&self, element: Element) -> f64 {
        self.large.get(&element).map_or(f64::INFINITY, |large| large.macs_per_second)
    }

    /// Bytes a second.
    pub(super) fn bytes_per_second(&self) -> f64 {
        self.bytes_per_second
    }

    /// The least seconds of so many MACs and bytes.
    pub(super) fn floor(&self, element: Element, macs: u64, bytes: u64) -> f64 {
        (macs as f64 / self.macs_per_second(element)).max(bytes as f64 / self.bytes_per_second)
    }
}
