//! Training after the fit: an ordinary job that begins with what was fitted. Its targets are the text's own tokens and not the LoRA
//! adapter's probabilities, which the trainer has no place for.

use std::path::{Path, PathBuf};
use std::sync::Arc;

use flora_adapters::Layers;
use flora_checkpoint::{AdapterFolder, AdapterRequest};
use flora_model::TrainedModel;
use flora_train::{
    AdamW, Adapter, Dataset, Decay, Ending, Evaluation, JobOptions, Length, NewJob, Places, Start, Trainer, Warmup,
};

use super::BATCH;
use crate::commands::error::CommandError;

/// How it is trained.
pub(super) struct Job {
    pub(super) name: String,
    pub(super) steps: u64,
    pub(super) learning_rate: f64,
    pub(super) sequence_length: usize,
    pub(super) request: AdapterRequest,
}

/// The adapter of the folder `fitted`, trained, in that folder; and the model.
pub(super) fn distil(
    decoder: TrainedModel,
    layers: &Layers,
    fitted: &Path,
    job: Job,
    data: Dataset,
) -> Result<(TrainedModel, Adapter), CommandError> {
    let Job { name, steps, learning_rate, sequence_length, request } = job;
    let options = JobOptions {
        name: name.clone(),
        adapter: request,
        start: Start::Default,
        seed: 1,
        learning_rate,
        decay: Decay::Cosine,
        warmup: Warmup::Fraction(0.05),
        length: Length::Steps(steps),
        sequence_length,
        batch: BATCH,
        accumulation: 1,
        optimizer: AdamW::default(),
        largest_norm: Some(1.0),
        evaluation: Evaluation { every: steps.max(1), patience: None, least_gain: 0.0 },
        save_every: None,
    };
    let begin = Some(AdapterFolder::open(fitted, layers.kinds())?);
    let adapters = fitted.parent().map(PathBuf::from);
    let budget = options.batch_tokens();
    let job = NewJob { options, data: Arc::new(data), held_out: None, begin, places: Places { adapters, state: None } };
    let mut trainer = Trainer::new(decoder, budget);
    trainer.add(job, Path::new("the command line"), layers)?;
    while !trainer.is_idle() {
        trainer.step();
    }
    let not_trained = |reason: String| CommandError::NotTrained { job: name.clone(), reason };
    let ended = trainer.take_ended().pop().ok_or_else(|| not_trained("it never ended".to_owned()))?;
    match ended.reason {
        Ending::Complete => Ok((trainer.into_trainee(), ended.adapter)),
        reason => Err(not_trained(reason.to_string())),
    }
}
