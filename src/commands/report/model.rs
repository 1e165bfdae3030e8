//! From a file of coefficients to what the page shows of it: the only place that knows how the cost model keeps them.

use flora::codegen::batch::{AdapterSlots, BatchShape, Segment};
use flora::codegen::cost::{Coefficients, Kernel, LayerPrices, PricedLayer, Regime, Surface, Term, eq7, work};
use flora::codegen::plan::candidates;
use flora::prelude::*;
use flora::runtime::measure::EqualSegments;
use flora::runtime::tune::needed_by;

use super::page::{CriticalRank, Format, KernelPoints, Model, Point, Prediction};
use crate::commands::bench::paper::{Coordinates, Curves};
use crate::commands::error::CommandError;
use crate::commands::layer;

/// The coefficients as measured points.
pub(super) fn model(coefficients: &DeviceCoefficients) -> Model {
    Model {
        device: coefficients.device.clone(),
        flora: coefficients.flora.clone(),
        seconds_per_launch: coefficients.seconds_per_launch,
        bytes_per_second: 1.0 / coefficients.seconds_per_byte.max(f64::MIN_POSITIVE),
        formats: coefficients.formats.iter().map(|(name, own)| format(name, own)).collect(),
    }
}

fn format(name: &str, own: &Coefficients) -> Format {
    let types = format_of(name);
    let kernels = own.seconds_per_mac.iter().map(|(kernel, surface)| KernelPoints {
        name: kernel.name().to_owned(),
        points: points(*kernel, surface, types),
    });
    Format { name: name.to_owned(), kernels: kernels.collect() }
}

/// The format of that name; f32 where there is none, as in a file from elsewhere.
fn format_of(name: &str) -> LayerFormat {
    let mut parts = name.split('/');
    let element = |name: Option<&str>| Element::ALL.into_iter().find(|element| Some(element.name()) == name);
    let (activations, adapters) = (element(parts.next()), element(parts.next()));
    let weight = parts.next().and_then(WeightFormat::from_name);
    match (activations, adapters, weight) {
        (Some(activations), Some(adapters), Some(weight)) => {
            LayerFormat { activations, adapters, weight, ..LayerFormat::default() }
        }
        _ => LayerFormat::default(),
    }
}

/// The points of a surface that were measured.
fn points(kernel: Kernel, surface: &Surface, format: LayerFormat) -> Vec<Point> {
    let of_gemm = kernel.is_gemm();
    let mut points = Vec::new();
    for place in surface.places().filter(|place| surface.measured[surface.index(*place)]) {
        let (rows, rank) = (surface.rows[place.rows], surface.ranks[place.rank]);
        let (adapters, extent) = (surface.adapters[place.adapters], surface.extents[place.extent]);
        let layer = PricedLayer { shape: LayerShape { d: extent, k: extent }, format };
        let only = |value: u32| (!of_gemm).then_some(u64::from(value));
        points.push(Point {
            rows: u64::from(rows),
            rank: only(rank),
            adapters: only(adapters),
            extent: Some(u64::from(extent)),
            seconds_per_mac: surface.seconds_per_mac[surface.index(place)],
            macs_per_byte: macs_per_byte(kernel, layer, rows, rank, adapters),
            spread: Some(surface.spread[surface.index(place)]),
        });
    }
    points
}

/// What tuning ran at a point.
fn macs_per_byte(kernel: Kernel, layer: PricedLayer, rows: u32, rank: u32, adapters: u32) -> Option<f64> {
    let (part, plan) = needed_by(kernel);
    let (segments, slots) = match kernel {
        Kernel::Matmul => (vec![Segment { rows, adapter: 0 }], vec![AdapterSlots::base()]),
        _ => EqualSegments { part, adapters, rows, rank }.batch(),
    };
    let work = work(&plan, layer, &BatchShape::of(&segments, &slots), false, false);
    let own = work.terms.iter().find(|term: &&Term| term.kernel == kernel);
    own.map(|term| term.macs as f64 / term.bytes.max(1) as f64)
}

/// The predicted times of the measured points of a panel, and Eq. 7.
pub(super) fn predict(
    coefficients: &DeviceCoefficients,
    coordinates: &Coordinates,
    measured: &Curves,
) -> Result<Prediction, CommandError> {
    if !is_of(&coordinates.device, &coefficients.device) {
        return Ok(Prediction::None("the coefficients are another device's"));
    }
    let format = format_of(&format!("{0}/{0}/{1}", coordinates.dtype, coordinates.weight));
    let (name, own) = coefficients.of_format(format);
    if name != format.to_string() {
        return Ok(Prediction::None("no coefficients were measured for these types"));
    }
    let Coordinates { d, k, segments, tokens, .. } = *coordinates;
    let layer = PricedLayer { shape: LayerShape { d, k }, format };
    let prices = LayerPrices::new(coefficients, layer);
    let rows = tokens / segments;
    let mut curves = Curves::default();
    for (adapter, lowering, seconds) in measured.iter() {
        let compiled = layer::open(adapter)?.compiled;
        for rank in seconds.keys() {
            let slots = (0..segments).map(|_| compiled.slots(*rank, 0)).collect::<Vec<_>>();
            let segments = (0..segments).map(|adapter| Segment { rows, adapter }).collect::<Vec<_>>();
            let batch = BatchShape::of(&segments, &slots);
            let priced = compiled.parts.iter().flat_map(|part| candidates(*part, &prices, &batch));
            if let Some(candidate) = priced.into_iter().find(|candidate| candidate.lowering.name() == lowering) {
                curves.insert(adapter, lowering, *rank, candidate.predicted_seconds);
            }
        }
    }
    let seconds_per_mac = |kernel: Kernel, regime: Regime| {
        own.seconds_per_mac.get(&kernel).map_or(f64::NAN, |surface| surface.at(layer.extent(), regime))
    };
    // c1 and the rank depend on one another a little: c1 of the middle of the ranks is used for all.
    let ranks: std::collections::BTreeSet<u32> =
        measured.iter().flat_map(|(_, _, seconds)| seconds.keys().copied()).collect();
    let rank = ranks.iter().nth(ranks.len() / 2).copied().unwrap_or(1);
    let bmm = Regime { rows: f64::from(rows), rank: f64::from(rank), adapters: f64::from(segments) };
    let (c1, c2) =
        (seconds_per_mac(Kernel::LowRankBmm, bmm), seconds_per_mac(Kernel::Matmul, Regime::of_rows(u64::from(tokens))));
    let eq7 = CriticalRank { c1, c2, rank: eq7(layer.shape, 1, c1, c2).critical_rank };
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
