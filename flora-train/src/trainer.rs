//! Many jobs over one base: every step is one batch of some of them, and each job is what it would be alone. A job's batches are its
//! own: company decides when they run, and never what is in them.

use std::collections::VecDeque;
use std::path::Path;
use std::sync::Arc;

use flora_adapters::Layers;
use flora_checkpoint::AdapterFolder;

use crate::adapter::{Adapter, MakeError};
use crate::data::Dataset;
use crate::event::{Ending, Event, Happened};
use crate::job::{Folded, Job, Places, failed};
use crate::options::{JobOptions, OptionError};
use crate::state::StateError;
use crate::trainee::{BatchGradients, JobGradients, JobId, SegmentLoss, TrainSegment, Trainee};

/// A job that is to be trained.
#[derive(Clone, Debug)]
pub struct NewJob {
    /// What it is told.
    pub options: JobOptions,
    /// What it learns from.
    pub data: Arc<Dataset>,
    /// What it is evaluated on; `None`: it isn't.
    pub held_out: Option<Arc<Dataset>>,
    /// An adapter to train further, in place of the start that the options say; its kind, modules and ranks hold.
    pub begin: Option<AdapterFolder>,
    /// Where it keeps what it makes. Where there is a state of it, it goes on from there.
    pub places: Places,
}

/// A job that is over.
#[derive(Clone, Debug)]
pub struct EndedJob {
    /// Its number.
    pub id: JobId,
    /// Its name.
    pub name: String,
    /// Why it is over.
    pub reason: Ending,
    /// Its adapter: at its best evaluation, or after its last good step.
    pub adapter: Adapter,
}

/// Why a job can't be added.
#[derive(Debug, thiserror::Error)]
#[non_exhaustive]
pub enum AddError {
    /// An option makes no sense.
    #[error(transparent)]
    Option(#[from] OptionError),
    /// Another job has the name.
    #[error("there is a job called `{0}` already; give this one another name")]
    Taken(String),
    /// One batch of it is larger than any may be.
    #[error(
        "a batch of the job `{job}` has up to {tokens} tokens, and all jobs share batches of {budget}: give it a smaller `batch`, or \
         shorter sequences, with more `accumulation`"
    )]
    TooLarge {
        /// The job.
        job: String,
        /// The most tokens of its batch.
        tokens: usize,
        /// The most tokens of a batch of all.
        budget: usize,
    },
    /// Its adapter can't be made for the model.
    #[error("the job `{job}`: {source}")]
    Make {
        /// The job.
        job: String,
        /// Why.
        source: Box<MakeError>,
    },
    /// Its state can't be read, or is another job's.
    #[error(transparent)]
    State(#[from] StateError),
    /// Which model its state is of can't be said.
    #[error("which model the state of the job `{job}` is of can't be said: {problem}")]
    Model {
        /// The job.
        job: String,
        /// Why.
        problem: String,
    },
    /// The model doesn't take its adapter.
    #[error("the adapter of the job `{job}` can't be placed: {problem}")]
    Place {
        /// The job.
        job: String,
        /// Why.
        problem: String,
    },
}

/// Trains jobs over one model.
#[derive(Debug)]
pub struct Trainer<T> {
    trainee: T,
    /// Its identity, once a job asked for it: all of its files are read for that.
    model: Option<Arc<str>>,
    /// The most tokens of a batch.
    budget: usize,
    /// The next to have a batch is the first.
    jobs: VecDeque<Job>,
    ended: Vec<EndedJob>,
    next: u32,
}

/// What a batch gave one job.
type Share = Result<(Vec<SegmentLoss>, JobGradients), String>;

impl<T: Trainee> Trainer<T> {
    /// Over `trainee`, in batches of at most `tokens`.
    pub fn new(trainee: T, tokens: usize) -> Self {
        Self { trainee, model: None, budget: tokens, jobs: VecDeque::new(), ended: Vec::new(), next: 0 }
    }

