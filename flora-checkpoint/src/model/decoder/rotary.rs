//! Rotary positions: what a file says of them becomes a base and a scaling, these become the frequency of every pair of a head and a
//! factor. A decoder takes the frequencies as they are, whatever they come from. Everything is f64 until angles are taken.

mod config;
mod gguf;

use super::ModelError;
use crate::model::Model;
use crate::model::settings::Settings;

/// How queries and keys turn with their positions: pair i of a head turns by position · [its frequency](RotaryFrequencies).
#[derive(Clone, Debug, PartialEq)]
pub struct Rotary {
    /// θ; pair i of a head of h numbers has the frequency θ^(−2i/h) before it is scaled.
    pub base: f64,
    /// What becomes of the frequencies.
    pub scaling: RotaryScaling,
}

/// What becomes of the frequencies in a model that was made for longer texts than it was first trained on.
#[derive(Clone, Debug, PartialEq)]
#[non_exhaustive]
pub enum RotaryScaling {
    /// They stay.
    None,
    /// All are divided.
    Linear {
        /// By this.
        factor: f64,
    },
    /// Llama 3.1's: those that turn seldom within the original context are divided, those that turn often stay, and those between are
    /// mixed by how often they turn.
    Llama3 {
        /// What slow ones are divided by.
        factor: f64,
        /// Fewer turns within the original context are slow.
        low_frequency_factor: f64,
        /// More turns within the original context are fast; above `low_frequency_factor`.
        high_frequency_factor: f64,
        /// Positions that the model was first trained on.
        original_context: f64,
    },
    /// YaRN: as Llama 3.1's, mixed along the pairs of a head, and attention is sharpened.
    Yarn(Yarn),
    /// Each is divided by a number of its own.
    Divided {
        /// `[head size / 2]`
        divisors: Vec<f64>,
    },
}

/// YaRN's settings.
#[derive(Clone, Debug, PartialEq)]
pub struct Yarn {
    /// What slow frequencies are divided by.
    pub factor: f64,
    /// Positions that the model was first trained on.
    pub original_context: f64,
    /// What turned queries and keys are multiplied by.
    pub attention_factor: f64,
    /// Pairs that turn more often within the original context are fast.
    pub beta_fast: f64,
    /// Pairs that turn less often within the original context are slow.
    pub beta_slow: f64,
    /// Whether the bounds between slow and fast pairs are whole pairs.
    pub truncate: bool,
}

impl Yarn {
    const BETA_FAST: f64 = 32.0;
    const BETA_SLOW: f64 = 1.0;

    /// The factor of attention that belongs to a factor of frequencies, `strength` being 1 where a model doesn't say otherwise.
    fn magnitude(factor: f64, strength: f64) -> f64 {
        if factor <= 1.0 { 1.0 } else { 0.1 * strength * factor.ln() + 1.0 }
    }

    /// The pair, counted in fractions, that turns `turns` times within the original context.
    fn pair_of(&self, turns: f64, base: f64, head_size: usize) -> f64 {
        head_size as f64 * (self.original_context / (turns * std::f64::consts::TAU)).ln() / (2.0 * base.ln())
    }

    fn scaled(&self, frequency: f64, pair: usize, base: f64, head_size: usize) -> f64 {
        let (low, high) =
            (self.pair_of(self.beta_fast, base, head_size), self.pair_of(self.beta_slow, base, head_size));
        let (low, high) = if self.truncate { (low.floor(), high.ceil()) } else { (low, high) };
        let (low, high) = (low.max(0.0), high.min(head_size as f64 - 1.0));
        // transformers' way around a division by 0.
        let width = if low == high { 0.001 } else { high - low };
        let slow = ((pair as f64 - low) / width).clamp(0.0, 1.0);
        frequency / self.factor * slow + frequency * (1.0 - slow)
    }
}

/// The frequencies of a head's pairs.
#[derive(Clone, Debug, PartialEq)]
pub struct RotaryFrequencies {
    /// `[head size / 2]`: by how much a pair turns from one position to the next.
    pub frequencies: Vec<f64>,
    /// What turned queries and keys are multiplied by.
    pub attention_factor: f64,
}

