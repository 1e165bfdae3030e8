//! Jobs of one language in shared batches, and how each of them does. What is known of a job is a file, so that what was killed goes
//! on: a job from its saved state, a score by not being taken again.

use std::path::{Path, PathBuf};
use std::sync::Arc;
use std::time::Instant;

use flora_adapters::Layers;
use flora_model::TrainedModel;
use flora_train::{Adapter, Dataset, Ending, Happened, JobId, JobOptions, NewJob, Places, Trainee, Trainer};
use serde::{Deserialize, Serialize};
use serde_json::{Value, json};

use super::excerpt::{Excerpts, FileScore};
use crate::commands::error::CommandError;
use crate::commands::output;

/// What is known of one adapter, and of what it is known.
#[derive(Clone, Debug, Serialize, Deserialize)]
pub(super) struct Scored {
    /// The job's options, its data, the model and what it is held against; of the base model no job.
    identity: Value,
    /// Numbers that are trained.
    pub(super) parameters: usize,
    /// Why the job ended; `None` for the base model.
    pub(super) ended: Option<Ending>,
    pub(super) files: Vec<FileScore>,
}

impl Scored {
    /// Bits a byte over all files.
    pub(super) fn bits_per_byte(&self) -> f64 {
        let nats: f64 = self.files.iter().map(|file| file.nats).sum();
        nats / std::f64::consts::LN_2 / self.files.iter().map(|file| file.bytes).sum::<usize>() as f64
    }

    /// The part of the lines that greedy decoding writes; NaN where there is none.
    pub(super) fn exact(&self) -> f64 {
        let sum = |of: fn(&FileScore) -> usize| self.files.iter().map(of).sum::<usize>() as f64;
        sum(|file| file.exact) / sum(|file| file.lines)
    }
}

/// What all jobs of one language share.
pub(super) struct Workshop<'a> {
    pub(super) layers: &'a Layers,
    /// Where states, adapters and scores are.
    pub(super) folder: PathBuf,
    /// Which model it is, for the identity of scores.
    pub(super) model_name: String,
    pub(super) data: Arc<Dataset>,
    /// The most tokens of a batch.
    pub(super) tokens: usize,
}