    /// Adds a job, which is trained with the others from the next step on. `place` is where its options are written, for errors.
    ///
    /// # Errors
    /// See [`AddError`]; the other jobs are as they were.
    pub fn add(&mut self, job: NewJob, place: &Path, layers: &Layers) -> Result<(JobId, Event), AddError> {
        let NewJob { options, data, held_out, begin, places } = job;
        options.check()?;
        let name = options.name.clone();
        if self.jobs.iter().any(|other| other.options.name == name) {
            return Err(AddError::Taken(name));
        }
        let longest = data.sequences().iter().map(|sequence| sequence.tokens.len()).max().unwrap_or(0);
        let most = options.batch_tokens().max(longest).min(usize::try_from(data.tokens()).unwrap_or(usize::MAX));
        if most > self.budget {
            return Err(AddError::TooLarge { job: name, tokens: most, budget: self.budget });
        }
        let adapter = match begin {
            Some(folder) => Adapter::of_folder(&folder, layers, &self.trainee),
            None => Adapter::new(place, &options.adapter, options.start, options.seed, layers, &self.trainee),
        };
        let adapter = adapter.map_err(|source| AddError::Make { job: name.clone(), source: source.into() })?;
        let id = JobId(self.next);
        let mut job = Job::new(id, options, places, adapter, data, held_out);
        if job.places.state.is_some() {
            job.model = Some(self.model(&name)?);
        }
        if let Some(state) = job.places.state.clone().filter(|state| state.exists()) {
            job.resume(&state)?;
        }
        let unplaced = |problem: String| AddError::Place { job: name.clone(), problem };
        let folded = job.adapter.fold().map_err(|error| unplaced(error.to_string()))?;
        if let Err(error) = self.trainee.place(id, &folded) {
            self.trainee.remove(id);
            return Err(unplaced(error.to_string()));
        }
        self.next += 1;
        let (step, steps) = (job.progress.step, job.schedule.steps);
        let what = Happened::Started { step, steps, parameters: job.adapter.size(), tokens: job.data.tokens() };
        self.jobs.push_back(job);
        Ok((id, Event { job: name, what }))
    }

    fn model(&mut self, job: &str) -> Result<Arc<str>, AddError> {
        if let Some(model) = &self.model {
            return Ok(model.clone());
        }
        let unsaid = |error: T::Error| AddError::Model { job: job.to_owned(), problem: error.to_string() };
        let model: Arc<str> = self.trainee.identity().map_err(unsaid)?.into();
        Ok(self.model.insert(model).clone())
    }

    /// Whether no job is under way.
    pub fn is_idle(&self) -> bool {
        self.jobs.is_empty()
    }

    /// The adapter of a job that is under way, as it is.
    pub fn adapter(&self, id: JobId) -> Option<&Adapter> {
        self.jobs.iter().find(|job| job.id == id).map(|job| &job.adapter)
    }

    /// The jobs that are over since this was last asked.
    pub fn take_ended(&mut self) -> Vec<EndedJob> {
        std::mem::take(&mut self.ended)
    }

    /// The model.
    pub fn trainee(&self) -> &T {
        &self.trainee
    }

    /// The model, for other work; jobs under way end with the trainer, and go on from what was saved of them.
    pub fn into_trainee(mut self) -> T {
        self.jobs.iter().for_each(|job| self.trainee.remove(job.id));
        self.trainee
    }

    /// Saves a job and ends it; nothing where there is none of this number.
    pub fn stop(&mut self, id: JobId) -> Vec<Event> {
        let Some(index) = self.jobs.iter().position(|job| job.id == id) else { return Vec::new() };
        let Some(job) = self.jobs.remove(index) else { return Vec::new() };
        let mut told = Vec::new();
        self.end(job, Ending::Stopped, &mut told);
        told
    }

