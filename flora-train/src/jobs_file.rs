//! `jobs.toml`: many jobs in one file. What stands in `[defaults]` holds for every `[[job]]` that doesn't say otherwise.

use std::path::{Path, PathBuf};

use flora_checkpoint::AdapterRequest;
use serde::Deserialize;
use serde_json::{Map, Value};

use crate::adamw::AdamW;
use crate::data::Sources;
use crate::initial::Start;
use crate::options::{Evaluation, JobOptions, Length, OptionError, Warmup};
use crate::schedule::Decay;

/// The longest file, in bytes.
const LIMIT: u64 = 4 << 20;

/// Why a file of jobs can't be used.
#[derive(Debug, thiserror::Error)]
#[non_exhaustive]
pub enum JobsFileError {
    /// It can't be read.
    #[error("cannot read {}: {source}", path.display())]
    Io {
        /// The file.
        path: PathBuf,
        /// The system's reason.
        source: std::io::Error,
    },
    /// A mistake in the text, with its line.
    #[error("{}: {problem}", path.display())]
    Text {
        /// The file.
        path: PathBuf,
        /// Where, and what.
        problem: String,
    },
    /// A job lacks what it needs, or says two things at once.
    #[error("{}: the job `{job}` {problem}", path.display())]
    Job {
        /// The file.
        path: PathBuf,
        /// The job's name, or its number.
        job: String,
        /// What is wrong.
        problem: String,
    },
    /// An option makes no sense.
    #[error("{}: {source}", path.display())]
    Option {
        /// The file.
        path: PathBuf,
        /// Which, and why.
        source: OptionError,
    },
}

/// A job as its file describes it; its data are still to be read.
#[derive(Clone, Debug, PartialEq)]
pub struct DescribedJob {
    /// What it is told.
    pub options: JobOptions,
    /// What it learns from.
    pub data: Sources,
    /// What it is evaluated on.
    pub held_out: HeldOut,
    /// The folder of an adapter to train further.
    pub begin: Option<PathBuf>,
}

/// What a job is evaluated on.
#[derive(Clone, Debug, PartialEq)]
pub enum HeldOut {
    /// Nothing: it isn't.
    Nothing,
    /// Data of its own.
    Sources(Sources),
    /// A part of the documents, which aren't learnt from then.
    Fraction(f64),
}

#[derive(Deserialize)]
#[serde(deny_unknown_fields)]
struct File {
    #[serde(default)]
    defaults: Section,
    #[serde(default)]
    job: Vec<Section>,
}

/// What a job may say, and the defaults too.
#[derive(Clone, Debug, Default, Deserialize)]
#[serde(deny_unknown_fields)]
struct Section {
    name: Option<String>,
    kind: Option<String>,
    rank: Option<usize>,
    alpha: Option<f64>,
    targets: Option<OneOrMore<String>>,
    /// The kind's further options by PEFT's names.
    options: Option<Map<String, Value>>,
    start: Option<Start>,
    begin: Option<PathBuf>,
    data: Option<OneOrMore<PathBuf>>,
    extensions: Option<Vec<String>>,
    held_out: Option<HeldOutText>,
    seed: Option<u64>,
    learning_rate: Option<f64>,
    schedule: Option<Decay>,
    warmup_steps: Option<u64>,
    warmup_fraction: Option<f64>,
    steps: Option<u64>,
    epochs: Option<u64>,
    sequence_length: Option<usize>,
    batch: Option<usize>,
    accumulation: Option<u32>,
    beta1: Option<f64>,
    beta2: Option<f64>,
    epsilon: Option<f64>,
    weight_decay: Option<f64>,
    largest_norm: Option<f64>,
    evaluate_every: Option<u64>,
    patience: Option<u32>,
    least_gain: Option<f64>,
    save_every: Option<u64>,
}

#[derive(Clone, Debug, Deserialize)]
#[serde(untagged)]
enum OneOrMore<T> {
    One(T),
    More(Vec<T>),
}

