//! From a file of coefficients to what the page shows of it: the only place that knows how the cost model keeps them.

use flora::prelude::*;
use flora_plan::batch::{AdapterSlots, BatchShape, Segment};
use flora_plan::cost::{Kernel, LayerPrices, Place, PricedLayer, Regime, Surface, eq7, work};
use flora_plan::lowering::PartLowering;
use flora_tune::measure::EqualSegments;
use flora_tune::tune::{needed_by, timed_batch};

use super::page::{CriticalRank, Format, KernelPoints, Model, Point, Prediction};
use crate::commands::bench::paper::{Coordinates, Crossing, Curves};
use crate::commands::error::CommandError;
use crate::commands::layer;

/// The coefficients as measured points.
pub(super) fn model(coefficients: &DeviceCoefficients) -> Model {
    let formats = coefficients.formats.iter().map(|(name, own)| {
        let types = format(name).unwrap_or_default();
        let kernels =
            Kernel::TIMED.iter().filter_map(|(name, kernel)| Some((*name, *kernel, own.seconds_per_mac.get(kernel)?)));
        let kernels = kernels.map(|(name, kernel, surface)| KernelPoints {
            name: name.to_owned(),
            multiplies_weight: matches!(kernel, Kernel::Matmul | Kernel::Stacked | Kernel::OnChip | Kernel::Bmm),
            points: points(kernel, surface, types),
        });
        Format { name: name.clone(), kernels: kernels.collect(), error: own.error }
    });
    Model {
        device: coefficients.device.clone(),
        flora: coefficients.flora.clone(),
        seconds_per_launch: coefficients.seconds_per_launch,
        launch_spread: coefficients.launch_spread,
        bytes_per_second: 1.0 / coefficients.seconds_per_byte,
        bandwidth_spread: coefficients.bandwidth_spread,
        formats: formats.collect(),
    }
}

/// The types that `activations/adapters/weight` names.
fn format(name: &str) -> Option<LayerFormat> {
    let mut names = name.split('/');
    let mut element = || names.next().and_then(|name| Element::ALL.into_iter().find(|element| element.name() == name));
    let (activations, adapters) = (element()?, element()?);
    let weight = WeightFormat::from_name(names.next()?)?;
    Some(LayerFormat { activations, adapters, weight, ..LayerFormat::uniform(activations) })
}

/// The measured points of a surface.
fn points(kernel: Kernel, surface: &Surface, format: LayerFormat) -> Vec<Point> {
    let knows_adapters = !kernel.is_gemm();
    let measured = surface.places().filter(|place| surface.measured[surface.index(*place)]);
    let point = |place: Place| {
        let at = surface.index(place);
        let (rows, rank) = (surface.rows[place.rows], surface.ranks[place.rank]);
        let (adapters, extent) = (surface.adapters[place.adapters], surface.extents[place.extent]);
        let layer = PricedLayer { shape: LayerShape { d: extent, k: extent }, format };
        Point {
            rows: rows.into(),
            rank: knows_adapters.then_some(rank.into()),
            adapters: knows_adapters.then_some(adapters.into()),
            extent: extent.into(),
            seconds_per_mac: surface.seconds_per_mac[at],
            macs_per_byte: intensity(kernel, layer, timed_batch(kernel, surface, place)),
            spread: surface.spread[at],
        }
    };
    measured.map(point).collect()
}

/// The largest batch that tuning may have run: its segments times their rank, and its rows.
const MOST_VECTORS: u64 = 1 << 20;
const MOST_ROWS: u64 = 1 << 22;
const LARGEST_EXTENT: u32 = 1 << 16;

/// The MACs of a kernel for each byte that it moves, in the batch that tuning ran; NaN where none would run such a batch.
fn intensity(kernel: Kernel, layer: PricedLayer, timed: EqualSegments) -> f64 {
    let EqualSegments { adapters, rows, rank, .. } = timed;
    let within = |one: u32, other: u32, most: u64| u64::from(one) * u64::from(other) <= most;
    if !within(adapters, rank, MOST_VECTORS) || !within(adapters, rows, MOST_ROWS) || layer.shape.d > LARGEST_EXTENT {
        return f64::NAN;
    }
    let (_, plan) = needed_by(kernel);
    let (segments, slots) = match kernel {
        Kernel::Matmul => (vec![Segment { rows, adapter: 0 }], vec![AdapterSlots::base()]),
        _ => timed.batch(),
    };
    let work = work(&plan, layer, &BatchShape::of(&segments, &slots), false, false);
    let own = work.terms.iter().find(|term| term.kernel == kernel);
    own.map_or(f64::NAN, |term| term.macs as f64 / term.bytes as f64)
}

/// A batch of equal segments, each with an adapter of its own.
fn distinct(compiled: &CompiledLayer, adapters: u32, rows: u32, rank: u32) -> BatchShape {
    let slots = vec![compiled.slots(rank, 0); adapters as usize];
    let segments: Vec<_> = (0..adapters).map(|adapter| Segment { rows, adapter }).collect();
    BatchShape::of(&segments, &slots)
}