    /// Runs one batch of as many jobs as fit, and the steps of those whose gradients are complete. What happened; nothing where no job
    /// is under way.
    pub fn step(&mut self) -> Vec<Event> {
        let mut told = Vec::new();
        for _ in 0..self.jobs.len() {
            let Some(job) = self.jobs.pop_front() else { break };
            // Those that are over from the start, or begin with an evaluation.
            if let Some(job) = self.look_after(job, false, &mut told) {
                self.jobs.push_back(job);
            }
        }
        let mut running = self.choose();
        let shares = self.run(&mut running);
        for (mut job, share) in running.into_iter().zip(shares) {
            let learnt = match share {
                Err(problem) => Err(Ending::Failed { problem }),
                Ok((losses, gradients)) => job.learn(&losses, &gradients.layers),
            };
            match learnt {
                Err(reason) => self.end(job, reason, &mut told),
                Ok(None) => self.jobs.push_back(job),
                Ok(Some((what, folded))) => {
                    told.push(Event { job: job.options.name.clone(), what });
                    match self.place(&job, &folded) {
                        Err(reason) => self.end(job, reason, &mut told),
                        Ok(()) => {
                            let kept = self.look_after(job, true, &mut told);
                            self.jobs.extend(kept);
                        }
                    }
                }
            }
        }
        told
    }

    fn place(&mut self, job: &Job, folded: &Folded) -> Result<(), Ending> {
        self.trainee.place(job.id, folded).map_err(failed)
    }

    /// Takes the jobs that have a part in the next batch out of the queue: the first, and what fits beside it.
    fn choose(&mut self) -> Vec<Job> {
        let (mut chosen, mut left) = (Vec::new(), VecDeque::new());
        let mut tokens = 0;
        for mut job in std::mem::take(&mut self.jobs) {
            let own = job.next_tokens();
            if chosen.is_empty() || tokens + own <= self.budget {
                tokens += own;
                chosen.push(job);
            } else {
                left.push_back(job);
            }
        }
        self.jobs = left;
        chosen
    }

