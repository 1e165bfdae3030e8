//! Changes the logits of a sequence by what its request asks: biases, penalties, and stop tokens that may not come yet.

use std::collections::HashMap;

use crate::request::LogitRules;

/// The rules of one request, with the counts of the tokens that they look at.
#[derive(Debug)]
pub(crate) struct Reshaper {
    rules: LogitRules,
    stop_tokens: Vec<u32>,
    /// How often each token was generated; tokens of the prompt are there too, with 0. Empty where no penalty asks for it.
    counts: HashMap<u32, u32>,
    generated: u32,
}

impl Reshaper {
    pub(crate) fn new(rules: LogitRules, prompt: &[u32], stop_tokens: &[u32]) -> Self {
        let counts = match rules.repetition_penalty == 1.0 {
            true => HashMap::new(),
            false => prompt.iter().map(|token| (*token, 0)).collect(),
        };
        let stop_tokens = if rules.min_tokens == 0 { Vec::new() } else { stop_tokens.to_vec() };
        Self { rules, stop_tokens, counts, generated: 0 }
    }

    /// Whether logits stay as they are.
    pub(crate) fn is_idle(&self) -> bool {
        let LogitRules { repetition_penalty, presence_penalty, frequency_penalty, bias, min_tokens, .. } = &self.rules;
        bias.is_empty()
            && *repetition_penalty == 1.0
            && *presence_penalty == 0.0
            && *frequency_penalty == 0.0
            && self.generated >= *min_tokens
    }

    /// Whether fewer tokens than [`LogitRules::min_tokens`] were generated.
    pub(crate) fn may_not_stop(&self) -> bool {
        self.generated < self.rules.min_tokens
    }

    /// Changes the logits of the next token.
    pub(crate) fn reshape(&self, logits: &mut [f32]) {
        let rules = &self.rules;
        if self.may_not_stop() {
            for token in &self.stop_tokens {
                set(logits, *token, |_| f32::NEG_INFINITY);
            }
        }
        for (token, bias) in &rules.bias {
            set(logits, *token, |logit| logit + bias);
        }
        // One token each, so that no order of the counts is seen.
        for (token, count) in &self.counts {
            set(logits, *token, |logit| {
                let penalty = rules.repetition_penalty;
                let logit = if logit > 0.0 { logit / penalty } else { logit * penalty };
                if *count == 0 {
                    return logit;
                }
                logit - rules.frequency_penalty * *count as f32 - rules.presence_penalty
            });
        }
    }

    /// Notes a token that was generated.
    pub(crate) fn note(&mut self, token: u32) {
        self.generated = self.generated.saturating_add(1);
        let LogitRules { repetition_penalty, presence_penalty, frequency_penalty, .. } = &self.rules;
        if *repetition_penalty != 1.0 || *presence_penalty != 0.0 || *frequency_penalty != 0.0 {
            *self.counts.entry(token).or_default() += 1;
        }
    }
}

/// Changes one logit; a stop token may be one that the model has no logit for. A penalty makes no logit infinite.
fn set(logits: &mut [f32], token: u32, change: impl FnOnce(f32) -> f32) {
    if let Some(logit) = logits.get_mut(token as usize) {
        let changed = change(*logit);
        *logit = if logit.is_finite() { changed.min(f32::MAX) } else { changed };
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn reshaped(rules: LogitRules, prompt: &[u32], said: &[u32], logits: [f32; 4]) -> [f32; 4] {
        let mut reshaper = Reshaper::new(rules, prompt, &[3]);
        for token in said {
            reshaper.note(*token);
        }
        let mut changed = logits;
        reshaper.reshape(&mut changed);
        assert!(!reshaper.is_idle() || changed == logits);
        changed
    }

    #[test]
    fn nothing_is_changed_unless_it_is_asked_for() {
        let logits = [1.0, -1.0, 0.0, f32::NEG_INFINITY];
        assert_eq!(reshaped(LogitRules::default(), &[0, 1], &[1, 1], logits), logits);
        assert!(Reshaper::new(LogitRules::default(), &[0], &[3]).is_idle());
    }

    #[test]
    fn repetition_divides_what_is_likely_and_multiplies_what_is_not() {
        let rules = LogitRules { repetition_penalty: 2.0, ..LogitRules::default() };
        assert_eq!(reshaped(rules, &[0], &[1], [4.0, -4.0, 4.0, -4.0]), [2.0, -8.0, 4.0, -4.0]);
    }

    #[test]
    fn presence_and_frequency_look_at_what_was_generated_alone() {
        let rules = LogitRules { presence_penalty: 0.5, frequency_penalty: 0.25, ..LogitRules::default() };
        assert_eq!(reshaped(rules, &[0], &[1, 2, 1], [1.0; 4]), [1.0, 0.0, 0.25, 1.0]);
        let rules = LogitRules { frequency_penalty: -1.0, ..LogitRules::default() };
        assert_eq!(reshaped(rules, &[], &[1, 1], [1.0; 4]), [1.0, 3.0, 1.0, 1.0]);
    }

    #[test]
    fn biases_come_before_penalties() {
        let rules =
            LogitRules { bias: vec![(0, -3.0), (1, 2.0), (9, 1.0)], repetition_penalty: 2.0, ..LogitRules::default() };
        assert_eq!(reshaped(rules, &[0], &[], [1.0; 4]), [-4.0, 3.0, 1.0, 1.0]);
    }

    #[test]
    fn stop_tokens_may_not_come_before_the_least_number() {
        let rules = |min_tokens| LogitRules { min_tokens, ..LogitRules::default() };
        assert_eq!(reshaped(rules(2), &[], &[1], [1.0; 4]), [1.0, 1.0, 1.0, f32::NEG_INFINITY]);
        assert_eq!(reshaped(rules(2), &[], &[1, 1], [1.0; 4]), [1.0; 4]);
    }
}
