//! Changes of a weight that have no low rank. Any matrix `[d, k]` is a pair of rank min(d, k), of itself and the identity, so that
//! every lowering of low-rank pairs takes them, at that rank's price.

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