    /// The next batch of each of `jobs`, all at once. Where that fails, each runs alone, so that it fails by itself.
    fn run(&mut self, jobs: &mut [Job]) -> Vec<Share> {
        if jobs.is_empty() {
            return Vec::new();
        }
        let batches: Vec<Vec<usize>> = jobs.iter_mut().map(Job::batch).collect();
        let parts: Vec<(JobId, Vec<TrainSegment<'_>>)> = jobs
            .iter()
            .zip(&batches)
            .map(|(job, batch)| (job.id, segments(job.id, batch.iter().filter_map(|index| job.sequence(*index)))))
            .collect();
        match self.run_together(&parts) {
            Ok(shares) => shares.into_iter().map(Ok).collect(),
            Err(problem) if parts.len() == 1 => vec![Err(problem)],
            Err(_) => {
                let alone = |part| self.run_together(std::slice::from_ref(part));
                let first = |shares: Vec<_>| shares.into_iter().next().ok_or_else(|| UNASKED.to_owned());
                parts.iter().map(alone).map(|shares| shares.and_then(first)).collect()
            }
        }
    }

    fn run_together(
        &mut self,
        parts: &[(JobId, Vec<TrainSegment<'_>>)],
    ) -> Result<Vec<(Vec<SegmentLoss>, JobGradients)>, String> {
        let batch: Vec<TrainSegment<'_>> = parts.iter().flat_map(|(_, segments)| segments).copied().collect();
        let BatchGradients { losses, jobs } = self.trainee.gradients(&batch).map_err(|error| error.to_string())?;
        let is_asked = losses.len() == batch.len()
            && jobs.len() == parts.len()
            && jobs.iter().zip(parts).all(|(gradients, (id, _))| gradients.job == *id);
        if !is_asked {
            return Err(UNASKED.to_owned());
        }
        let mut losses = losses.into_iter();
        let share = |((_, segments), gradients): (&(JobId, Vec<_>), JobGradients)| {
            (losses.by_ref().take(segments.len()).collect(), gradients)
        };
        Ok(parts.iter().zip(jobs).map(share).collect())
    }

    /// Evaluates, saves and ends a job as it is time to; gives it back where it goes on. It has `moved` where it has made a step.
    fn look_after(&mut self, mut job: Job, moved: bool, told: &mut Vec<Event>) -> Option<Job> {
        if let Some(reason) = job.progress.ended.clone().filter(|reason| *reason != Ending::Stopped) {
            self.end(job, reason, told);
            return None;
        }
        job.progress.ended = None;
        if job.evaluation_is_due() {
            match self.evaluate(&mut job) {
                Ok(what) => told.push(Event { job: job.options.name.clone(), what }),
                Err(reason) => {
                    self.end(job, reason, told);
                    return None;
                }
            }
        }
        let reason = match () {
            () if job.is_complete() => Ending::Complete,
            () if job.gains_nothing() => Ending::NoGain,
            () => {
                if moved && job.saving_is_due() {
                    told.extend(save(&job));
                }
                return Some(job);
            }
        };
        self.end(job, reason, told);
        None
    }

    fn evaluate(&mut self, job: &mut Job) -> Result<Happened, Ending> {
        let Some(held_out) = job.held_out.clone() else { return Err(Ending::Failed { problem: UNASKED.to_owned() }) };
        let (mut nats, mut targets) = (0.0, 0);
        let limit = job.options.batch_tokens();
        let mut rest = held_out.sequences();
        while !rest.is_empty() {
            let mut tokens = 0;
            let fits = |sequence: &&crate::data::Sequence| {
                tokens += sequence.tokens.len();
                tokens <= limit
            };
            let (batch, after) = rest.split_at(rest.iter().take_while(fits).count().max(1));
            let losses = self.trainee.losses(&segments(job.id, batch.iter())).map_err(failed)?;
            if losses.len() != batch.len() {
                return Err(Ending::Failed { problem: UNASKED.to_owned() });
            }
            nats += losses.iter().map(|loss| loss.nats).sum::<f64>();
            targets += losses.iter().map(|loss| loss.targets).sum::<u64>();
            rest = after;
        }
        let loss = nats / targets.max(1) as f64;
        let best = job.judge(loss)?;
        Ok(Happened::Evaluated { step: job.progress.step, loss, targets, best })
    }

    /// Saves a job that is over for a good reason; one that failed leaves what was saved before.
    fn end(&mut self, mut job: Job, reason: Ending, told: &mut Vec<Event>) {
        self.trainee.remove(job.id);
        if matches!(reason, Ending::Complete | Ending::NoGain | Ending::Stopped) {
            job.progress.ended = Some(reason.clone());
            told.extend(save(&job));
        }
        let (id, name, step) = (job.id, job.options.name.clone(), job.progress.step);
        told.push(Event { job: name.clone(), what: Happened::Ended { step, reason: reason.clone() } });
        self.ended.push(EndedJob { id, name, reason, adapter: job.result() });
    }
}

/// The model's answer isn't one to the question; no caller's mistake.
const UNASKED: &str = "the model gave other results than those of the batch";

fn segments<'a>(job: JobId, sequences: impl Iterator<Item = &'a crate::data::Sequence>) -> Vec<TrainSegment<'a>> {
    let segment = |sequence: &'a crate::data::Sequence| TrainSegment {
        job: Some(job),
        tokens: &sequence.tokens,
        targets: &sequence.targets,
    };
    sequences.map(segment).collect()
}

/// Writes what has a place; nothing to tell where nothing has.
fn save(job: &Job) -> Option<Event> {
    let step = job.progress.step;
    let Places { adapters, state } = &job.places;
    if adapters.is_none() && state.is_none() {
        return None;
    }
    let written = || -> Result<(), String> {
        if let Some(state) = state {
            job.save_state(state).map_err(|error| error.to_string())?;
        }
        if let Some(adapters) = adapters {
            job.result().folder(&job.options.name).replace(adapters).map_err(|error| error.to_string())?;
        }
        Ok(())
    };
    let what = match written() {
        Ok(()) => Happened::Saved { step },
        Err(problem) => Happened::NotSaved { step, problem },
    };
    Some(Event { job: job.options.name.clone(), what })
}
