//! Low-rank pairs of weights that are made of blocks.

use super::{Call, DeriveError, Tensor};

/// GraLoRA: component c of block i of the inputs, `[D, Q]`, and behind all blocks the general part's.
pub(super) fn grouped_inputs(call: &Call<'_>) -> Result<Tensor, DeriveError> {
    let ([blocks, width, rank], values) = call.of_extents(0, "it must have an extent for blocks, inputs and rank")?;
    let (general, general_rank) = general(call)?;
    let own = blocks * rank;
    call.matrix(blocks * width, own + general_rank, |input, component| match component.checked_sub(own) {
        Some(component) => general.map_or(0.0, |general| general[component * blocks * width + input]),
        None if component / rank == input / width => values[input * rank + component % rank],
        None => 0.0,
    })
}

/// GraLoRA: what component c of block i of the inputs gives, `[Q, K]`: to the block of outputs that its share of the components
/// belongs to.
pub(super) fn grouped_outputs(call: &Call<'_>) -> Result<Tensor, DeriveError> {
    let ([blocks, rank, width], values) = call.of_extents(0, "it must have an extent for blocks, rank and outputs")?;
    if blocks == 0 || !rank.is_multiple_of(blocks) || rank == 0 {
        return Err(call.misshapen(0, "its blocks must divide the rank"));
    }
    let (general, general_rank) = general(call)?;
    let (own, share) = (blocks * rank, rank / blocks);
    call.matrix(own + general_rank, blocks * width, |component, output| match component.checked_sub(own) {
        Some(component) => general.map_or(0.0, |general| general[output * general_rank + component]),
        None => {
            let (from, within, to) = (component / rank, component % rank, output / width);
            match within / share == to {
                true => values[(to * rank + from * share + within % share) * width + output % width],
                false => 0.0,
            }
        }
    })
}

/// The factor of the part that has no blocks, and its rank: `[h, D]` of the inputs, `[K, h]` of the outputs.
fn general<'a>(call: &Call<'a>) -> Result<(Option<&'a [f64]>, usize), DeriveError> {
    if call.optional(1).is_none() {
        return Ok((None, 0));
    }
    let ([rows, columns], values) = call.of_extents(1, "it must be a matrix")?;
    match (call.shape.first(), call.shape.last()) {
        (Some(Some(inputs)), _) if columns == *inputs => Ok((Some(values), rows)),
        (_, Some(Some(outputs))) if rows == *outputs => Ok((Some(values), columns)),
        _ => Err(call.misshapen(1, "it must be a factor of a linear layer of the module's sizes")),
    }
}
