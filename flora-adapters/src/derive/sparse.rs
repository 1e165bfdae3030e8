//! Matrices that are mostly zeros: single weights, and what pairs of outputs are turned by.

use std::collections::BTreeMap;

use flora_ir::SparseMatrix;

use super::vectors::place;
use super::{Call, DeriveError};

/// SHiRA: single weights, their outputs and inputs. `[D, K]`
pub(super) fn scattered(call: &Call<'_>) -> Result<SparseMatrix<f64>, DeriveError> {
    let ([count], numbers) = call.of_extents(0, "it must be a vector")?;
    let ([two, length], places) = call.of_extents(1, "it must have two rows, of outputs and of inputs")?;
    if two != 2 || length != count {
        return Err(call.misshapen(1, "it must have an output and an input for each number"));
    }
    let mut columns: Vec<BTreeMap<u32, f64>> = vec![BTreeMap::new(); call.k];
    let (outputs, inputs) = places.split_at(count);
    for (number, (output, input)) in numbers.iter().zip(outputs.iter().zip(inputs)) {
        let (output, input) = (place(call, 1, *output, call.k)?, place(call, 1, *input, call.d)?);
        *columns[output].entry(input as u32).or_default() += number;
    }
    Ok(SparseMatrix::of_columns(call.d, columns.into_iter().map(|column| column.into_iter().collect())))
}

/// RoAd: outputs c and c + g/2 of each group of g are turned by an angle and scaled. `[K, K]`
pub(super) fn turned_outputs(call: &Call<'_>) -> Result<SparseMatrix<f64>, DeriveError> {
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
    let column = |output: usize| {
        let (own, turned) = (at(output, 0).unwrap_or(0), at(output, 1).unwrap_or(0));
        let (cosine, sine) = (scales[own] * angles[own].cos(), scales[turned] * angles[turned].sin());
        let is_first = output % group < half;
        let (partner, sine) = if is_first { (output + half, -sine) } else { (output - half, sine) };
        vec![(output as u32, cosine), (partner as u32, sine)]
    };
    Ok(SparseMatrix::of_columns(k, (0..k).map(column)))
}
