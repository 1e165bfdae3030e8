//! The learning rate of every step: the schedules of Hugging Face's transformers (`get_scheduler`), so that a recipe that was
//! written for it means the same here.

use serde::{Deserialize, Serialize};

/// How the learning rate changes.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "snake_case")]
pub enum Decay {
    /// It stays as it is.
    #[default]
    Constant,
    /// In a straight line to 0 at the end.
    Linear,
    /// By half a cosine to 0 at the end.
    Cosine,
}

/// A learning rate over a job's steps.
#[derive(Clone, Copy, Debug, PartialEq)]
pub struct Schedule {
    /// The highest rate.
    pub rate: f64,
    /// After the warm-up.
    pub decay: Decay,
    /// Steps in which the rate rises from 0 in a straight line; the first of them has the rate 0.
    pub warmup: u64,
    /// All steps, those of the warm-up among them.
    pub steps: u64,
}

impl Schedule {
    /// The rate of the step that `done` steps precede.
    pub fn rate(&self, done: u64) -> f64 {
        let ratio = |part: u64, whole: u64| part as f64 / whole.max(1) as f64;
        if done < self.warmup {
            return self.rate * ratio(done, self.warmup);
        }
        let span = self.steps.saturating_sub(self.warmup);
        self.rate
            * match self.decay {
                Decay::Constant => 1.0,
                Decay::Linear => ratio(self.steps.saturating_sub(done), span),
                Decay::Cosine => {
                    let progress = ratio(done - self.warmup, span);
                    (0.5 * (1.0 + (std::f64::consts::PI * progress).cos())).max(0.0)
                }
            }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    /// What transformers 5.24 gives for 12 steps, 4 of them warm-up, at a rate of 1.
    #[test]
    fn rates_are_those_of_transformers() {
        let warm = [0.0, 0.25, 0.5, 0.75];
        let linear = [1.0, 0.875, 0.75, 0.625, 0.5, 0.375, 0.25, 0.125];
        let cosine = [
            1.0,
            0.9619397662556434,
            0.8535533905932737,
            0.6913417161825449,
            0.5,
            0.3086582838174551,
            0.14644660940672627,
            0.03806023374435663,
        ];
        for (decay, rest) in [(Decay::Constant, [1.0; 8]), (Decay::Linear, linear), (Decay::Cosine, cosine)] {
            let schedule = Schedule { rate: 1.0, decay, warmup: 4, steps: 12 };
            for (done, expected) in (0..).zip(warm.into_iter().chain(rest)) {
                let rate = schedule.rate(done);
                assert!((rate - expected).abs() < 1e-15, "{decay:?} after {done}: {rate}, not {expected}");
            }
        }
    }

    #[test]
    fn no_length_gives_a_rate_that_is_no_number() {
        for decay in [Decay::Constant, Decay::Linear, Decay::Cosine] {
            for (warmup, steps) in [(0, 0), (0, 1), (1, 1), (5, 3), (u64::MAX, u64::MAX)] {
                for done in [0, 1, 2, 7] {
                    let rate = Schedule { rate: 0.1, decay, warmup, steps }.rate(done);
                    assert!((0.0..=0.1).contains(&rate), "{decay:?} {warmup} {steps} {done}: {rate}");
                }
            }
        }
    }
}
