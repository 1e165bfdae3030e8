//! What a job is told, and whether it makes sense.

use flora_checkpoint::AdapterRequest;
use serde::{Deserialize, Serialize};

use crate::adamw::AdamW;
use crate::initial::Start;
use crate::schedule::Decay;

/// All that a job's numbers depend on beside its data and the model.
#[derive(Clone, Debug, PartialEq, Serialize)]
pub struct JobOptions {
    /// What it and its adapter's folder are called.
    pub name: String,
    /// The adapter.
    pub adapter: AdapterRequest,
    /// What it starts from.
    pub start: Start,
    /// Where random numbers come from: those of the start, and the order of the data.
    pub seed: u64,
    /// The highest learning rate.
    pub learning_rate: f64,
    /// How it falls.
    pub decay: Decay,
    /// Steps in which it rises.
    pub warmup: Warmup,
    /// How long the job goes on.
    pub length: Length,
    /// The most tokens of a sequence.
    pub sequence_length: usize,
    /// A batch has as many tokens as this number of longest sequences at most; more of shorter ones.
    pub batch: usize,
    /// Batches whose gradients make one step.
    pub accumulation: u32,
    /// The optimizer.
    pub optimizer: AdamW,
    /// What the norm of all gradients is brought down to; `None`: it is left as it is.
    pub largest_norm: Option<f64>,
    /// When it is evaluated, where it has data for that.
    pub evaluation: Evaluation,
    /// Steps from one saving to the next; `None`: it is saved at its end.
    pub save_every: Option<u64>,
}

/// How long a job goes on.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "snake_case")]
pub enum Length {
    /// So many steps.
    Steps(u64),
    /// So many times over its data.
    Epochs(u64),
}

/// How long the learning rate rises.
#[derive(Clone, Copy, Debug, PartialEq, Serialize, Deserialize)]
#[serde(rename_all = "snake_case")]
pub enum Warmup {
    /// So many steps.
    Steps(u64),
    /// This part of all steps, rounded up.
    Fraction(f64),
}

/// When a job is evaluated, and what follows.
#[derive(Clone, Copy, Debug, PartialEq, Serialize, Deserialize)]
pub struct Evaluation {
    /// Steps from one evaluation to the next. There is one at the start and one at the end, too.
    pub every: u64,
    /// Evaluations without a gain after which the job ends.
    pub patience: Option<u32>,
    /// The least fall of the loss, in nats a token, that is a gain.
    pub least_gain: f64,
}

/// An option that makes no sense.
#[derive(Clone, Debug, PartialEq, thiserror::Error)]
#[error("the job `{job}` has `{option}` = {value}; {expected}")]
pub struct OptionError {
    /// The job.
    pub job: String,
    /// The option.
    pub option: &'static str,
    /// Its value.
    pub value: String,
    /// What it must be.
    pub expected: &'static str,
}

/// The most epochs of a job.
const EPOCHS: u64 = 10_000;

impl JobOptions {
    /// Checks what can be checked without data and model.
    ///
    /// # Errors
    /// The first option that makes no sense.
    pub fn check(&self) -> Result<(), OptionError> {
        let AdamW { beta1, beta2, epsilon, weight_decay } = self.optimizer;
        let steps = match self.length {
            Length::Steps(steps) => steps,
            Length::Epochs(epochs) if epochs > EPOCHS => 0,
            Length::Epochs(epochs) => epochs,
        };
        let warmup = match self.warmup {
            Warmup::Steps(_) => 0.0,
            Warmup::Fraction(fraction) => fraction,
        };
        let plain = |name: &str| {
            let mut parts = std::path::Path::new(name).components();
            matches!((parts.next(), parts.next()), (Some(std::path::Component::Normal(_)), None))
        };
        let positive = |number: f64| number > 0.0 && number.is_finite();
        let not_negative = |number: f64| number >= 0.0 && number.is_finite();
        let fraction = |number: f64| (0.0..1.0).contains(&number);
        let every = self.evaluation.every;
        let rules: [(bool, &'static str, String, &'static str); 14] = [
            (plain(&self.name), "name", format!("{:?}", self.name), "it must be a plain folder name"),
            (
                not_negative(self.learning_rate),
                "learning_rate",
                self.learning_rate.to_string(),
                "it must be at least 0",
            ),
            (
                steps > 0,
                "length",
                format!("{:?}", self.length),
                "it must be at least 1 step or epoch, and 10000 epochs at most",
            ),
            ((0.0..=1.0).contains(&warmup), "warmup", warmup.to_string(), "a part must lie between 0 and 1"),
            (self.sequence_length > 0, "sequence_length", self.sequence_length.to_string(), "it must be at least 1"),
            (self.batch > 0, "batch", self.batch.to_string(), "it must be at least 1"),
            (self.accumulation > 0, "accumulation", self.accumulation.to_string(), "it must be at least 1"),
            (
                fraction(beta1) && fraction(beta2),
                "betas",
                format!("{beta1}, {beta2}"),
                "each must be at least 0 and below 1",
            ),
            (positive(epsilon), "epsilon", epsilon.to_string(), "it must be above 0"),
            (not_negative(weight_decay), "weight_decay", weight_decay.to_string(), "it must be at least 0"),
            (
                self.largest_norm.is_none_or(positive),
                "largest_norm",
                self.largest_norm.unwrap_or_default().to_string(),
                "it must be above 0; leave it out to clip nothing",
            ),
            (every > 0, "evaluate_every", every.to_string(), "it must be at least 1"),
            (
                not_negative(self.evaluation.least_gain),
                "least_gain",
                self.evaluation.least_gain.to_string(),
                "it must be at least 0",
            ),
            (
                self.save_every != Some(0) && self.evaluation.patience != Some(0),
                "save_every or patience",
                "0".to_owned(),
                "it must be at least 1; leave it out for none",
            ),
        ];
        match rules.into_iter().find(|(holds, ..)| !holds) {
            None => Ok(()),
            Some((_, option, value, expected)) => Err(OptionError { job: self.name.clone(), option, value, expected }),
        }
    }

    /// The most tokens of a batch.
    pub fn batch_tokens(&self) -> usize {
        self.batch.saturating_mul(self.sequence_length)
    }
}

impl Warmup {
    /// In steps, of `steps` in all.
    pub fn steps(self, steps: u64) -> u64 {
        match self {
            Warmup::Steps(warmup) => warmup,
            Warmup::Fraction(fraction) => (steps as f64 * fraction).ceil() as u64,
        }
    }
}
