//! `flora train`: adapters from data, one by options or many by a file, over one base on the host.

mod curves;
mod data;
mod options;
mod telling;

use std::path::{Path, PathBuf};

use clap::builder::RangedU64ValueParser;
use clap::{ArgGroup, Args};
use flora::prelude::devices;
use flora_checkpoint::Model;
use flora_model::{TrainOptions, TrainedModel};
use flora_tokenizer::Tokenizer;
use flora_train::{DescribedJob, NewJob, Places, Trainer, read_jobs};

use super::error::CommandError;
use super::kinds::KindArguments;
use super::types;
use data::Library;
use options::JobArguments;
use telling::Telling;

/// Train adapters: one by options, or many by a file, in shared batches over one base
#[derive(Args)]
#[command(group(ArgGroup::new("sources").multiple(true).required(true)))]
pub(crate) struct Arguments {
    /// What to learn from: .jsonl files with `messages`, `prompt` and `completion`, or `text` in each line, other files as texts, and
    /// folders of such files
    #[arg(value_name = "DATA", group = "sources", conflicts_with = "jobs")]
    data: Vec<PathBuf>,
    /// A file of jobs in place of options (see docs/training.md)
    #[arg(long, value_name = "FILE", group = "sources")]
    jobs: Option<PathBuf>,
    /// A .gguf file or a model's folder; SmolLM2-135M unless given, fetched once (93 MB)
    #[arg(long)]
    model: Option<PathBuf>,
    /// The form of base weights
    #[arg(long, value_enum, default_value = "stored")]
    base: types::Base,
    #[command(flatten)]
    kinds: KindArguments,
    /// The folder in which each adapter gets a folder, which `flora serve --adapters` may serve meanwhile
    #[arg(long, value_name = "DIR", default_value = "adapters")]
    out: PathBuf,
    /// Begin anew where a job was saved; it goes on from there unless given
    #[arg(long)]
    fresh: bool,
    /// Where every step is written as a line of JSON; `.training/metrics.jsonl` in --out unless given
    #[arg(long, value_name = "FILE")]
    metrics: Option<PathBuf>,
    /// The most tokens of a batch, of all jobs together; what one batch of the largest job has unless given
    #[arg(long, value_name = "TOKENS", value_parser = RangedU64ValueParser::<usize>::new().range(1..=1 << 24))]
    tokens_per_batch: Option<usize>,
    /// Print what became of each job as JSON
    #[arg(long)]
    json: bool,
    #[command(flatten)]
    job: JobArguments,
}

/// Where states and metrics are, in the folder of adapters; no adapter's folder begins with a dot.
const BESIDE: &str = ".training";

pub(crate) fn train(arguments: &Arguments) -> Result<(), CommandError> {
    let path = match &arguments.model {
        Some(path) => path.clone(),
        None => flora_toolchain::smollm2()?,
    };
    let model = Model::open(&path)?;
    let tokenizer = Tokenizer::open(&path)?;
    let layers = arguments.kinds.layers()?;
    let (place, described) = match &arguments.jobs {
        Some(file) => (file.clone(), read_jobs(file)?),
        None => {
            (PathBuf::from("the command line"), vec![arguments.job.described(&arguments.data, &model, layers.kinds())?])
        }
    };
    let mut library = Library::new(&tokenizer);
    let jobs = described.iter().map(|job| new_job(job, arguments, &mut library, &layers));
    let jobs = jobs.collect::<Result<Vec<_>, CommandError>>()?;
    let largest = jobs.iter().map(|job| job.options.batch_tokens()).max().unwrap_or(1);
    let device = devices::open("host")?;
    let trained =
        TrainedModel::load(&device, &model, TrainOptions { base: arguments.base.into(), ..TrainOptions::default() })?;
    let mut trainer = Trainer::new(trained, arguments.tokens_per_batch.unwrap_or(largest));
    let metrics = arguments.metrics.clone().unwrap_or_else(|| arguments.out.join(BESIDE).join("metrics.jsonl"));
    let mut telling = Telling::new(&metrics, arguments.out.join(BESIDE).join("training.svg"))?;
    for job in jobs {
        let (_, event) = trainer.add(job, &place, &layers)?;
        telling.tell(&event)?;
    }
    while !trainer.is_idle() {
        for event in trainer.step() {
            telling.tell(&event)?;
        }
    }
    telling.finish(&arguments.out, arguments.json)
}

fn new_job(
    described: &DescribedJob,
    arguments: &Arguments,
    library: &mut Library<'_>,
    layers: &flora_adapters::Layers,
) -> Result<NewJob, CommandError> {
    let DescribedJob { options, begin, .. } = described;
    let (data, held_out) = library.data_of(described)?;
    let begin =
        begin.as_deref().map(|folder| flora_checkpoint::AdapterFolder::open(folder, layers.kinds())).transpose()?;
    let state = state_file(&arguments.out, &options.name);
    if arguments.fresh {
        match std::fs::remove_file(&state) {
            Err(source) if source.kind() != std::io::ErrorKind::NotFound => {
                return Err(CommandError::Io { action: "remove", path: state, source });
            }
            _ => {}
        }
    }
    let places = Places { adapters: Some(arguments.out.clone()), state: Some(state) };
    Ok(NewJob { options: options.clone(), data, held_out, begin, places })
}

fn state_file(out: &Path, job: &str) -> PathBuf {
    out.join(BESIDE).join(format!("{job}.safetensors"))
}
