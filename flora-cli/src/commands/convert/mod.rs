//! `flora convert`: an fLoRA or HiRA adapter from a trained LoRA one, by a fit of what its layers put out for some text, and then, where
//! it is asked for, training.

mod distil;
mod fitting;
mod report;

use std::path::PathBuf;

use clap::builder::RangedU64ValueParser;
use clap::{Args, ValueEnum};
use flora::prelude::devices;
use flora_adapters::Layers;
use flora_checkpoint::{AdapterFolder, Model};
use flora_convert::{Kind, Limits};
use flora_model::{TrainOptions, TrainedModel};
use flora_tokenizer::Tokenizer;
use flora_train::data::{encode, read};
use flora_train::{Adapter, Dataset, JobId, Sources, TrainSegment, Trainee};

use super::error::CommandError;
use fitting::{Request, fitted};
use report::{Losses, Report};

/// Make an fLoRA or HiRA adapter of a trained LoRA one
///
/// Layer by layer, the product b a is fitted so that w0 ∘ (b a) does to the layer's inputs what the LoRA adapter does. The inputs are
/// those of a text in the adapter's domain. `--distil` then trains the result on that text.
#[derive(Args)]
pub(crate) struct Arguments {
    /// The folder of the LoRA adapter
    #[arg(value_name = "LORA")]
    adapter: PathBuf,
    /// What is made of it
    #[arg(long)]
    to: To,
    /// The rank of the result
    #[arg(long, default_value = "4", value_parser = RangedU64ValueParser::<usize>::new().range(1..=1 << 20))]
    rank: usize,
    /// Text to fit on: files or folders, as `flora train` takes them
    #[arg(long, required = true, value_name = "DATA")]
    text: Vec<PathBuf>,
    /// The extensions of the files of a folder that are read, separated by commas; all texts unless given
    #[arg(long, value_delimiter = ',', value_name = "EXTENSIONS")]
    extensions: Vec<String>,
    /// The folder in which the result gets a folder
    #[arg(long, value_name = "DIR")]
    out: PathBuf,
    /// The name of the result; the adapter's, with its new kind, unless given
    #[arg(long)]
    name: Option<String>,
    /// A .gguf file or a model's folder; SmolLM2-135M unless given, fetched once (93 MB)
    #[arg(long)]
    model: Option<PathBuf>,
    /// The most tokens of text that are fitted on; a tenth of them more is kept apart, to say what the result is worth
    #[arg(long, default_value = "16384", value_name = "TOKENS", value_parser = RangedU64ValueParser::<usize>::new().range(1..=1 << 24))]
    tokens: usize,
    /// The most tokens of a sequence
    #[arg(long, default_value = "128", value_name = "TOKENS", value_parser = RangedU64ValueParser::<usize>::new().range(1..=1 << 20))]
    sequence_length: usize,
    /// The most rounds of the fit, of two half-steps each
    #[arg(long, default_value = "20", value_parser = RangedU64ValueParser::<usize>::new().range(1..=10_000))]
    rounds: usize,
    /// Steps of training after the fit, by the text's own tokens, 8 sequences each
    #[arg(long, value_name = "STEPS")]
    distil: Option<u64>,
    /// The highest learning rate of that training
    #[arg(long, value_name = "RATE", default_value = "2e-3")]
    learning_rate: f64,
    /// Print JSON
    #[arg(long)]
    json: bool,
}

/// The kinds that multiply the base weight.
#[derive(Clone, Copy, Debug, ValueEnum)]
enum To {
    Flora,
    Hira,
}

impl To {
    fn kind(self) -> Kind {
        match self {
            Self::Flora => Kind::Flora,
            Self::Hira => Kind::Hira,
        }
    }

    /// The layer that computes it.
    fn layer(self) -> &'static str {
        match self {
            Self::Flora => "flora",
            Self::Hira => "hira",
        }
    }
}

/// A round that gains less than this part of the residual is the last.
const LEAST_GAIN: f64 = 1e-3;

/// The job of the adapter that is converted, and that of the result.
const TEACHER: JobId = JobId(0);
const RESULT: JobId = JobId(1);

