//! One projection of a run: folded, planned, timed beside its base GEMM, and held against the oracle.

use std::time::Instant;

use flora::prelude::*;
use flora_adapters::AdapterStore;
use flora_checkpoint::BaseWeight;
use flora_ir::algebra::FoldedAdapter;
use flora_oracle::{Deviation, Sample, check};
use flora_plan::lowering::Part;
use flora_plan::schedule::Schedule;
use flora_runtime::{Buffer, PlannedProjection, Planning, ProjectionError, StepBatch};
use rayon::prelude::*;
use serde::Serialize;

use super::weights::{Base, Module};
use crate::commands::error::CommandError;

/// What came out of one projection.
#[derive(Clone, Debug, Serialize)]
pub(super) struct LayerReport {
    pub(super) layer: String,
    pub(super) d: usize,
    pub(super) k: usize,
    /// The encoding in the model's file, or "random".
    pub(super) stored: &'static str,
    /// The format on the device, and its bytes there.
    pub(super) weight: &'static str,
    pub(super) base_bytes: u64,
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

/// What all projections of a run have in common.
pub(super) struct Setting<'a> {
    pub(super) device: &'a Device,
    pub(super) planner: &'a Planner,
    pub(super) store: &'a AdapterStore,
    pub(super) batch: &'a Batch,
    /// The type of activations and adapters.
    pub(super) dtype: Element,
    pub(super) repetitions: usize,
}

/// Runs the batch through one projection; also returns its output, `[rows, k]`.
pub(super) fn measure(
    setting: &Setting,
    module: &Module,
    base: &Base,
    mut x: Vec<f32>,
) -> Result<(LayerReport, Vec<f32>), CommandError> {
    let Setting { device, planner, store, batch, dtype, repetitions } = *setting;
    let Base { stored, packed, decoded } = base;
    let adapters = store.fold(&module.path, decoded)?;
    let options = ProjectionOptions {
        bias: decoded.bias.as_deref(),
        activations: dtype,
        adapters: dtype,
        ..ProjectionOptions::default()
    };
    let mut projection = Projection::from_packed(device, packed, options)?;
    projection.load(adapters.iter().map(|(name, loaded)| (*name, loaded.as_ref().map(|loaded| &loaded.folded))))?;
    let (shape, batch_shape) = (projection.shape(), projection.batch_shape(batch)?);
    let plan = planner.plan(projection.layer(), &batch_shape, decoded.bias.is_some());
    let segments = projection.segments(batch)?;
    let step = StepBatch::new(segments.iter().map(|segment| (segment.adapter, segment.rows)));
    let tokens = batch.rows().map_err(ProjectionError::from)?;
    let base_gemm = Schedule::base_gemm(shape, tokens).map_err(ProjectionError::from)?;
    let format = projection.format();
    let projection = PlannedProjection::of(projection, Planning::Fixed(plan));

    // The oracle gets what the device has.
    x.iter_mut().for_each(|value| *value = dtype.round(*value));
    let x_on_device = device.upload_as(&x, dtype)?;
    let y = device.read(&projection.forward(&x_on_device, &step, None)?)?;
    let batches: [&dyn Fn() -> Result<Buffer, ProjectionError>; 2] =
        [&|| projection.forward(&x_on_device, &step, None), &|| {
            projection.change(|projection| projection.execute(&base_gemm, &x_on_device, None))
        }];
    let [seconds, base_seconds] = time(device, batches, repetitions)?;

    let deviation = deviation(setting, (shape, format), &adapters, decoded, &x, &y)?;
    let used = |tokens: u64, lowering| (tokens > 0).then_some(lowering);
    let report = LayerReport {
        layer: module.path.clone(),
        d: decoded.d,
        k: decoded.k,
        stored,
        weight: packed.format().name(),
        base_bytes: packed.format().bytes(shape),
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

/// The median seconds of each batch, run in turn so that what disturbs one disturbs the other.
fn time(
    device: &Device,
    batches: [&dyn Fn() -> Result<Buffer, ProjectionError>; 2],
    repetitions: usize,
) -> Result<[f64; 2], ProjectionError> {
    let mut seconds = [(); 2].map(|()| Vec::with_capacity(repetitions));
    for repetition in 0..=repetitions {
        for (run, seconds) in batches.iter().zip(&mut seconds) {
            let start = Instant::now();
            let y = run()?;
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
type Adapters<'a> = std::collections::BTreeMap<&'a str, Option<flora_adapters::LoadedAdapter<'a>>>;

/// The worst deviation of the first, middle and last row of every segment.
fn deviation(
    Setting { store, batch, .. }: &Setting,
    (shape, format): (LayerShape, LayerFormat),
    adapters: &Adapters,
    base: &BaseWeight,
    x: &[f32],
    y: &[f32],
) -> Result<Deviation, CommandError> {
    let base_rows = FoldedAdapter { virtual_rows: vec![Default::default()], ..FoldedAdapter::default() };
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
    let check_row = |(row, adapter): &(usize, Option<&flora_adapters::LoadedAdapter>)| {
        let (layer, operands, folded) = match adapter {
            Some(loaded) => (loaded.layer, &loaded.operands, &loaded.folded),
            None => (store.base_layer(), &no_operands, &base_rows),
        };
        let sample = Sample {
            shape,
            format,
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