/// The predicted times of the measured points of a panel, and Eq. 7.
pub(super) fn predict(
    coefficients: &DeviceCoefficients,
    coordinates: &Coordinates,
    measured: &Curves,
) -> Result<Prediction, CommandError> {
    let Coordinates { d, k, segments, tokens, dtype, weight, .. } = coordinates;
    if !is_of(&coordinates.device, &coefficients.device) {
        return Ok(Prediction::None("the coefficients are another device's"));
    }
    let Some(format) = format(&format!("{dtype}/{dtype}/{weight}")) else {
        return Ok(Prediction::None("the cost model doesn't know these types"));
    };
    let (known, own) = coefficients.of_format(format);
    if known != format.to_string() {
        return Ok(Prediction::None(
            "the coefficients have none of these types; flora tune --dtype and --weight measures them",
        ));
    }
    let layer = PricedLayer { shape: LayerShape { d: *d, k: *k }, format };
    let prices = LayerPrices::new(coefficients, layer);
    let rows = tokens / segments;
    let mut curves = Curves::default();
    for (adapter, lowering, seconds) in measured.iter() {
        let compiled = layer::open(adapter)?.compiled;
        let Some((part, lowering)) = compiled.parts.first().copied().zip(Lowering::from_name(lowering)) else {
            continue;
        };
        // What such a part can't be computed by was measured by no one.
        let Some(computes) = PartLowering::find(part, lowering) else { continue };
        let plan = Plan::default().with_part(computes);
        for rank in seconds.keys() {
            let batch = distinct(&compiled, *segments, rows, *rank);
            let work = work(&plan, layer, &batch, false, prices.pads_blocks());
            curves.insert(adapter, lowering.name(), *rank, prices.price(&work));
        }
    }
    let seconds_per_mac = |kernel: Kernel, regime: Regime| {
        own.seconds_per_mac.get(&kernel).map_or(f64::NAN, |surface| surface.at(layer.extent(), regime))
    };
    let c1 = |rank: f64| {
        seconds_per_mac(Kernel::LowRankBmm, Regime { rows: rows.into(), rank, adapters: f64::from(*segments) })
    };
    let c2 = seconds_per_mac(Kernel::Matmul, Regime::of_rows(u64::from(*tokens)));
    let ranks = || measured.iter().flat_map(|(_, _, seconds)| seconds.keys().copied());
    let (low, high) = (ranks().min().unwrap_or(1), ranks().max().unwrap_or(1));
    let rank = critical_rank(low, high, |rank| eq7(layer.shape, 1, c1(rank), c2).left - 1.0 + 1.0 / rank);
    let at = match rank {
        Crossing::Below(rank) | Crossing::Above(rank) => f64::from(rank),
        Crossing::At(rank) => rank,
    };
    Ok(Prediction::Of { curves, eq7: CriticalRank { rank, c1: c1(at), c2 } })
}

/// Where Eq. 7's left side falls below 1, between two ranks: c1 depends on the rank too, so that there is no closed form.
fn critical_rank(low: u32, high: u32, left: impl Fn(f64) -> f64) -> Crossing {
    let (mut below, mut above) = (f64::from(low), f64::from(high));
    if left(below) < 1.0 {
        return Crossing::Below(low);
    }
    if left(above) >= 1.0 {
        return Crossing::Above(high);
    }
    const STEPS: usize = 40;
    for _ in 0..STEPS {
        let middle = (below + above) / 2.0;
        if left(middle) >= 1.0 { below = middle } else { above = middle }
    }
    Crossing::At(above)
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
    fn the_critical_rank_is_that_of_eq_7() {
        // 1 / (1 − 0.8), where c1 and c2 don't depend on the rank.
        let left = |rank: f64| 0.8 + 1.0 / rank;
        let Crossing::At(rank) = critical_rank(1, 16, left) else { panic!("within the ranks") };
        assert!((rank - 5.0).abs() < 1e-6, "{rank}");
        assert_eq!((critical_rank(1, 4, left), critical_rank(6, 8, left)), (Crossing::Above(4), Crossing::Below(6)));
    }

    #[test]
    fn batches_that_nobody_runs_are_not_made() {
        let part = flora_plan::lowering::Part::Multiplicative;
        let layer = |extent| PricedLayer { shape: LayerShape { d: extent, k: extent }, format: LayerFormat::default() };
        for (extent, [adapters, rows, rank]) in
            [(64, [u32::MAX, 1, 1]), (64, [2, u32::MAX, 1]), (64, [1 << 10, 1, 1 << 11]), (u32::MAX, [1, 1, 1])]
        {
            assert!(intensity(Kernel::Bmm, layer(extent), EqualSegments { part, adapters, rows, rank }).is_nan());
        }
        // Rows by W0 alone: 64² MACs a row, and 64² numbers of W0 with 2·64 of each row, all of 4 bytes.
        let (macs, bytes) = (8.0 * 4096.0, 4.0 * (4096.0 + 8.0 * 128.0));
        let timed = EqualSegments { part, adapters: 1, rows: 8, rank: 1 };
        assert_eq!(intensity(Kernel::Matmul, layer(64), timed), macs / bytes);
    }

    #[test]
    fn formats_are_read_as_they_are_printed() {
        let quantised = LayerFormat { weight: WeightFormat::Q4_1, ..LayerFormat::uniform(Element::Bf16) };
        for own in [LayerFormat::default(), quantised] {
            assert_eq!(format(&own.to_string()), Some(own));
        }
        assert_eq!([format(""), format("f32/f32"), format("f32/f8/f32")], [None; 3]);
    }

    #[test]
    fn measurements_are_of_the_device_that_the_fingerprint_names() {
        let fingerprint = "host / AMD EPYC (Zen), 2 threads / AVX-512";
        assert!(is_of("AMD EPYC (Zen), 2 threads (host)", fingerprint));
        for other in ["AMD EPYC (Zen), 2 threads (cuda:0)", "AMD EPYC (host)", "AMD EPYC (Zen), 2 threads", "", ")"] {
            assert!(!is_of(other, fingerprint), "{other}");
        }
    }
}
