//! From a file of coefficients to what the page shows of it: the only place that knows how the cost model keeps them.

use flora::codegen::batch::{BatchShape, Segment};
use flora::codegen::cost::{Coefficients, Kernel, eq7};
use flora::codegen::plan::candidates;
use flora::prelude::*;

use super::page::{CriticalRank, Format, KernelPoints, Model, Point, Prediction};
use crate::commands::bench::paper::{Coordinates, Curves};
use crate::commands::error::CommandError;
use crate::commands::layer;

/// The coefficients as measured points.
pub(super) fn model(coefficients: &Coefficients) -> Model {
    let kernels = coefficients.seconds_per_mac.iter().map(|(kernel, curve)| {
        let point = |(rows, seconds_per_mac): &(u64, f64)| Point {
            rows: *rows,
            rank: None,
            adapters: None,
            extent: None,
            seconds_per_mac: *seconds_per_mac,
            macs_per_byte: None,
            spread: None,
        };
        KernelPoints { name: name(*kernel), points: curve.points.iter().map(point).collect() }
    });
    let format = Format { name: LayerFormat::default().to_string(), kernels: kernels.collect() };
    Model {
        device: coefficients.device.clone(),
        flora: coefficients.flora.clone(),
        seconds_per_launch: coefficients.seconds_per_launch,
        bytes_per_second: 1.0 / coefficients.seconds_per_byte,
        formats: vec![format],
    }
}

/// The name that the tuning file has for a kernel.
fn name(kernel: Kernel) -> String {
    match serde_json::to_value(kernel) {
        Ok(serde_json::Value::String(name)) => name,
        _ => format!("{kernel:?}"),
    }
}

/// The predicted times of the measured points of a panel, and Eq. 7.
pub(super) fn predict(
    coefficients: &Coefficients,
    coordinates: &Coordinates,
    measured: &Curves,
) -> Result<Prediction, CommandError> {
    if !is_of(&coordinates.device, &coefficients.device) {
        return Ok(Prediction::None("the coefficients are another device's"));
    }
    if coordinates.dtype != "f32" || coordinates.weight != "f32" {
        return Ok(Prediction::None("the coefficients are of f32 only"));
    }
    let Coordinates { d, k, segments, tokens, .. } = *coordinates;
    let shape = LayerShape { d, k };
    let rows = tokens / segments;
    let mut curves = Curves::default();
    for (adapter, lowering, seconds) in measured.iter() {
        let compiled = layer::open(adapter)?.compiled;
        for rank in seconds.keys() {
            let slots = (0..segments).map(|_| compiled.slots(*rank, 0)).collect::<Vec<_>>();
            let segments = (0..segments).map(|adapter| Segment { rows, adapter }).collect::<Vec<_>>();
            let batch = BatchShape::of(&segments, &slots);
            let priced = compiled.parts.iter().flat_map(|part| candidates(*part, shape, &batch, coefficients));
            if let Some(candidate) = priced.into_iter().find(|candidate| candidate.lowering.name() == lowering) {
                curves.insert(adapter, lowering, *rank, candidate.predicted_seconds);
            }
        }
    }
    let c1 = coefficients.seconds_per_mac(Kernel::LowRankBmm, u64::from(rows));
    let c2 = coefficients.seconds_per_mac(Kernel::Matmul, u64::from(tokens));
    let eq7 = CriticalRank { c1, c2, rank: eq7(shape, 1, c1, c2).critical_rank };
    Ok(Prediction::Of { curves, eq7 })
}

/// Whether measurements on the device `name (id)` are of that with this fingerprint.
fn is_of(device: &str, fingerprint: &str) -> bool {
    let parts = device.strip_suffix(')').and_then(|rest| rest.rsplit_once(" ("));
    parts.is_some_and(|(name, id)| fingerprint.starts_with(&format!("{id} / {name} / ")))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn measurements_are_of_the_device_that_the_fingerprint_names() {
        let fingerprint = "host / AMD EPYC (Zen), 2 threads / AVX-512";
        assert!(is_of("AMD EPYC (Zen), 2 threads (host)", fingerprint));
        for other in ["AMD EPYC (Zen), 2 threads (cuda:0)", "AMD EPYC (host)", "AMD EPYC (Zen), 2 threads", "", ")"] {
            assert!(!is_of(other, fingerprint), "{other}");
        }
    }
}
