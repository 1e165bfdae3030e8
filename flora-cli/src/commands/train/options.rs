//! One job by options, with defaults that fit a small model and an evening: an adapter of query and key by fLoRA.

use std::path::PathBuf;

use clap::builder::{EnumValueParser, RangedU64ValueParser};
use clap::{Args, ValueEnum};
use flora_checkpoint::{AdapterKinds, AdapterRequest, Model};
use flora_train::{AdamW, Decay, DescribedJob, Evaluation, HeldOut, JobOptions, Length, Sources, Start, Warmup};

use crate::commands::error::CommandError;
use crate::models::{QUERY_AND_KEY, is_target};

/// What one job is told.
#[derive(Args)]
pub(crate) struct JobArguments {
    /// The name of the adapter and its folder; the type unless given
    #[arg(long, conflicts_with = "jobs")]
    name: Option<String>,
    /// The adapter's type: flora, flora_mean, lora, dora, ia3, hira, or a layer of a --kind
    #[arg(long = "type", value_name = "TYPE", default_value = "flora", conflicts_with = "jobs")]
    layer: String,
    /// The rank, of a type that has one; 4 unless given
    #[arg(long, conflicts_with = "jobs", value_parser = RangedU64ValueParser::<usize>::new().range(1..=1 << 20))]
    rank: Option<usize>,
    /// The number that LoRA's scale is made of, over the rank; the rank unless given
    #[arg(long, conflicts_with = "jobs")]
    alpha: Option<f64>,
    /// The modules to adapt, by the last parts of their paths, separated by commas, or all-linear; query and key unless given
    #[arg(long, value_delimiter = ',', value_name = "MODULES", conflicts_with = "jobs")]
    targets: Vec<String>,
    /// The highest learning rate; of a built-in type one that suits it unless given
    #[arg(long, value_name = "RATE", conflicts_with = "jobs")]
    learning_rate: Option<f64>,
    /// How the learning rate falls, after a twentieth of the steps in which it rises
    #[arg(long, default_value = "cosine", value_parser = EnumValueParser::<Falling>::new(), conflicts_with = "jobs")]
    schedule: Falling,
    /// Steps of the optimizer
    #[arg(long, default_value = "100", conflicts_with = "jobs")]
    steps: u64,
    /// The most tokens of a sequence
    #[arg(long, default_value = "128", value_name = "TOKENS", conflicts_with = "jobs")]
    sequence_length: usize,
    /// Sequences of a batch; more of shorter ones
    #[arg(long, default_value = "8", conflicts_with = "jobs")]
    batch: usize,
    /// Batches of a step
    #[arg(long, default_value = "1", conflicts_with = "jobs")]
    accumulation: u32,
    /// The part of the documents that is evaluated on and not learnt from; 0 for none
    #[arg(long, default_value = "0.1", value_name = "PART", conflicts_with = "jobs")]
    held_out: f64,
    /// Steps between evaluations, and between savings
    #[arg(long, default_value = "25", value_name = "STEPS", conflicts_with = "jobs")]
    evaluate_every: u64,
    /// Evaluations without a gain after which it ends
    #[arg(long, value_name = "EVALUATIONS", conflicts_with = "jobs")]
    patience: Option<u32>,
    /// The extensions of the files of a folder that are read, separated by commas; all texts unless given
    #[arg(long, value_delimiter = ',', value_name = "EXTENSIONS", conflicts_with = "jobs")]
    extensions: Vec<String>,
    /// An adapter's folder to train further
    #[arg(long, value_name = "DIR", conflicts_with = "jobs")]
    begin: Option<PathBuf>,
    /// Where random numbers come from
    #[arg(long, default_value = "1", conflicts_with = "jobs")]
    seed: u64,
}

/// How a learning rate falls.
#[derive(Clone, Copy, ValueEnum)]
enum Falling {
    Constant,
    Linear,
    Cosine,
}

/// What types are trained with where nothing is said: rates that worked in short runs on SmolLM2-135M, not the best of a sweep.
const RATES: [(&str, f64); 6] =
    [("flora", 8e-3), ("flora_mean", 8e-3), ("lora", 1e-3), ("dora", 1e-3), ("ia3", 5e-3), ("hira", 8e-3)];

impl JobArguments {
    pub(super) fn described(
        &self,
        data: &[PathBuf],
        model: &Model,
        kinds: &AdapterKinds,
    ) -> Result<DescribedJob, CommandError> {
        let rate =
            self.learning_rate.or_else(|| RATES.iter().find(|(name, _)| *name == self.layer).map(|(_, rate)| *rate));
        let learning_rate = rate.ok_or_else(|| CommandError::NoLearningRate(self.layer.clone()))?;
        let has_rank = kinds.kind_of_layer(&self.layer).is_some_and(|kind| kind.description().rank.is_some());
        let is_there =
            |target: &&&str| model.projections().iter().any(|projection| is_target(&projection.path, target));
        let targets = match &self.targets[..] {
            [] => QUERY_AND_KEY.iter().filter(is_there).map(|target| (*target).to_owned()).collect(),
            given => given.to_vec(),
        };
        let held_out = match self.held_out {
            0.0 => HeldOut::Nothing,
            part => HeldOut::Fraction(part),
        };
        let options = JobOptions {
            name: self.name.clone().unwrap_or_else(|| self.layer.clone()),
            adapter: AdapterRequest {
                layer: self.layer.clone(),
                rank: self.rank.or(has_rank.then_some(4)),
                alpha: self.alpha,
                targets,
                options: serde_json::Map::new(),
            },
            start: Start::Default,
            seed: self.seed,
            learning_rate,
            decay: match self.schedule {
                Falling::Constant => Decay::Constant,
                Falling::Linear => Decay::Linear,
                Falling::Cosine => Decay::Cosine,
            },
            warmup: Warmup::Fraction(0.05),
            length: Length::Steps(self.steps),
            sequence_length: self.sequence_length,
            batch: self.batch,
            accumulation: self.accumulation,
            optimizer: AdamW::default(),
            largest_norm: Some(1.0),
            evaluation: Evaluation { every: self.evaluate_every, patience: self.patience, least_gain: 0.0 },
            save_every: Some(self.evaluate_every),
        };
        options.check()?;
        let data = Sources { paths: data.to_vec(), extensions: self.extensions.clone() };
        Ok(DescribedJob { options, data, held_out, begin: self.begin.clone() })
    }
}
