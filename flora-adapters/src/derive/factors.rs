//! Factors that are parts or repetitions of others.

use super::{Call, DeriveError, Tensor};

/// The leading rows and columns, as many as the operand has: VeRA's projections are as large as the largest module asks for.
pub(super) fn leading(call: &Call<'_>) -> Result<Tensor, DeriveError> {
    let tensor = call.input(0)?;
    let too_small = || call.misshapen(0, "it must be at least as large as the module's sizes and the rank say");
    match (&tensor.shape[..], &call.shape[..]) {
        (&[rows, columns], &[Some(wanted_rows), Some(wanted_columns)])
            if wanted_rows <= rows && wanted_columns <= columns =>
        {
            call.matrix(wanted_rows, wanted_columns, |row, column| tensor.values[row * columns + column])
        }
        (&[length], &[Some(wanted)]) if wanted <= length => {
            Ok(Tensor::new(vec![wanted], tensor.values[..wanted].to_vec()))
        }
        _ => Err(too_small()),
    }
}

/// MiSS sums the inputs i, i + r, i + 2r and so on.
pub(super) fn tiled_identity(call: &Call<'_>) -> Result<Tensor, DeriveError> {
    let rank = call.rank.max(1);
    call.matrix(call.d, call.rank, |input, component| f64::from(u8::from(input % rank == component)))
}

/// A few columns again and again, until there is one for each output.
pub(super) fn tiled_columns(call: &Call<'_>) -> Result<Tensor, DeriveError> {
    let ([rows, columns], values) = call.of_extents(0, "it must be a matrix")?;
    if columns == 0 || !call.k.is_multiple_of(columns) {
        return Err(call.misshapen(0, "its columns must divide the outputs of the module"));
    }
    call.matrix(rows, call.k, |row, column| values[row * columns + column % columns])
}

/// GraLoRA's scale: α over the sum of the rank and that of its general part.
pub(super) fn alpha_over_ranks(call: &Call<'_>) -> Result<Tensor, DeriveError> {
    let ([], alpha) = call.of_extents::<0>(0, "it must be one number")?;
    let ranks = call.rank + call.count(1, 0)?;
    Ok(Tensor::new(Vec::new(), alpha.iter().map(|alpha| alpha / ranks as f64).collect()))
}
