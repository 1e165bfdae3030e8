//! One projection of a run: folded, planned, timed beside its base GEMM, and held against the oracle.

use std::time::Instant;

use flora::checkpoint::BaseWeight;
use flora::codegen::lowering::Part;
use flora::codegen::schedule::Schedule;
use flora::ir::algebra::FoldedAdapter;
use flora::prelude::*;
use flora::runtime::oracle::{Deviation, Sample, check};
use flora::runtime::{AdapterStore, Buffer, ProjectionError};
use rayon::prelude::*;
use serde::Serialize;

use super::weights::Module;
use crate::commands::error::CommandError;

/// What came out of one projection.
#[derive(Clone, Debug, Serialize)]
pub(super) struct LayerReport {
    pub(super) layer: String,
    pub(super) d: usize,
    pub(super) k: usize,
    pub(super) lowerings: Lowerings,
    pub(super) seconds: f64,
    pub(super) base_seconds: f64,
    pub(super) max_relative_error: f64,
    pub(super) max_rounding_units: f64,
    pub(super) right: bool,
}

/// The chosen lowering of each part that the batch has.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord, Serialize)]
pub(super) struct Lowerings {
    pub(super) multiplicative: Option<Lowering>,
    pub(super) additive: Option<Lowering>,
}

/// Outputs that are computed again for every sampled row, spread over the width.
const COLUMNS: usize = 12;

/// Runs the batch through one projection; also returns its output, `[rows, k]`.
#[expect(clippy::too_many_arguments, reason = "everything that a run holds")]
pub(super) fn measure(
    device: &Device,
    planner: &Planner,
    store: &AdapterStore,
    batch: &Batch,
    module: &Module,
    base: &BaseWeight,
    x: &[f32],
    repetitions: usize,
) -> Result<(LayerReport, Vec<f32>), CommandError> {
    let adapters = store.fold(&module.path, base)?;
    let shape = LayerShape { d: extent(base.d)?, k: extent(base.k)? };
    let mut projection = Projection::new(device, shape, &base.values, base.bias.as_deref(), Activation::Identity)?;
    projection.load(adapters.iter().map(|(name, loaded)| (*name, loaded.as_ref().map(|loaded| &loaded.folded))))?;
    let batch_shape = projection.batch_shape(batch)?;
    let plan = planner.plan(shape, &batch_shape, base.bias.is_some());
    let schedule = projection.schedule(batch, &plan)?;
    let base_gemm = Schedule::base_gemm(shape, schedule.tokens()).map_err(ProjectionError::from)?;

    let x_on_device = device.upload(x)?;
    let y = device.read(&projection.execute(&schedule, &x_on_device, None)?)?;
    let [seconds, base_seconds] = time(device, &projection, [&schedule, &base_gemm], &x_on_device, repetitions)?;

    let deviation = deviation(store, &adapters, batch, shape, base, x, &y)?;
    let used = |tokens: u64, lowering| (tokens > 0).then_some(lowering);
    let report = LayerReport {
        layer: module.path.clone(),
        d: base.d,
        k: base.k,
        lowerings: Lowerings {
            multiplicative: used(batch_shape.multiplicative.tokens, plan.of(Part::Multiplicative)),
            additive: used(batch_shape.additive.tokens + batch_shape.scaled_additive.tokens, plan.of(Part::Additive)),
        },
        seconds,
        base_seconds,
        max_relative_error: deviation.relative_error,
        max_rounding_units: deviation.rounding_units,
        right: deviation.is_rounding(),
    };
    Ok((report, y))
}

fn extent(extent: usize) -> Result<u32, CommandError> {
    let limit = u64::from(u32::MAX);
    let too_many = |_| CommandError::TooMany { what: "the extents of a base weight", found: extent as u64, limit };
    u32::try_from(extent).map_err(too_many)
}

/// The median seconds of each schedule, run in turn so that what disturbs one disturbs the other.
fn time(
    device: &Device,
    projection: &Projection,
    schedules: [&Schedule; 2],
    x: &Buffer,
    repetitions: usize,
) -> Result<[f64; 2], ProjectionError> {
    let mut seconds = [(); 2].map(|()| Vec::with_capacity(repetitions));
    for repetition in 0..=repetitions {
        for (schedule, seconds) in schedules.iter().zip(&mut seconds) {
            let start = Instant::now();
            let y = projection.execute(schedule, x, None)?;
            device.synchronize()?;
            let elapsed = start.elapsed().as_secs_f64();
            drop(y);
            // The first one warms up.
            if repetition > 0 {
                seconds.push(elapsed);
            }
        }
    }
    Ok(seconds.map(|mut seconds| {
        seconds.sort_by(f64::total_cmp);
        seconds[seconds.len() / 2]
    }))
}

/// The adapters of one projection by name.
type Adapters<'a> = std::collections::BTreeMap<&'a str, Option<flora::runtime::LoadedAdapter<'a>>>;

/// The worst deviation of the first, middle and last row of every segment.
fn deviation(
    store: &AdapterStore,
    adapters: &Adapters,
    batch: &Batch,
    shape: LayerShape,
    base: &BaseWeight,
    x: &[f32],
    y: &[f32],
) -> Result<Deviation, CommandError> {
    let base_rows = FoldedAdapter { virtual_rows: vec![Default::default()], low_rank: Vec::new() };
    let mut sampled = Vec::new();
    let mut first = 0;
    for segment in batch.segments() {
        let rows = segment.rows as usize;
        let mut offsets = vec![0, rows / 2, rows.saturating_sub(1)];
        offsets.dedup();
        let adapter = segment.adapter.as_deref().and_then(|name| adapters.get(name)).and_then(Option::as_ref);
        sampled.extend(offsets.into_iter().filter(|row| *row < rows).map(|row| (first + row, adapter)));
        first += rows;
    }
    let columns: Vec<usize> = (0..base.k).step_by((base.k / COLUMNS).max(1)).chain([base.k - 1]).collect();
    let no_operands = Bindings::new();
    let check_row = |(row, adapter): &(usize, Option<&flora::runtime::LoadedAdapter>)| {
        let (layer, operands, folded) = match adapter {
            Some(loaded) => (loaded.layer, &loaded.operands, &loaded.folded),
            None => match store.base_layer() {
                Some(layer) => (layer, &no_operands, &base_rows),
                None => return Err(unknown_base_layer()),
            },
        };
        let sample = Sample {
            shape,
            format: LayerFormat::default(),
            base_weight: &base.values,
            bias: base.bias.as_deref(),
            residual: None,
            activation: Activation::Identity,
            x: &x[row * base.d..(row + 1) * base.d],
            y: &y[row * base.k..(row + 1) * base.k],
            columns: &columns,
        };
        Ok(check(&layer.written, operands, folded, &sample)?)
    };
    let deviations: Vec<_> = sampled.par_iter().map(check_row).collect::<Result<_, CommandError>>()?;
    Ok(deviations.into_iter().fold(Deviation::default(), Deviation::max))
}

fn unknown_base_layer() -> CommandError {
    CommandError::UnknownLayer { name: "linear".to_owned(), known: "none".to_owned() }
}
