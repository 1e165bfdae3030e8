//! What happens to jobs, as it is told to whoever runs them: a line of a metrics file, a progress bar. Nothing here prints.

use serde::{Deserialize, Serialize};

/// Something that happened to a job.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
pub struct Event {
    /// The job's name.
    pub job: String,
    /// What.
    #[serde(flatten)]
    pub what: Happened,
}

/// What can happen. Losses are means in nats a target.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
#[serde(tag = "event", rename_all = "snake_case")]
pub enum Happened {
    /// It was added.
    Started {
        /// Steps that were done before, where it was resumed.
        step: u64,
        /// Steps in all.
        steps: u64,
        /// Numbers that are trained.
        parameters: usize,
        /// Tokens of its data.
        tokens: u64,
    },
    /// It made a step.
    Step {
        /// Which, from 1.
        step: u64,
        /// Steps in all.
        steps: u64,
        /// Before the step.
        loss: f64,
        /// The learning rate.
        rate: f64,
        /// The norm of all gradients, before it was clipped.
        norm: f64,
        /// Tokens of the step's batches.
        tokens: u64,
        /// Their targets.
        targets: u64,
    },
    /// It was evaluated.
    Evaluated {
        /// Steps that were done.
        step: u64,
        /// On the data that is held out.
        loss: f64,
        /// How many targets that has.
        targets: u64,
        /// Whether it is the best so far.
        best: bool,
    },
    /// Its state and its adapter, as far as they have a place, are on the disk.
    Saved {
        /// Steps that were done.
        step: u64,
    },
    /// They aren't; what was saved before is as it was, and the job goes on.
    NotSaved {
        /// Steps that were done.
        step: u64,
        /// Why.
        problem: String,
    },
    /// It is over.
    Ended {
        /// Steps that were done.
        step: u64,
        /// Why.
        reason: Ending,
    },
}

/// Why a job is over.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(tag = "reason", rename_all = "snake_case")]
pub enum Ending {
    /// All steps are done.
    Complete,
    /// The loss on held-out data hasn't fallen for as many evaluations as it was given.
    NoGain,
    /// It was told to stop.
    Stopped,
    /// Numbers that are not finite; what was saved is from before.
    NotFinite {
        /// Which.
        what: NotFinite,
    },
    /// The model or the adapter failed.
    Failed {
        /// How.
        problem: String,
    },
}

/// Numbers of a job that are not finite.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "snake_case")]
pub enum NotFinite {
    /// Of its batches.
    Loss,
    /// Of its parameters.
    Gradients,
    /// After a step.
    Parameters,
    /// Of the data that is held out.
    Evaluation,
}

impl std::fmt::Display for Ending {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        match self {
            Ending::Complete => f.write_str("all steps are done"),
            Ending::NoGain => f.write_str("the loss on held-out data falls no more"),
            Ending::Stopped => f.write_str("it was stopped"),
            Ending::NotFinite { what } => {
                let what = match what {
                    NotFinite::Loss => "its loss is",
                    NotFinite::Gradients => "its gradients are",
                    NotFinite::Parameters => "its parameters would be",
                    NotFinite::Evaluation => "its loss on held-out data is",
                };
                write!(f, "{what} not finite: try a lower learning rate")
            }
            Ending::Failed { problem } => f.write_str(problem),
        }
    }
}