impl<T> OneOrMore<T> {
    fn into_vec(self) -> Vec<T> {
        match self {
            OneOrMore::One(one) => vec![one],
            OneOrMore::More(more) => more,
        }
    }
}

/// A part of the data, or paths.
#[derive(Clone, Debug, Deserialize)]
#[serde(untagged)]
enum HeldOutText {
    Fraction(f64),
    Paths(OneOrMore<PathBuf>),
}

/// The jobs of the file at `path`. Paths in it are relative to its folder.
///
/// # Errors
/// It can't be read, has a mistake (with its line), or a job lacks something.
pub fn read_jobs(path: &Path) -> Result<Vec<DescribedJob>, JobsFileError> {
    let io = |source| JobsFileError::Io { path: path.to_owned(), source };
    let length = std::fs::metadata(path).map_err(io)?.len();
    if length > LIMIT {
        let problem = format!("it has {length} bytes; at most {LIMIT} are read");
        return Err(JobsFileError::Text { path: path.to_owned(), problem });
    }
    parse_jobs(path, &std::fs::read_to_string(path).map_err(io)?)
}

/// The jobs that `text`, of the file at `path`, describes.
///
/// # Errors
/// As [`read_jobs`].
pub fn parse_jobs(path: &Path, text: &str) -> Result<Vec<DescribedJob>, JobsFileError> {
    let wrong = |problem: String| JobsFileError::Text { path: path.to_owned(), problem };
    let File { defaults, job: jobs } = toml::from_str(text).map_err(|error| wrong(error.to_string()))?;
    if jobs.is_empty() {
        return Err(wrong("it has no `[[job]]`".to_owned()));
    }
    let mut described: Vec<DescribedJob> = Vec::new();
    for (index, job) in jobs.into_iter().enumerate() {
        let name = job.name.clone().unwrap_or_else(|| format!("number {}", index + 1));
        let failed = |problem| JobsFileError::Job { path: path.to_owned(), job: name.clone(), problem };
        let made = job.over(&defaults).described(path.parent().unwrap_or(Path::new(""))).map_err(failed)?;
        made.options.check().map_err(|source| JobsFileError::Option { path: path.to_owned(), source })?;
        if described.iter().any(|other| other.options.name == made.options.name) {
            return Err(failed("has the name of another one".to_owned()));
        }
        described.push(made);
    }
    Ok(described)
}

impl Section {
    /// With what `defaults` say where it says nothing. Of two ways to say one thing, either takes the place of both.
    fn over(self, defaults: &Section) -> Section {
        let other = defaults.clone();
        let says_warmup = self.warmup_steps.is_some() || self.warmup_fraction.is_some();
        let says_length = self.steps.is_some() || self.epochs.is_some();
        Section {
            name: self.name,
            kind: self.kind.or(other.kind),
            rank: self.rank.or(other.rank),
            alpha: self.alpha.or(other.alpha),
            targets: self.targets.or(other.targets),
            options: self.options.or(other.options),
            start: self.start.or(other.start),
            begin: self.begin.or(other.begin),
            data: self.data.or(other.data),
            extensions: self.extensions.or(other.extensions),
            held_out: self.held_out.or(other.held_out),
            seed: self.seed.or(other.seed),
            learning_rate: self.learning_rate.or(other.learning_rate),
            schedule: self.schedule.or(other.schedule),
            warmup_steps: self.warmup_steps.or(other.warmup_steps.filter(|_| !says_warmup)),
            warmup_fraction: self.warmup_fraction.or(other.warmup_fraction.filter(|_| !says_warmup)),
            steps: self.steps.or(other.steps.filter(|_| !says_length)),
            epochs: self.epochs.or(other.epochs.filter(|_| !says_length)),
            sequence_length: self.sequence_length.or(other.sequence_length),
            batch: self.batch.or(other.batch),
            accumulation: self.accumulation.or(other.accumulation),
            beta1: self.beta1.or(other.beta1),
            beta2: self.beta2.or(other.beta2),
            epsilon: self.epsilon.or(other.epsilon),
            weight_decay: self.weight_decay.or(other.weight_decay),
            largest_norm: self.largest_norm.or(other.largest_norm),
            evaluate_every: self.evaluate_every.or(other.evaluate_every),
            patience: self.patience.or(other.patience),
            least_gain: self.least_gain.or(other.least_gain),
            save_every: self.save_every.or(other.save_every),
        }
    }

