//! The backward pass of a decoder's operations against central differences of the operations in f64; isolation; refusals.

mod attention;
mod rows;

/// Half a unit in the last place of 1 in f32.
const UNIT: f64 = f32::EPSILON as f64 / 2.0;

/// Four standard deviations of a sum of `count` products, whose magnitudes add up to `magnitude`, in f32.
fn rounding(count: usize, magnitude: f64) -> f64 {
    4.0 * UNIT * (count as f64 + 8.0).sqrt() * magnitude
}

/// The central difference of `f` at `x[at]`, and how far it may be from the derivative: D(h) is off by h²/6 · f''', of which
/// D(2h) − D(h) is three times as much, and by f64's rounding of values of size `size`, a thousand of them at most one after the other.
fn difference(x: &mut [f64], at: usize, size: f64, f: impl Fn(&[f64]) -> f64) -> (f64, f64) {
    const STEP: f64 = 1e-4;
    let own = x[at];
    let mut over = |steps: f64| {
        x[at] = own + steps * STEP;
        let above = f(x);
        x[at] = own - steps * STEP;
        let below = f(x);
        x[at] = own;
        (above - below) / (2.0 * steps * STEP)
    };
    let (one, two) = (over(1.0), over(2.0));
    // The next term, of h⁴, is a small part of it.
    (one, 1.1 * (two - one).abs() / 3.0 + 1000f64.sqrt() * 4.0 * f64::EPSILON * size / STEP)
}

fn widened(values: &[f32]) -> Vec<f64> {
    values.iter().map(|value| f64::from(*value)).collect()
}

fn bits(values: &[f32]) -> Vec<u32> {
    values.iter().map(|value| value.to_bits()).collect()
}