impl Workshop<'_> {
    /// The scores of these jobs on `excerpts`, trained as far as they aren't yet. Gives the model back, without adapters.
    pub(super) fn run(
        &self,
        model: TrainedModel,
        jobs: &[JobOptions],
        excerpts: &Excerpts,
    ) -> Result<(TrainedModel, Vec<Scored>), CommandError> {
        let known = jobs.iter().map(|job| self.known(&job.name, &self.identity(Some(job), excerpts)));
        let mut scores = known.collect::<Result<Vec<_>, _>>()?;
        let open: Vec<usize> = (0..jobs.len()).filter(|index| scores[*index].is_none()).collect();
        let mut trainer = Trainer::new(model, self.tokens);
        for index in &open {
            let options = jobs[*index].clone();
            let places = Places {
                adapters: Some(self.folder.join("adapters")),
                state: Some(self.folder.join("states").join(format!("{}.safetensors", options.name))),
            };
            let job = NewJob { options, data: Arc::clone(&self.data), held_out: None, begin: None, places };
            trainer.add(job, Path::new("the plan"), self.layers)?;
        }
        let (began, mut tokens) = (Instant::now(), 0);
        let mut ended = Vec::new();
        while !trainer.is_idle() {
            for event in trainer.step() {
                match event.what {
                    Happened::Step { tokens: own, .. } => tokens += own,
                    // One that had ended before has nothing to tell.
                    Happened::Ended { step, reason } if tokens > 0 => {
                        let speed = tokens as f64 / began.elapsed().as_secs_f64().max(1e-9);
                        let name = &event.job;
                        output::note(&format!("{name}: step {step}, {reason}; all jobs together {speed:.0} tokens/s"));
                    }
                    Happened::NotSaved { problem, .. } => {
                        output::note(&format!("{}: not saved: {problem}", event.job));
                    }
                    _ => {}
                }
            }
            ended.extend(trainer.take_ended());
        }
        let mut model = trainer.into_trainee();
        for index in open {
            let (job, options) = (ended.iter().find(|job| job.name == jobs[index].name), &jobs[index]);
            let not_trained = |reason: String| CommandError::NotTrained { job: options.name.clone(), reason };
            let job = job.ok_or_else(|| not_trained("it never ended".to_owned()))?;
            if let Ending::Failed { problem } = &job.reason {
                return Err(not_trained(problem.clone()));
            }
            let files = self.score(&mut model, &job.adapter, excerpts).map_err(|error| match error {
                ScoreError::Fold(problem) => not_trained(problem),
                ScoreError::Model(error) => error,
            })?;
            let (parameters, ended) = (job.adapter.size(), Some(job.reason.clone()));
            let scored = Scored { identity: self.identity(Some(options), excerpts), parameters, ended, files };
            self.keep(&options.name, &scored)?;
            output::note(&format!("{}: {:.4} bits a byte", options.name, scored.bits_per_byte()));
            scores[index] = Some(scored);
        }
        Ok((model, scores.into_iter().flatten().collect()))
    }

    /// The score of the base model.
    pub(super) fn base(&self, model: &TrainedModel, name: &str, excerpts: &Excerpts) -> Result<Scored, CommandError> {
        let identity = self.identity(None, excerpts);
        if let Some(known) = self.known(name, &identity)? {
            return Ok(known);
        }
        let files = excerpts.score(model, None, self.tokens)?;
        let scored = Scored { identity, parameters: 0, ended: None, files };
        self.keep(name, &scored)?;
        output::note(&format!("{name}: {:.4} bits a byte", scored.bits_per_byte()));
        Ok(scored)
    }

    fn score(
        &self,
        model: &mut TrainedModel,
        adapter: &Adapter,
        excerpts: &Excerpts,
    ) -> Result<Vec<FileScore>, ScoreError> {
        let folded = adapter.fold().map_err(|error| ScoreError::Fold(error.to_string()))?;
        let id = JobId(u32::MAX);
        model.place(id, &folded).map_err(|error| ScoreError::Model(error.into()))?;
        let files = excerpts.score(model, Some(id), self.tokens);
        model.remove(id);
        files.map_err(ScoreError::Model)
    }

    fn identity(&self, job: Option<&JobOptions>, excerpts: &Excerpts) -> Value {
        json!({
            "model": self.model_name,
            "job": job,
            "data": job.map(|_| self.data.digest()),
            "excerpts": excerpts.digest,
        })
    }

    fn scores_of(&self, name: &str) -> PathBuf {
        self.folder.join("scores").join(format!("{name}.json"))
    }

    /// What was kept; `None` where nothing was.
    fn known(&self, name: &str, identity: &Value) -> Result<Option<Scored>, CommandError> {
        let path = self.scores_of(name);
        let text = match std::fs::read_to_string(&path) {
            Ok(text) => text,
            Err(source) if source.kind() == std::io::ErrorKind::NotFound => return Ok(None),
            Err(source) => return Err(CommandError::Io { action: "read", path, source }),
        };
        match serde_json::from_str::<Scored>(&text) {
            Ok(scored) if scored.identity == *identity => Ok(Some(scored)),
            _ => Err(CommandError::OtherScore(path)),
        }
    }

    fn keep(&self, name: &str, scored: &Scored) -> Result<(), CommandError> {
        let path = self.scores_of(name);
        let failed = |source| CommandError::Io { action: "create", path: self.folder.join("scores"), source };
        std::fs::create_dir_all(self.folder.join("scores")).map_err(failed)?;
        Ok(flora_checkpoint::write_file(&path, serde_json::to_string(scored)?.as_bytes())?)
    }
}

/// Why an adapter has no score.
enum ScoreError {
    Fold(String),
    Model(CommandError),
}