    /// The job; its problem otherwise. `folder` is what paths are relative to.
    fn described(self, folder: &Path) -> Result<DescribedJob, String> {
        let missing = |option: &str| format!("has no `{option}`, and neither have the defaults");
        let both = |one: &str, other: &str| Err(format!("has both `{one}` and `{other}`; leave one out"));
        let inside = |path: PathBuf| folder.join(path);
        let extensions = self.extensions.unwrap_or_default();
        let sources = |paths: OneOrMore<PathBuf>| Sources {
            paths: paths.into_vec().into_iter().map(inside).collect(),
            extensions: extensions.clone(),
        };
        let length = match (self.steps, self.epochs) {
            (Some(_), Some(_)) => return both("steps", "epochs"),
            (Some(steps), None) => Length::Steps(steps),
            (None, Some(epochs)) => Length::Epochs(epochs),
            (None, None) => return Err(missing("steps` or `epochs")),
        };
        let warmup = match (self.warmup_steps, self.warmup_fraction) {
            (Some(_), Some(_)) => return both("warmup_steps", "warmup_fraction"),
            (Some(steps), None) => Warmup::Steps(steps),
            (None, Some(fraction)) => Warmup::Fraction(fraction),
            (None, None) => Warmup::Steps(0),
        };
        let held_out = match self.held_out {
            None => HeldOut::Nothing,
            Some(HeldOutText::Fraction(fraction)) if fraction > 0.0 && fraction < 1.0 => HeldOut::Fraction(fraction),
            Some(HeldOutText::Fraction(fraction)) => {
                return Err(format!("has `held_out` = {fraction}; a part must lie between 0 and 1"));
            }
            Some(HeldOutText::Paths(paths)) => HeldOut::Sources(sources(paths)),
        };
        let standard = AdamW::default();
        let options = JobOptions {
            name: self.name.ok_or("has no `name`")?,
            adapter: AdapterRequest {
                layer: self.kind.ok_or_else(|| missing("kind"))?,
                rank: self.rank,
                alpha: self.alpha,
                targets: self.targets.ok_or_else(|| missing("targets"))?.into_vec(),
                options: self.options.unwrap_or_default(),
            },
            start: self.start.unwrap_or_default(),
            seed: self.seed.unwrap_or(0),
            learning_rate: self.learning_rate.ok_or_else(|| missing("learning_rate"))?,
            decay: self.schedule.unwrap_or_default(),
            warmup,
            length,
            sequence_length: self.sequence_length.unwrap_or(SEQUENCE_LENGTH),
            batch: self.batch.unwrap_or(1),
            accumulation: self.accumulation.unwrap_or(1),
            optimizer: AdamW {
                beta1: self.beta1.unwrap_or(standard.beta1),
                beta2: self.beta2.unwrap_or(standard.beta2),
                epsilon: self.epsilon.unwrap_or(standard.epsilon),
                weight_decay: self.weight_decay.unwrap_or(standard.weight_decay),
            },
            largest_norm: self.largest_norm,
            evaluation: Evaluation {
                every: self.evaluate_every.unwrap_or(EVALUATE_EVERY),
                patience: self.patience,
                least_gain: self.least_gain.unwrap_or(0.0),
            },
            save_every: self.save_every,
        };
        let data = sources(self.data.ok_or_else(|| missing("data"))?);
        Ok(DescribedJob { options, data, held_out, begin: self.begin.map(inside) })
    }
}

/// Tokens of a sequence where a file says nothing.
const SEQUENCE_LENGTH: usize = 128;
/// Steps between evaluations where a file says nothing.
const EVALUATE_EVERY: u64 = 50;