pub(crate) fn convert(arguments: &Arguments) -> Result<(), CommandError> {
    let path = match &arguments.model {
        Some(path) => path.clone(),
        None => flora_toolchain::smollm2()?,
    };
    let model = Model::open(&path)?;
    let tokenizer = Tokenizer::open(&path)?;
    let layers = Layers::builtin()?;
    let trained = AdapterFolder::open(&arguments.adapter, layers.kinds())?;
    let (examples, _) = read(&Sources { paths: arguments.text.clone(), extensions: arguments.extensions.clone() })?;
    let data = Dataset::new(&encode(&examples, &tokenizer)?, arguments.sequence_length)?;
    let (fit, held_out) = parts(&data, arguments.tokens);
    if held_out.is_empty() {
        return Err(CommandError::LittleText);
    }

    let device = devices::open("host")?;
    let mut decoder = TrainedModel::load(&device, &model, TrainOptions::default())?;
    let teacher = Adapter::of_folder(&trained, &layers, &decoder)?;
    let folded = teacher.fold()?;
    fitting::check(&trained, &folded)?;
    decoder.place(TEACHER, &folded)?;
    let name = arguments.name.clone().unwrap_or_else(|| format!("{}-{}", trained.name, arguments.to.layer()));
    let request = Request {
        kind: arguments.to.kind(),
        layer: arguments.to.layer(),
        rank: arguments.rank,
        limits: Limits { rounds: arguments.rounds, least_gain: LEAST_GAIN },
    };
    let (adapter, found) = fitted(&decoder, &layers, &folded, &request, (&data, &fit, &held_out))?;
    decoder.place(RESULT, &adapter.fold()?)?;
    let mut losses = Losses {
        targets: 0,
        base: loss(&mut decoder, None, &data, &held_out)?,
        lora: loss(&mut decoder, Some(TEACHER), &data, &held_out)?,
        fitted: loss(&mut decoder, Some(RESULT), &data, &held_out)?,
        distilled: None,
    };
    losses.targets = held_out.iter().map(|index| data.sequences()[*index].targets.iter().flatten().count()).sum();
    let written = adapter.folder(&name).replace(&arguments.out)?;
    if let Some(steps) = arguments.distil {
        decoder.remove(TEACHER);
        decoder.remove(RESULT);
        let job = distil::Job {
            name,
            steps,
            learning_rate: arguments.learning_rate,
            sequence_length: arguments.sequence_length,
            request: fitting::adapter_request(&request, &folded, &decoder),
        };
        let others = data.clone().keep(|index| !held_out.contains(&index));
        let distilled;
        (decoder, distilled) = distil::distil(decoder, &layers, &written, job, others)?;
        decoder.place(RESULT, &distilled.fold()?)?;
        losses.distilled = Some(loss(&mut decoder, Some(RESULT), &data, &held_out)?);
    }
    let tokens = fit.iter().map(|index| data.sequences()[*index].tokens.len()).sum();
    Report { adapter: written, tokens, layers: found, losses }.tell(arguments.json)
}

/// The sequences to fit on, up to `tokens`, and a tenth as many others, spread over the text.
fn parts(data: &Dataset, tokens: usize) -> (Vec<usize>, Vec<usize>) {
    let mut order: Vec<usize> = (0..data.sequences().len()).collect();
    fastrand::Rng::with_seed(1).shuffle(&mut order);
    let (mut fit, mut held_out) = (Vec::new(), Vec::new());
    let (mut taken, mut at) = (0, 0);
    for index in order {
        let length = data.sequences()[index].tokens.len();
        // The second one, so that short texts have both, and then every eleventh.
        if at % 11 == 1 {
            held_out.push(index);
        } else {
            if taken + length > tokens && !fit.is_empty() {
                break;
            }
            taken += length;
            fit.push(index);
        }
        at += 1;
    }
    (fit, held_out)
}

fn segments<'a>(data: &'a Dataset, job: Option<JobId>, indices: &[usize]) -> Vec<TrainSegment<'a>> {
    let segment = |index: &usize| {
        let sequence = &data.sequences()[*index];
        TrainSegment { job, tokens: &sequence.tokens, targets: &sequence.targets }
    };
    indices.iter().map(segment).collect()
}

/// Sequences that run together.
const BATCH: usize = 8;

/// Nats a target.
fn loss(
    decoder: &mut TrainedModel,
    job: Option<JobId>,
    data: &Dataset,
    indices: &[usize],
) -> Result<f64, CommandError> {
    let (mut nats, mut targets) = (0.0, 0);
    for indices in indices.chunks(BATCH) {
        for loss in decoder.losses(&segments(data, job, indices))? {
            nats += loss.nats;
            targets += loss.targets;
        }
    }
    Ok(nats / targets as f64)
}
