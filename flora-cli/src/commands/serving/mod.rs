//! What `generate`, `serve` and `bench serving` share: a model on a device behind an engine, from the command line's options.

pub(crate) mod generate;
mod lora_modules;
pub(crate) mod serve;
mod start;

use std::path::PathBuf;

use clap::builder::RangedU64ValueParser;
use clap::{ArgGroup, Args, ValueEnum};
use flora::prelude::*;
use flora_engine::Options;

use super::kinds::KindArguments;
use super::types;
use lora_modules::LoraModule;
pub(crate) use start::{Serving, decoder, device, engine, model_path, saved, start};

/// Which model, with which adapters, on which device.
#[derive(Args, Clone)]
#[command(group(ArgGroup::new("sources").multiple(true)))]
pub(crate) struct ModelArguments {
    /// A .gguf file or a model's folder, of a family that docs/serving.md lists; SmolLM2-135M unless given, fetched once (93 MB)
    #[arg(long)]
    pub(crate) model: Option<PathBuf>,
    /// A folder of PEFT adapter folders, each named by its folder; it may change while the model is served
    #[arg(long, value_name = "DIR", group = "sources")]
    pub(crate) adapters: Option<PathBuf>,
    /// A Jinja template of conversations, in place of those in the files of the model and its adapters
    #[arg(long, value_name = "FILE")]
    pub(crate) chat_template: Option<PathBuf>,
    /// PEFT adapter folders under names of their own, beside those of --adapters
    #[arg(long, value_name = "NAME=PATH", num_args = 1.., value_parser = lora_modules::parse, group = "sources")]
    pub(crate) lora_modules: Vec<LoraModule>,
    #[command(flatten)]
    pub(crate) kinds: KindArguments,
    /// The only modules that adapters may adapt, by the last part of their path, separated by commas; every projection, the
    /// embedding and the output matrix unless given
    #[arg(long, value_delimiter = ',', value_name = "MODULES")]
    pub(crate) adapted: Vec<String>,
    /// The device, as `flora devices` lists it
    #[arg(long, default_value = "auto")]
    pub(crate) device: String,
    /// The type of activations, adapters, keys and values
    #[arg(long, default_value = "f32", value_parser = types::element())]
    pub(crate) dtype: Element,
    /// The form of base weights
    #[arg(long, value_enum, default_value = "stored")]
    pub(crate) base: types::Base,
    /// What quantised base weights are multiplied by, on the host; what int8 costs in exactness is measured and told
    #[arg(long, value_enum, default_value = "float")]
    pub(crate) activations: Activations,
    /// How lowerings are chosen
    #[arg(long, value_enum, default_value = "tuned")]
    pub(crate) plan: PlanChoice,
    /// MiB that resident adapters may take, copies of embeddings and output matrices among them
    #[arg(long, default_value = "256", value_name = "MIB", value_parser = RangedU64ValueParser::<u64>::new().range(1..=1 << 20))]
    pub(crate) adapter_memory: u64,
    /// Adapters that are resident at most
    #[arg(long, default_value = "64", value_parser = RangedU64ValueParser::<usize>::new().range(1..=1 << 20))]
    pub(crate) resident: usize,
    /// Tokens whose keys and values the device holds, of all running requests together
    #[arg(long, default_value = "16384", value_parser = RangedU64ValueParser::<usize>::new().range(32..=1 << 31))]
    pub(crate) cache_tokens: usize,
    /// Compute every prompt anew, though an earlier one began alike
    #[arg(long)]
    pub(crate) no_prefix_sharing: bool,
    /// Requests that run at once
    #[arg(long, default_value = "32", value_parser = RangedU64ValueParser::<usize>::new().range(1..=4096))]
    pub(crate) sequences: usize,
    /// Tokens of a prompt that are run at a time; more of them make prompts faster, and other requests wait longer for a token
    #[arg(long, default_value_t = Options::default().chunk_tokens, value_parser = RangedU64ValueParser::<usize>::new().range(1..=1 << 16))]
    pub(crate) chunk_tokens: usize,
    /// Tokens of one step, prompts and generated ones together; at least a chunk and a token of every other request
    #[arg(long, default_value_t = Options::default().tokens_per_step, value_parser = RangedU64ValueParser::<usize>::new().range(1..=1 << 20))]
    pub(crate) tokens_per_step: usize,
    /// Requests that wait at most
    #[arg(long, default_value = "1024", value_parser = RangedU64ValueParser::<usize>::new().range(1..=1 << 24))]
    pub(crate) waiting: usize,
}

/// What quantised base weights are multiplied by.
#[derive(Clone, Copy, Debug, PartialEq, Eq, ValueEnum)]
pub(crate) enum Activations {
    /// Activations as they are
    Float,
    /// Activations rounded to 8 bits, with a scale for each 16 or 32 of a row: faster and less exact
    Int8,
}

/// How lowerings are chosen.
#[derive(Clone, Copy, Debug, PartialEq, Eq, ValueEnum)]
pub(crate) enum PlanChoice {
    /// The cheapest of each step's batch by what `flora tune` saved for this device; `fixed` where there is nothing
    Tuned,
    /// Always the same, so that a request's tokens don't depend on what else is in its batch
    Fixed,
}
