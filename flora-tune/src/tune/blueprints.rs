//! How kernels should cut their work on a device: what a routine would choose against everything else that it could.

use std::collections::BTreeSet;

use flora_plan::blueprints::{Blueprints, TileChoice};
use flora_plan::cost::PricedLayer;
use flora_plan::layer::{LayerFormat, LayerShape};
use flora_plan::lowering::{AdditiveLowering, MultiplicativeLowering, Part};
use flora_plan::plan::Plan;
use flora_plan::schedule::{Schedule, schedule};

use super::Launch;
use super::effort::Effort;
use crate::measure::{EqualSegments, LayerBench, Sample, unscheduled};
use flora_runtime::{BackendKind, Device, DeviceError};

/// What is faster by less than this share is left as it was.
const WORTHWHILE: f64 = 0.03;
/// Rows that split and whole depth are compared at.
const FEW_ROWS: [u32; 8] = [4, 8, 16, 32, 48, 64, 96, 128];
/// The rank of the tiles of W_i that are timed.
const RANK: u32 = 8;

/// Measures the choices for layers of `formats`, at the middle extent of the effort.
pub(super) fn measure(
    device: &Device,
    formats: &[LayerFormat],
    effort: &Effort,
    launch: &Launch,
) -> Result<Blueprints, DeviceError> {
    let mut blueprints = Blueprints::default();
    let has_choices = effort.blueprints && device.info().backend != BackendKind::Host;
    let Some(format) = formats.first().filter(|_| has_choices) else { return Ok(blueprints) };
    let mut done = BTreeSet::new();
    for format in formats.iter().filter(|format| done.insert(format.activations)) {
        let bench = bench(device, *format, effort, launch)?;
        for on_chip in [false, true] {
            blueprints.tiles.extend(tiles(&bench, on_chip, effort)?);
        }
    }
    let bench = bench(device, *format, effort, launch)?;
    blueprints.split_rows = rows_where(&bench, effort, |bench, rows| {
        let whole = batch(bench, Plan::default(), rows, 1)?;
        let split = batch(bench, Plan::default().with_split(), rows, 1)?;
        Ok([(bench.device().clone(), whole), (bench.device().clone(), split)])
    })?;
    Ok(blueprints)
}

fn bench<'a>(
    device: &'a Device,
    format: LayerFormat,
    effort: &Effort,
    launch: &Launch,
) -> Result<LayerBench<'a>, DeviceError> {
    let extent = effort.extents[effort.extents.len() / 2];
    let shape = LayerShape { d: extent, k: extent };
    Ok(LayerBench::new(device, PricedLayer { shape, format }, RANK)?.without_wait(launch.wait))
}

/// `rows` rows of one adapter.
fn batch(bench: &LayerBench<'_>, plan: Plan, rows: u32, rank: u32) -> Result<Schedule, DeviceError> {
    let (segments, adapters) = EqualSegments { part: Part::Multiplicative, adapters: 1, rows, rank }.batch();
    schedule(&plan, bench.layer().shape, &segments, &adapters, false).map_err(unscheduled)
}

/// Medians of what takes turns.
fn compare(bench: &LayerBench<'_>, effort: &Effort, runs: &[(Device, Schedule)]) -> Result<Vec<f64>, DeviceError> {
    let mut samples = vec![Sample::default(); runs.len()];
    for pass in 0..=effort.passes {
        for ((device, schedule), sample) in runs.iter().zip(&mut samples) {
            let seconds = bench.seconds_on(device, schedule)?;
            // The first one compiles and warms up.
            if pass > 0 {
                sample.push(seconds);
            }
        }
    }
    Ok(samples.iter().map(Sample::median).collect())
}

/// The most of [`FEW_ROWS`] up to which the second way is faster than the first; 0 where it never is.
fn rows_where(
    bench: &LayerBench<'_>,
    effort: &Effort,
    ways: impl Fn(&LayerBench<'_>, u32) -> Result<[(Device, Schedule); 2], DeviceError>,
) -> Result<u32, DeviceError> {
    let mut most = 0;
    for rows in FEW_ROWS {
        let seconds = compare(bench, effort, &ways(bench, rows)?)?;
        if seconds[1] > seconds[0] * (1.0 - WORTHWHILE) {
            break;
        }
        most = rows;
    }
    Ok(most)
}

/// The tiles that are faster than the routine's own.
fn tiles(bench: &LayerBench<'_>, on_chip: bool, effort: &Effort) -> Result<Vec<TileChoice>, DeviceError> {
    let activations = bench.layer().format.activations;
    let table = bench.device().tiles(bench.layer().format);
    let mut classes: Vec<u32> = table.iter().map(|tile| tile.rows).collect();
    classes.sort_unstable();
    classes.dedup();
    // What is larger than every tile.
    let last = classes.last().map_or(0, |rows| 2 * rows);
    let (plan, rank) = match on_chip {
        true => (Plan::new(MultiplicativeLowering::OnChip, AdditiveLowering::Fused), RANK),
        false => (Plan::default(), 1),
    };
    let mut choices = Vec::new();
    for rows in classes.into_iter().chain([last]).filter(|rows| *rows > 0) {
        let schedule = batch(bench, plan, rows, rank)?;
        let class = if rows == last { u32::MAX } else { rows };
        let choice = |tile| TileChoice { activations, on_chip, rows: class, tile };
        let tuned = table.iter().map(|tile| {
            let tiles = vec![choice(*tile)];
            bench.device().tuned(&Blueprints { tiles, ..Blueprints::default() })
        });
        let runs: Vec<_> =
            std::iter::once(bench.device().clone()).chain(tuned).map(|device| (device, schedule.clone())).collect();
        let seconds = compare(bench, effort, &runs)?;
        let best = table.iter().zip(&seconds[1..]).min_by(|one, other| one.1.total_cmp(other.1));
        choices
            .extend(best.filter(|(_, best)| **best < seconds[0] * (1.0 - WORTHWHILE)).map(|(tile, _)| choice(*tile)));
    }
    Ok(choices)
}
