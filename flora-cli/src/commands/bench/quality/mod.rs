//! `flora bench quality`: the paper's second half (§4.2, A.1) in small. Adapters of several kinds learn languages that the model knows
//! little of, and are compared on files that none of them has seen.

mod answer;
mod excerpt;
mod plan;
mod runs;
mod statistics;

use std::path::PathBuf;
use std::sync::Arc;

use clap::Args;
use clap::builder::RangedU64ValueParser;
use flora::prelude::devices;
use flora_adapters::Layers;
use flora_checkpoint::Model;
use flora_model::{TrainOptions, TrainedModel};
use flora_tokenizer::Tokenizer;
use flora_train::data::{encode, read};
use flora_train::{Dataset, Sources};

use crate::commands::error::CommandError;
use crate::commands::output;
use answer::{Answer, OfLanguage, OfVariant, Rate};
use excerpt::Excerpts;
pub(crate) use plan::PlanError;
use plan::{Plan, Variant};
use runs::{Scored, Workshop};

/// Compare kinds of adapters by how well they learn languages that the model knows little of
///
/// All jobs of a language share batches over one base. The learning rate of each variant is chosen by short jobs on the validation
/// split; then each variant is trained once a seed, and held against files that none has seen: bits a byte, and how many lines greedy
/// decoding writes exactly. What was killed goes on from --state. benches/README.md says how the corpus is made.
#[derive(Args)]
pub(super) struct Arguments {
    /// What is compared (see benches/quality/quality.toml)
    #[arg(long, value_name = "FILE")]
    plan: PathBuf,
    /// A folder with a folder for each language, which has `train`, `validation` and `held_out`
    #[arg(long, value_name = "DIR")]
    corpus: PathBuf,
    /// Where states, adapters and scores are kept, and the answer as quality.json and quality.md
    #[arg(long, value_name = "DIR")]
    state: PathBuf,
    /// A .gguf file or a model's folder; SmolLM2-135M unless given, fetched once (93 MB)
    #[arg(long)]
    model: Option<PathBuf>,
    /// Languages in place of the plan's, separated by commas
    #[arg(long, value_delimiter = ',', value_name = "LANGUAGES")]
    languages: Vec<String>,
    /// The names of the plan's variants that are tried, separated by commas; all unless given
    #[arg(long, value_delimiter = ',', value_name = "NAMES")]
    variants: Vec<String>,
    /// Seeds in place of the plan's, separated by commas
    #[arg(long, value_delimiter = ',', value_name = "SEEDS")]
    seeds: Vec<u64>,
    /// Steps in place of the plan's
    #[arg(long)]
    steps: Option<u64>,
    /// Steps of the jobs that choose a learning rate, in place of the plan's
    #[arg(long)]
    rate_steps: Option<u64>,
    /// Files that are compared on, in place of the plan's
    #[arg(long, value_name = "FILES")]
    held_out_files: Option<usize>,
    /// The most tokens of a batch, of all jobs together
    #[arg(long, value_name = "TOKENS", default_value = "1024", value_parser = RangedU64ValueParser::<usize>::new().range(1..=1 << 24))]
    tokens_per_batch: usize,
    /// Print the answer as JSON
    #[arg(long)]
    json: bool,
}

pub(super) fn quality(arguments: &Arguments) -> Result<(), CommandError> {
    let plan = plan(arguments)?;
    let path = match &arguments.model {
        Some(path) => path.clone(),
        None => flora_toolchain::smollm2()?,
    };
    let checkpoint = Model::open(&path)?;
    let tokenizer = Tokenizer::open(&path)?;
    let layers = Layers::builtin()?;
    let device = devices::open("host")?;
    let mut model = TrainedModel::load(&device, &checkpoint, TrainOptions::default())?;
    let name = path.file_name().unwrap_or(path.as_os_str()).to_string_lossy().into_owned();
    let mut languages = Vec::new();
    for language in &plan.languages {
        let found;
        (model, found) = one_language(arguments, &plan, language, (model, &name), &tokenizer, &layers)?;
        languages.push(found);
        // After each, so that what is known is there while the others run.
        let answer = Answer { model: name.clone(), plan: plan.clone(), languages: languages.clone() };
        answer.write(&arguments.state)?;
    }
    let answer = Answer { model: name, plan, languages };
    if arguments.json { output::print_json(&answer) } else { output::print(&answer.markdown()) }
}

/// The plan, changed by the options.
fn plan(arguments: &Arguments) -> Result<Plan, CommandError> {
    let mut plan = Plan::read(&arguments.plan)?;
    plan.check(&arguments.plan)?;
    if !arguments.languages.is_empty() {
        plan.languages.clone_from(&arguments.languages);
    }
    if !arguments.seeds.is_empty() {
        plan.seeds.clone_from(&arguments.seeds);
    }
    if !arguments.variants.is_empty() {
        plan.keep(&arguments.variants, &arguments.plan)?;
    }
    plan.steps = arguments.steps.unwrap_or(plan.steps);
    plan.rate_steps = arguments.rate_steps.unwrap_or(plan.rate_steps);
    plan.held_out_files = arguments.held_out_files.unwrap_or(plan.held_out_files);
    plan.check(&arguments.plan)?;
    Ok(plan)
}

