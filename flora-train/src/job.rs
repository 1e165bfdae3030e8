//! One job: its adapter, its optimizer, where it is in its data, and what a step makes of gradients. It knows nothing of others.

use std::path::PathBuf;
use std::sync::Arc;

use flora_ir::algebra::{FoldError, FoldedAdapter};
use flora_ir::gradient::FoldedGradient;
use serde::{Deserialize, Serialize};

use crate::adamw::{Moments, clipping, global_norm};
use crate::adapter::Adapter;
use crate::data::{Dataset, Order, Position, Sequence};
use crate::event::{Ending, Happened, NotFinite};
use crate::options::{JobOptions, Length};
use crate::schedule::Schedule;
use crate::trainee::{JobId, SegmentLoss};

/// Where a job keeps what it makes.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct Places {
    /// The folder in which the adapter's folder is, named as the job.
    pub adapters: Option<PathBuf>,
    /// The file that the job's state is saved in.
    pub state: Option<PathBuf>,
}

/// How far a job is.
#[derive(Clone, Debug, Default, PartialEq, Serialize, Deserialize)]
pub(crate) struct Progress {
    /// Steps that are done.
    pub(crate) step: u64,
    /// In its data, after the last step: batches of a step that isn't complete are learnt again.
    pub(crate) position: Position,
    /// The step at which it was evaluated last.
    pub(crate) evaluated: Option<u64>,
    /// The least loss on held-out data.
    pub(crate) best: Option<f64>,
    /// Evaluations since then.
    pub(crate) without_gain: u32,
    pub(crate) ended: Option<Ending>,
}

/// Gradients of the batches of a step that isn't complete.
#[derive(Debug, Default)]
struct Gathered {
    /// After the batches that are in it; `None` before the first.
    position: Option<Position>,
    batches: u32,
    /// Sums, by parameter.
    gradients: Vec<Vec<f64>>,
    nats: f64,
    targets: u64,
    tokens: u64,
}

/// A job under way.
#[derive(Debug)]
pub(crate) struct Job {
    pub(crate) id: JobId,
    pub(crate) options: JobOptions,
    pub(crate) places: Places,
    pub(crate) adapter: Adapter,
    /// By parameter.
    pub(crate) moments: Vec<Moments>,
    /// The parameters at the best evaluation.
    pub(crate) best: Option<Vec<Vec<f32>>>,
    pub(crate) progress: Progress,
    pub(crate) data: Arc<Dataset>,
    pub(crate) held_out: Option<Arc<Dataset>>,
    /// Which model it is for, where its state is kept.
    pub(crate) model: Option<Arc<str>>,
    pub(crate) schedule: Schedule,
    order: Order,
    gathered: Gathered,
}

impl Job {
    pub(crate) fn new(
        id: JobId,
        options: JobOptions,
        places: Places,
        adapter: Adapter,
        data: Arc<Dataset>,
        held_out: Option<Arc<Dataset>>,
    ) -> Self {
        let mut order = Order::new(&data, options.seed, options.batch_tokens());
        let steps = match options.length {
            Length::Steps(steps) => steps,
            Length::Epochs(epochs) => {
                let batches: u64 = (0..epochs).map(|epoch| order.batches(epoch)).sum();
                batches.div_ceil(u64::from(options.accumulation))
            }
        };
        let schedule =
            Schedule { rate: options.learning_rate, decay: options.decay, warmup: options.warmup.steps(steps), steps };
        let moments = adapter.parameters().map(|parameter| Moments::zeros(parameter.values.values.len())).collect();
        Self {
            id,
            options,
            places,
            adapter,
            moments,
            best: None,
            progress: Progress::default(),
            data,
            held_out,
            model: None,
            schedule,
            order,
            gathered: Gathered::default(),
        }
    }

    /// In its data, after the batches of the step that isn't complete.
    fn position(&self) -> Position {
        self.gathered.position.unwrap_or(self.progress.position)
    }

    /// The sequences of its next batch.
    pub(crate) fn batch(&mut self) -> Vec<usize> {
        self.order.batch(self.position()).0
    }

    pub(crate) fn sequence(&self, index: usize) -> Option<&Sequence> {
        self.data.sequences().get(index)
    }

    /// The most tokens of its next batch.
    pub(crate) fn next_tokens(&mut self) -> usize {
        let batch = self.batch();
        batch.iter().filter_map(|index| self.sequence(*index)).map(|sequence| sequence.tokens.len()).sum()
    }

    /// Adds what its next batch gave. Once the step is complete, that is made: the adapter to be placed from now on, and the event.
    pub(crate) fn learn(
        &mut self,
        losses: &[SegmentLoss],
        gradients: &[FoldedGradient],
    ) -> Result<Option<(Happened, Folded)>, Ending> {
        let tokens = self.next_tokens() as u64;
        self.gather(losses, gradients, tokens)?;
        let is_last = match self.options.length {
            Length::Epochs(epochs) => self.position().epoch >= epochs,
            Length::Steps(_) => false,
        };
        match self.gathered.batches >= self.options.accumulation || is_last {
            true => self.make_step().map(Some),
            false => Ok(None),
        }
    }