impl Rotary {
    /// Those of a head of `head_size` numbers, an even number, as transformers defines them.
    pub fn frequencies(&self, head_size: usize) -> RotaryFrequencies {
        let one = |pair: usize| {
            let frequency = self.base.powf(-2.0 * pair as f64 / head_size as f64);
            match &self.scaling {
                RotaryScaling::None => frequency,
                RotaryScaling::Linear { factor } => frequency / factor,
                RotaryScaling::Llama3 {
                    factor,
                    low_frequency_factor: low,
                    high_frequency_factor: high,
                    original_context,
                } => {
                    let turns = original_context * frequency / std::f64::consts::TAU;
                    let fast = ((turns - low) / (high - low)).clamp(0.0, 1.0);
                    (1.0 - fast) * frequency / factor + fast * frequency
                }
                RotaryScaling::Yarn(yarn) => yarn.scaled(frequency, pair, self.base, head_size),
                RotaryScaling::Divided { divisors } => frequency / divisors.get(pair).copied().unwrap_or(1.0),
            }
        };
        let attention_factor = match &self.scaling {
            RotaryScaling::Yarn(yarn) => yarn.attention_factor,
            _ => 1.0,
        };
        RotaryFrequencies { frequencies: (0..head_size / 2).map(one).collect(), attention_factor }
    }

    /// What the model's files say.
    pub(super) fn read(model: &Model, head_size: usize, context_length: usize) -> Result<Rotary, ModelError> {
        let settings = &*model.settings;
        let rotary = match settings {
            Settings::Gguf { .. } => gguf::read(model, head_size, context_length)?,
            Settings::Config { .. } => config::read(settings, context_length)?,
        };
        let RotaryFrequencies { frequencies, attention_factor } = rotary.frequencies(head_size);
        let finite = attention_factor.is_finite() && frequencies.iter().all(|frequency| frequency.is_finite());
        // YaRN takes logarithms to the base.
        if finite && (rotary.base > 1.0 || !matches!(rotary.scaling, RotaryScaling::Yarn(_))) {
            return Ok(rotary);
        }
        let problem = format!("and the scaling make frequencies that are no numbers: {rotary:?}");
        Err(settings.error(&settings.name(super::llama::ROPE_BASE), problem))
    }
}

/// The scalings that are known, for messages.
const KNOWN: &str = "default, linear, dynamic, llama3 and yarn";

#[cfg(test)]
mod tests {
    use super::*;

    fn frequencies(scaling: RotaryScaling) -> Vec<f64> {
        Rotary { base: 10_000.0, scaling }.frequencies(8).frequencies
    }

    #[test]
    fn fast_pairs_stay_and_slow_ones_are_divided() {
        let plain = frequencies(RotaryScaling::None);
        let near = |found: &[f64], right: [f64; 4]| {
            let near = found.iter().zip(right).all(|(found, right)| (found - right).abs() < 1e-15);
            assert!(near, "{found:?}, not {right:?}");
        };
        near(&plain, [1.0, 0.1, 0.01, 0.001]);
        let llama = frequencies(RotaryScaling::Llama3 {
            factor: 8.0,
            low_frequency_factor: 1.0,
            high_frequency_factor: 4.0,
            original_context: 128.0,
        });
        // 20.4, 2.04, 0.2 and 0.02 turns.
        let turns = 12.8 / std::f64::consts::TAU;
        let between = (turns - 1.0) / 3.0;
        near(&llama, [1.0, (1.0 - between) * 0.1 / 8.0 + between * 0.1, 0.01 / 8.0, 0.001 / 8.0]);
        near(&frequencies(RotaryScaling::Linear { factor: 4.0 }), [0.25, 0.025, 0.0025, 0.00025]);
        let divisors = vec![1.0, 2.0, 4.0, 8.0];
        near(&frequencies(RotaryScaling::Divided { divisors }), [1.0, 0.05, 0.0025, 0.000125]);
    }
}