fn one_language(
    arguments: &Arguments,
    plan: &Plan,
    language: &str,
    (model, model_name): (TrainedModel, &str),
    tokenizer: &Tokenizer,
    layers: &Layers,
) -> Result<(TrainedModel, OfLanguage), CommandError> {
    let folder = |split: &str| {
        let path = arguments.corpus.join(language).join(split);
        if path.is_dir() { Ok(path) } else { Err(CommandError::NoCorpus(path)) }
    };
    let (examples, _) = read(&Sources { paths: vec![folder("train")?], extensions: Vec::new() })?;
    let documents = encode(&examples, tokenizer)?;
    let data = Arc::new(Dataset::new(&documents, plan.sequence_length)?);
    let bytes = plan.excerpt_bytes;
    let validation = Excerpts::read(&folder("validation")?, tokenizer, (plan.validation_files, bytes))?;
    let held_out = Excerpts::read(&folder("held_out")?, tokenizer, (plan.held_out_files, bytes))?;
    if held_out.files() < statistics::LEAST_FILES {
        return Err(CommandError::FewFiles { path: folder("held_out")?, found: held_out.files() });
    }
    let workshop = Workshop {
        layers,
        folder: arguments.state.join(language),
        model_name: model_name.to_owned(),
        data: Arc::clone(&data),
        tokens: arguments.tokens_per_batch,
    };
    let variants = plan.variants();
    let (model, rates) = choose_rates(plan, &variants, &workshop, model, &validation)?;

    let base = workshop.base(&model, "base", &held_out)?;
    let mut jobs = Vec::new();
    for (variant, rates) in variants.iter().zip(&rates) {
        let rate = best(rates)
            .ok_or_else(|| CommandError::NoRate { variant: variant.name(), language: language.to_owned() })?;
        jobs.extend(
            plan.seeds
                .iter()
                .map(|seed| plan.job(variant, format!("{}.seed-{seed}", variant.name()), (rate, *seed, plan.steps))),
        );
    }
    let (model, scores) = workshop.run(model, &jobs, &held_out)?;
    let by_variant: Vec<&[Scored]> = scores.chunks(plan.seeds.len()).collect();
    let found = variants.iter().zip(rates).zip(&by_variant).map(|((variant, rates), scores)| {
        let rate = best(&rates).unwrap_or(f64::NAN);
        OfVariant::new(variant, (rate, rates), &plan.seeds, &base, scores)
    });
    let found: Vec<OfVariant> = found.collect();
    let comparisons = plan.pairs().into_iter().map(|(one, other)| {
        let names = (found[one].name.clone(), found[other].name.clone());
        answer::compared(names, by_variant[one], by_variant[other], found[other].gain.estimate)
    });
    let comparisons = comparisons.collect();
    Ok((model, OfLanguage::new(language, &data, &base, found, comparisons)))
}

/// The rates of every variant, with what short jobs make of them on the validation split.
fn choose_rates(
    plan: &Plan,
    variants: &[Variant],
    workshop: &Workshop<'_>,
    model: TrainedModel,
    validation: &Excerpts,
) -> Result<(TrainedModel, Vec<Vec<Rate>>), CommandError> {
    let seed = plan.seeds.first().copied().unwrap_or_default();
    let mut jobs = Vec::new();
    for variant in variants.iter().filter(|variant| variant.rates.len() > 1) {
        jobs.extend(
            variant.rates.iter().map(|rate| {
                plan.job(variant, format!("{}.rate-{rate}", variant.name()), (*rate, seed, plan.rate_steps))
            }),
        );
    }
    let (model, scores) = workshop.run(model, &jobs, validation)?;
    let mut scores = scores.into_iter();
    let rates = variants.iter().map(|variant| match &variant.rates[..] {
        [only] => vec![Rate { rate: *only, bits_per_byte: None }],
        rates => {
            let tried = rates.iter().zip(scores.by_ref());
            tried.map(|(rate, scored)| Rate { rate: *rate, bits_per_byte: Some(scored.bits_per_byte()) }).collect()
        }
    });
    let rates = rates.collect();
    Ok((model, rates))
}

/// The rate with the fewest bits; one that was not compared with others is the best.
fn best(rates: &[Rate]) -> Option<f64> {
    match rates {
        [Rate { rate, bits_per_byte: None }] => Some(*rate),
        rates => {
            let finite =
                rates.iter().filter_map(|rate| Some((rate.rate, rate.bits_per_byte.filter(|bits| bits.is_finite())?)));
            finite.min_by(|(_, one), (_, other)| one.total_cmp(other)).map(|(rate, _)| rate)
        }
    }
}
