//! What activations in 8 bits cost a model in exactness, measured on the model itself: nobody can say it beforehand, and whoever chooses
//! them should know.

use std::fmt;

use flora_engine::{Decoder, LogitRows, SequenceId, StepSegment};
use flora_runtime::Device;

use crate::error::ServeError;
use crate::load::DeviceModel;

/// Tokens of the probe, where the model knows so many.
const PROBE: u32 = 64;

/// The multiplier that spreads the probe's tokens over any vocabulary: near 2^32 over the golden ratio.
const SPREAD: u64 = 0x9e37_79b1;

/// How far a model's logits are from those of float activations, on a probe: one sequence of tokens that are spread over the vocabulary,
/// always the same ones.
#[derive(Clone, Copy, Debug, PartialEq)]
pub struct RoundingCost {
    /// Tokens of the probe.
    pub tokens: usize,
    /// The root mean square of the logits' differences, as a part of that of the logits' distances to their token's mean.
    pub difference: f64,
    /// Tokens after which another token is the likeliest.
    pub other_likeliest: usize,
}

impl fmt::Display for RoundingCost {
    fn fmt(&self, formatter: &mut fmt::Formatter<'_>) -> fmt::Result {
        let Self { tokens, difference, other_likeliest } = self;
        write!(
            formatter,
            "logits are {:.2} % of their spread off those of float activations (root mean square over {tokens} probe tokens), and the \
             likeliest token is another one after {other_likeliest} of them",
            100.0 * difference
        )
    }
}

/// Measures what the rounding of `device` (see [`Device::rounding_activations`]), which the model was put on, costs. Takes a step with it
/// and one without; the model is as before then.
///
/// # Errors
/// A model that has no base weight for which activations are rounded; what goes wrong in a step.
pub fn rounding_cost(device: &Device, model: &mut DeviceModel) -> Result<RoundingCost, ServeError> {
    let rounded = logits(model)?;
    let mut exact = None;
    device.unrounded(&mut || {
        exact = Some(logits(model));
        Ok(())
    })?;
    let exact = exact.unwrap_or_else(|| Ok(Vec::new()))?;
    if rounded == exact {
        return Err(ServeError::NothingRounded);
    }
    Ok(RoundingCost::between(&rounded, &exact, model.limits().vocabulary as usize))
}

/// The logits of the probe, `[tokens, vocabulary]`.
fn logits(model: &mut DeviceModel) -> Result<Vec<f32>, ServeError> {
    let limits = model.limits();
    let token = |at: u32| (u64::from(at + 1) * SPREAD % u64::from(limits.vocabulary.max(1))) as u32;
    let tokens: Vec<u32> = (0..PROBE.min(limits.context_length)).map(token).collect();
    // No request has begun, so that no sequence is in the way.
    let sequence = SequenceId(u64::MAX);
    let segment = StepSegment {
        sequence,
        adapter: None,
        first_position: 0,
        tokens: &tokens,
        prompt_tokens: tokens.len() as u32,
        logits: LogitRows::All,
    };
    let logits = model.step(&[segment]);
    model.release(sequence);
    logits
}

impl RoundingCost {
    fn between(rounded: &[f32], exact: &[f32], vocabulary: usize) -> Self {
        let likeliest = |row: &[f32]| (0..row.len()).max_by(|one, other| row[*one].total_cmp(&row[*other]));
        let (mut differences, mut spread) = (0.0, 0.0);
        let (mut tokens, mut other_likeliest) = (0, 0);
        for (rounded, exact) in rounded.chunks(vocabulary.max(1)).zip(exact.chunks(vocabulary.max(1))) {
            let mean = exact.iter().copied().map(f64::from).sum::<f64>() / exact.len() as f64;
            for (rounded, exact) in rounded.iter().zip(exact) {
                differences += (f64::from(*rounded) - f64::from(*exact)).powi(2);
                spread += (f64::from(*exact) - mean).powi(2);
            }
            tokens += 1;
            other_likeliest += usize::from(likeliest(rounded) != likeliest(exact));
        }
        Self { tokens, difference: (differences / spread).sqrt(), other_likeliest }
    }
}
