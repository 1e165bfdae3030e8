//! Coefficients of no device.

use std::collections::BTreeMap;

use flora_plan::blueprints::Blueprints;
use flora_plan::cost::{Coefficients, DeviceCoefficients, FitError, GradientKernel, Kernel, SCHEMA, Surface};

fn surface(random: &mut fastrand::Rng, kernel: Kernel) -> Surface {
    let of_rows = kernel.is_gemm();
    let axis = |points: &[u32]| if of_rows { vec![1] } else { points.to_vec() };
    let mut surface = Surface {
        rows: vec![1, 8, 64],
        ranks: axis(&[1, 16]),
        adapters: axis(&[1, 4]),
        extents: vec![64, 1024],
        ..Surface::default()
    };
    for _ in surface.places() {
        surface.seconds_per_mac.push(1e-12 * 100f64.powf(random.f64()));
        surface.spread.push(random.f64());
        surface.measured.push(random.bool());
    }
    surface
}

/// The coefficients of device number `seed`.
pub(crate) fn device(seed: u64, pads_blocks: bool) -> DeviceCoefficients {
    let mut random = fastrand::Rng::with_seed(seed);
    let seconds_per_mac: BTreeMap<Kernel, Surface> =
        Kernel::TIMED.iter().map(|(_, kernel)| (*kernel, surface(&mut random, *kernel))).collect();
    let gradients: BTreeMap<GradientKernel, Surface> =
        GradientKernel::TIMED.iter().map(|(_, kernel)| (*kernel, surface(&mut random, Kernel::OnChip))).collect();
    let error = Some(FitError { points: 9, median: 0.1, p95: 0.2, largest: 0.3 });
    DeviceCoefficients {
        schema: SCHEMA,
        flora: "0.1.0".to_owned(),
        device: format!("device {seed}"),
        pads_blocks,
        largest_buffer_bytes: None,
        seconds_per_launch: 1e-6 * random.f64(),
        launch_spread: 0.1,
        seconds_per_byte: 1e-11 * random.f64(),
        bandwidth_spread: 0.1,
        blueprints: Blueprints::default(),
        formats: BTreeMap::from([("f32/f32/f32".to_owned(), Coefficients { seconds_per_mac, gradients, error })]),
    }
}
