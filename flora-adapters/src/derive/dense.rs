//! Changes of a weight that have no low rank. Any matrix `[d, k]` is a pair of rank min(d, k), of itself and the identity, so that
//! every lowering of low-rank pairs takes them, at that rank's price.

use super::vectors::place;
use super::{Call, DeriveError, Tensor};

/// C3A: y_m = Σ_j x_j w_{(j − m) mod n} / d for each block of n inputs and n outputs: PEFT's products of Fourier transforms,
/// multiplied out.
pub(super) fn circulant_blocks(call: &Call<'_>) -> Result<Tensor, DeriveError> {
    let ([down, across, size], kernel) = call.of_extents(0, "it must have an extent for outputs, inputs and blocks")?;
    let inputs = across * size;
    call.matrix(inputs, down * size, |input, output| {
        let at = (size + input % size - output % size) % size;
        kernel[((output / size) * across + input / size) * size + at] / inputs as f64
    })
}

/// SHiRA: single weights, their outputs and inputs.
pub(super) fn scattered(call: &Call<'_>) -> Result<Tensor, DeriveError> {
    let ([count], numbers) = call.of_extents(0, "it must be a vector")?;
    let ([two, length], places) = call.of_extents(1, "it must have two rows, of outputs and of inputs")?;
    if two != 2 || length != count {
        return Err(call.misshapen(1, "it must have an output and an input for each number"));
    }
    let mut change = Tensor::matrix(call.d, call.k, |_, _| 0.0);
    let (outputs, inputs) = places.split_at(count);
    for (number, (output, input)) in numbers.iter().zip(outputs.iter().zip(inputs)) {
        let (output, input) = (place(call, 1, *output, call.k)?, place(call, 1, *input, call.d)?);
        change.values[input * call.k + output] += number;
    }
    Ok(change)
}

/// RoAd: outputs c and c + g/2 of each group of g are turned by an angle and scaled.
pub(super) fn turned_outputs(call: &Call<'_>) -> Result<Tensor, DeriveError> {
    let ([count], angles) = call.of_extents(0, "it must be a vector")?;
    let ([scales_count], scales) = call.of_extents(1, "it must be a vector")?;
    let group = call.count(2, 2)?;
    if scales_count != count {
        return Err(call.misshapen(1, "it must have a scale for each angle"));
    }
    let (k, half) = (call.k, group / 2);
    if group % 2 != 0 || !k.is_multiple_of(group) {
        let expected = "it must be even and divide the outputs of the module";
        return Err(DeriveError::Number { input: call.name(2), value: group as f64, expected });
    }
    // Where the angle of an output is, for its own share and for its partner's.
    let at = |output: usize, partner: usize| match (count * 2).checked_div(k) {
        Some(1) => Some((output / group) * half + output % half),
        Some(2) => Some(output),
        Some(4) => Some((output / group) * 2 * group + partner * group + output % group),
        _ => None,
    };
    if count * 2 % k != 0 || at(0, 0).is_none() {
        return Err(call.misshapen(0, "it must have an angle for each pair, each output, or two for each output"));
    }
    let base = call.base()?.data();
    call.matrix(call.d, k, |input, output| {
        let (own, turned) = (at(output, 0).unwrap_or(0), at(output, 1).unwrap_or(0));
        let (cosine, sine) = (scales[own] * angles[own].cos(), scales[turned] * angles[turned].sin());
        let is_first = output % group < half;
        let partner = if is_first { -base[input * k + output + half] } else { base[input * k + output - half] };
        (cosine - 1.0) * base[input * k + output] + sine * partner
    })
}

/// `[D, Q]`: the change itself, or the identity where there are fewer inputs than outputs.
pub(super) fn inputs(call: &Call<'_>) -> Result<Tensor, DeriveError> {
    let ([d, k], values) = call.of_extents(0, "it must be a matrix")?;
    Ok(match d < k {
        true => Tensor::matrix(d, d, |row, column| f64::from(u8::from(row == column))),
        false => Tensor::new(vec![d, k], values.to_vec()),
    })
}

/// `[Q, K]`: the other one.
pub(super) fn outputs(call: &Call<'_>) -> Result<Tensor, DeriveError> {
    let ([d, k], values) = call.of_extents(0, "it must be a matrix")?;
    Ok(match d < k {
        true => Tensor::new(vec![d, k], values.to_vec()),
        false => Tensor::matrix(k, k, |row, column| f64::from(u8::from(row == column))),
    })
}