    fn gather(&mut self, losses: &[SegmentLoss], gradients: &[FoldedGradient], tokens: u64) -> Result<(), Ending> {
        let unfolded = self.adapter.unfold(gradients).map_err(failed)?;
        let next = self.order.batch(self.position()).1;
        let gathered = &mut self.gathered;
        gathered.position = Some(next);
        if gathered.batches == 0 {
            gathered.gradients = unfolded;
        } else {
            for (sum, gradient) in gathered.gradients.iter_mut().zip(unfolded) {
                sum.iter_mut().zip(gradient).for_each(|(sum, gradient)| *sum += gradient);
            }
        }
        gathered.batches += 1;
        gathered.tokens += tokens;
        gathered.nats += losses.iter().map(|loss| loss.nats).sum::<f64>();
        gathered.targets += losses.iter().map(|loss| loss.targets).sum::<u64>();
        Ok(())
    }

    fn make_step(&mut self) -> Result<(Happened, Folded), Ending> {
        let position = self.position();
        let Gathered { gradients, nats, targets, tokens, .. } = std::mem::take(&mut self.gathered);
        let not_finite = |what| Ending::NotFinite { what };
        // Every sequence has a target.
        let mean = 1.0 / targets.max(1) as f64;
        let loss = nats * mean;
        if !loss.is_finite() {
            return Err(not_finite(NotFinite::Loss));
        }
        let norm = global_norm(gradients.iter().map(Vec::as_slice)) * mean;
        if !norm.is_finite() {
            return Err(not_finite(NotFinite::Gradients));
        }
        let scale = mean * clipping(norm, self.options.largest_norm);
        let rate = self.schedule.rate(self.progress.step);
        let step = self.progress.step + 1;
        let before = self.values();
        for ((values, gradient), moments) in self.adapter.values_mut().zip(&gradients).zip(&mut self.moments) {
            self.options.optimizer.update(step, rate, values, gradient, scale, moments);
        }
        let is_finite = self.adapter.parameters().all(|own| own.values.values.iter().all(|value| value.is_finite()));
        let folded = match is_finite {
            true => self.adapter.fold().map_err(|error| match error {
                FoldError::NotFinite { .. } => not_finite(NotFinite::Parameters),
                error => failed(error),
            }),
            false => Err(not_finite(NotFinite::Parameters)),
        };
        let folded = folded.inspect_err(|_| set(&mut self.adapter, before))?;
        (self.progress.step, self.progress.position) = (step, position);
        let steps = self.schedule.steps;
        Ok((Happened::Step { step, steps, loss, rate, norm, tokens, targets }, folded))
    }

    /// Whether all steps are done.
    pub(crate) fn is_complete(&self) -> bool {
        self.progress.step >= self.schedule.steps
    }

    /// Whether it is time to evaluate it.
    pub(crate) fn evaluation_is_due(&self) -> bool {
        let Progress { step, evaluated, .. } = self.progress;
        let is_time = step.is_multiple_of(self.options.evaluation.every) || self.is_complete();
        self.held_out.is_some() && evaluated != Some(step) && is_time
    }

    /// Whether it is time to save it.
    pub(crate) fn saving_is_due(&self) -> bool {
        self.options.save_every.is_some_and(|every| self.progress.step.is_multiple_of(every))
    }

    /// Takes the loss on held-out data; whether that is a gain, and whether the job is over for want of one.
    pub(crate) fn judge(&mut self, loss: f64) -> Result<bool, Ending> {
        self.progress.evaluated = Some(self.progress.step);
        if !loss.is_finite() {
            return Err(Ending::NotFinite { what: NotFinite::Evaluation });
        }
        let evaluation = self.options.evaluation;
        let is_gain = self.progress.best.is_none_or(|best| loss < best - evaluation.least_gain);
        if is_gain {
            self.progress.best = Some(loss);
            self.progress.without_gain = 0;
            self.best = Some(self.values());
        } else {
            self.progress.without_gain += 1;
        }
        Ok(is_gain)
    }

    /// Whether its patience is at an end.
    pub(crate) fn gains_nothing(&self) -> bool {
        self.options.evaluation.patience.is_some_and(|patience| self.progress.without_gain >= patience)
    }

    /// The adapter at the best evaluation; without evaluations, as it is.
    pub(crate) fn result(&self) -> Adapter {
        let mut adapter = self.adapter.clone();
        if let Some(best) = &self.best {
            set(&mut adapter, best.clone());
        }
        adapter
    }

    /// The numbers of all parameters.
    pub(crate) fn values(&self) -> Vec<Vec<f32>> {
        self.adapter.parameters().map(|parameter| parameter.values.values.clone()).collect()
    }
}

/// What the model's layers get.
pub(crate) type Folded = Vec<(usize, FoldedAdapter)>;

pub(crate) fn set(adapter: &mut Adapter, values: Vec<Vec<f32>>) {
    adapter.values_mut().zip(values).for_each(|(own, values)| *own = values);
}

pub(crate) fn failed(error: impl std::error::Error) -> Ending {
    Ending::Failed { problem: error.to_string() }
}
