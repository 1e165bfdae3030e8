//! `flora bench serving`: the paper's serving experiments (§4.1, Fig. 2): throughput and latency against rank, every request with
//! an adapter of its own, under continuous batching.

mod breakdown;
mod drive;
mod predict;
mod seeded;
mod table;
mod workload;

use std::sync::Arc;
use std::time::Duration;

use clap::Args;
use clap::builder::RangedU64ValueParser;
use flora::prelude::*;
use flora_adapters::Layers;
use flora_checkpoint::Model;
use flora_engine::{Engine, Vocabulary};
use flora_model::PlanningChoice;
use tempfile::TempDir;

use super::case::BASE;
use super::report::Times;
use super::serving_answer::{Answer, DecodeStep, Latency, Percentiles, Throughput, Variant};
use crate::commands::error::CommandError;
use crate::commands::serving::{Activations, ModelArguments, decoder, engine, saved};
use crate::commands::{output, serving};
use breakdown::Spans;
use drive::{Outcome, Planned, drive};
use seeded::{STARCODERS, SeededAdapters};
use workload::{Lengths, arrivals, lengths};

/// Redo the paper's serving experiments: requests that each bring their own adapter, under continuous batching
///
/// Each variant gets the same requests: the model without adapters, fLoRA, LoRA by bmm as the paper has it, and LoRA by its best
/// lowering, each at every rank. `--model starcoder-1b` (or 3b, 15b) makes a model of those shapes with random weights in a
/// temporary folder. What the memory can't hold is predicted from tuned coefficients, and marked so.
#[derive(Args)]
pub(super) struct Arguments {
    #[command(flatten)]
    model: ModelArguments,
    /// Requests of the throughput experiment, all at once
    #[arg(long, default_value = "1000", value_parser = RangedU64ValueParser::<usize>::new().range(0..=1_000_000))]
    requests: usize,
    /// Requests of the latency experiment
    #[arg(long, default_value = "200", value_parser = RangedU64ValueParser::<usize>::new().range(0..=1_000_000))]
    latency_requests: usize,
    /// Arrivals a second to be expected in the latency experiment
    #[arg(long, default_value = "1")]
    rate: f64,
    /// Ranks, separated by commas
    #[arg(long, value_delimiter = ',', default_value = "1,2,4,8", value_parser = RangedU64ValueParser::<u32>::new().range(1..=1024))]
    ranks: Vec<u32>,
    /// How long prompts and outputs are beside those of real chats
    #[arg(long, default_value = "1")]
    scale: f64,
    /// Steps of a decoding of all sequences, which takes turns with one without adapters and is held against predictions; 0 for none
    #[arg(long, default_value = "16")]
    steps: u32,
    /// Show what the time of a prefill and of decoding steps is spent on, and measure nothing else
    #[arg(long)]
    breakdown: bool,
    /// How often each of the two has its turn, or a workload is broken down
    #[arg(long, default_value = "7", value_parser = RangedU64ValueParser::<usize>::new().range(1..=1000))]
    rounds: usize,
    /// Seed of everything random
    #[arg(long, default_value = "1")]
    seed: u64,
    /// Print JSON
    #[arg(long)]
    json: bool,
}

/// One way to serve adapters.
#[derive(Clone, Copy)]
struct Way {
    adapter: &'static str,
    /// The built-in layer of the adapters; `None` for the base model.
    layer: Option<&'static str>,
    /// `None`: as it is planned when a model is served.
    fixed: Option<(MultiplicativeLowering, AdditiveLowering)>,
}

const WAYS: [Way; 4] = [
    Way { adapter: BASE, layer: None, fixed: None },
    Way { adapter: "flora", layer: Some("flora"), fixed: None },
    // The paper's baseline.
    Way { adapter: "lora", layer: Some("lora"), fixed: Some((MultiplicativeLowering::OnChip, AdditiveLowering::Bmm)) },
    Way { adapter: "lora", layer: Some("lora"), fixed: None },
];

/// What every variant is served from.
struct Setting<'a> {
    arguments: &'a Arguments,
    model: &'a Arc<Model>,
    device: &'a Device,
    planner: Option<&'a Planner>,
    layers: &'a Layers,
    adapted: &'a [String],
}

pub(super) fn serving(arguments: &Arguments) -> Result<(), CommandError> {
    let device = serving::device(&arguments.model)?;
    let (model, weights, _folder) = open(arguments)?;
    let planner = saved(arguments.model.plan, &device)?;
    let device = planner.as_ref().map_or_else(|| device.clone(), |planner| planner.tuned(&device));
    let layers = Layers::builtin()?;
    let config = model.decoder()?;
    let adapted = match &arguments.model.adapted[..] {
        [] => flora_model::adapted_in_the_paper(&config),
        named => named.to_vec(),
    };
    let (context, vocabulary) = (config.context_length() as u32, config.vocabulary() as u32);
    let spans = arguments.breakdown.then(Spans::default);
    if let Some(spans) = &spans {
        crate::log::listen(spans.clone());
    }
    let setting = Setting {
        arguments,
        model: &model,
        device: &device,
        planner: planner.as_ref(),
        layers: &layers,
        adapted: &adapted,
    };

    let longest = context.min(arguments.model.cache_tokens as u32 / 2);
    let bulk = lengths(arguments.requests, arguments.scale, longest, arguments.seed)?;
    let arriving = lengths(arguments.latency_requests, arguments.scale, longest, arguments.seed ^ 1)?;
    let arrivals = arrivals(arguments.latency_requests, arguments.rate, arguments.seed ^ 2);

    // The base once more at the end: by as much as the two differ, the machine has changed under the others.
    let variants = [variants(&arguments.ranks), variants(&[])].concat();
    let bar = output::progress(variants.len(), "serving");
    let mut answer = Answer {
        device: format!("{} ({})", device.info().name, device.info().id),
        model: model.name().to_owned(),
        weights: weights.to_owned(),
        dtype: types_of(&arguments.model),
        adapted: adapted.clone(),
        sequences: arguments.model.sequences,
        throughput: Vec::new(),
        latency: Vec::new(),
        steps: Vec::new(),
        breakdown: Vec::new(),
    };
    // Beside every other engine, to take turns with it.
    let beside = (arguments.steps > 0 && spans.is_none()).then(|| setting.start(WAYS[0], 0)).transpose()?;
    for (way, rank) in variants {
        let variant = setting.variant(way, rank);
        let engine = setting.start(way, rank)?;
        if let Some(spans) = &spans {
            let adapters = |number| way.layer.map(|_| SeededAdapters::name(number));
            let counts = (arguments.model.sequences, arguments.rounds);
            let drawn = (vocabulary, longest, arguments.seed);
            answer.breakdown.extend(breakdown::measure(spans, &engine, (&variant, &adapters), counts, drawn)?);
            bar.inc(1);
            continue;
        }
        let planned = |lengths: &[Lengths], arrivals: &[Duration]| -> Vec<Planned> {
            let one = |(number, lengths): (usize, &Lengths)| Planned {
                lengths: *lengths,
                adapter: way.layer.map(|_| SeededAdapters::name(number)),
                arrival: arrivals.get(number).copied().unwrap_or_default(),
            };
            lengths.iter().enumerate().map(one).collect()
        };
        // The first steps compile kernels and fill caches.
        let few = [Lengths { prompt: 8, output: 4 }; 2];
        drive(&engine, &planned(&few, &[]), vocabulary, arguments.seed)?;
        if !bulk.is_empty() {
            let outcome = drive(&engine, &planned(&bulk, &[]), vocabulary, arguments.seed)?;
            answer.throughput.push(throughput(variant.clone(), &bulk, &outcome));
        }
        if !arriving.is_empty() {
            let outcome = drive(&engine, &planned(&arriving, &arrivals), vocabulary, arguments.seed)?;
            answer.latency.push(latency(variant.clone(), arguments.rate, &outcome));
        }
        if let Some(beside) = &beside {
            let sequences = arguments.model.sequences;
            let equal = vec![Lengths { prompt: 1, output: arguments.steps }; sequences];
            let step = |engine: &Engine, planned: &[Planned]| -> Result<f64, CommandError> {
                let outcome = drive(engine, planned, vocabulary, arguments.seed)?;
                Ok(outcome.seconds / outcome.steps.max(1) as f64)
            };
            let own = planned(&equal, &[]);
            let plain: Vec<_> = own.iter().map(|planned| Planned { adapter: None, ..planned.clone() }).collect();
            let (mut seconds, mut ratios) = (Times::default(), Times::default());
            // The first round warms up.
            for round in 0..=arguments.rounds {
                let (base, own) = (step(beside, &plain)?, step(&engine, &own)?);
                if round > 0 {
                    seconds.push(own);
                    ratios.push(own / base);
                }
            }
            let predicted = setting.predicted(&variant, sequences as u32);
            answer.steps.extend(predicted.map(|predicted| DecodeStep {
                seconds: Some(seconds.median()),
                ratio_to_base: Some(ratios.median()),
                spread: Some(ratios.spread()),
                ..predicted
            }));
        }
        bar.inc(1);
    }
    bar.finish_and_clear();
    predict::add_rest(&mut answer.steps);
    if spans.is_none() {
        answer.steps.extend(setting.paper_models());
    }
    if arguments.json { output::print_json(&answer) } else { output::print(&table::human(&answer)) }
}

/// The model, `stored` or `seeded`, and the folder that goes when it does.
fn open(arguments: &Arguments) -> Result<(Arc<Model>, &'static str, Option<TempDir>), CommandError> {
    let named = arguments.model.model.as_ref().and_then(|path| path.to_str());
    let Some(shapes) = STARCODERS.iter().find(|shapes| Some(shapes.name) == named) else {
        let path = serving::model_path(&arguments.model)?;
        return Ok((Arc::new(Model::open(&path)?), "stored", None));
    };
    let failed = |source: std::io::Error| CommandError::Seeded { model: shapes.name, reason: source.to_string() };
    let folder = TempDir::with_prefix("flora-").map_err(failed)?;
    let path = folder.path().join(shapes.name);
    std::fs::create_dir(&path).map_err(failed)?;
    output::note(&format!("writing random weights of {}'s shapes to {}", shapes.name, path.display()));
    let unwritten = |error| CommandError::Seeded { model: shapes.name, reason: format!("{error}") };
    seeded::write(shapes, &path, arguments.seed).map_err(unwritten)?;
    Ok((Arc::new(Model::open(&path)?), "seeded", Some(folder)))
}

/// The base, and the others at every rank.
fn variants(ranks: &[u32]) -> Vec<(Way, u32)> {
    let of = |way: Way| {
        let ranks = if way.layer.is_some() { ranks.to_vec() } else { vec![0] };
        ranks.into_iter().map(move |rank| (way, rank))
    };
    WAYS.into_iter().flat_map(of).collect()
}

impl Setting<'_> {
    fn variant(&self, way: Way, rank: u32) -> Variant {
        let lowering = match (way.layer, way.fixed, self.planner) {
            (None, ..) => "matmul".to_owned(),
            (_, Some((_, additive)), _) => additive.to_string(),
            (_, None, Some(_)) => "tuned".to_owned(),
            (Some("flora"), None, None) => "on_chip".to_owned(),
            (Some(_), None, None) => "fused".to_owned(),
        };
        Variant { adapter: way.adapter.to_owned(), lowering, rank }
    }

    fn start(&self, way: Way, rank: u32) -> Result<Engine, CommandError> {
        let arguments = &self.arguments.model;
        let planning = match (way.fixed, self.planner) {
            (Some((multiplicative, additive)), _) => PlanningChoice::Fixed(Plan::new(multiplicative, additive)),
            (None, Some(planner)) => PlanningChoice::Priced(planner.coefficients()),
            (None, None) => PlanningChoice::default(),
        };
        let source = SeededAdapters {
            model: self.model.clone(),
            layers: self.layers.clone(),
            adapted: self.adapted.to_vec(),
            layer: way.layer,
            rank: rank as usize,
            element: arguments.dtype,
            seed: self.arguments.seed,
        };
        // Requests wait for nothing but their turn.
        let most = self.arguments.requests.max(self.arguments.latency_requests).max(arguments.sequences);
        let arguments = ModelArguments { waiting: most.max(arguments.waiting), ..arguments.clone() };
        let (decoder, _) = decoder(&arguments, None, self.device, self.model, planning)?;
        engine(&arguments, None, decoder, Vocabulary::new(Vec::new()), source)
    }
}

/// The types that a model computes in.
fn types_of(arguments: &ModelArguments) -> String {
    match arguments.activations {
        Activations::Float => arguments.dtype.name().to_owned(),
        Activations::Int8 => format!("{} with int8 activations", arguments.dtype.name()),
    }
}

fn throughput(variant: Variant, lengths: &[Lengths], outcome: &Outcome) -> Throughput {
    let prompt_tokens = lengths.iter().map(|one| u64::from(one.prompt)).sum::<u64>();
    let generated_tokens = outcome.requests.iter().map(|heard| u64::from(heard.tokens)).sum::<u64>();
    Throughput {
        variant,
        requests: lengths.len(),
        prompt_tokens,
        generated_tokens,
        steps: outcome.steps,
        seconds: outcome.seconds,
        tokens_per_second: (prompt_tokens + generated_tokens) as f64 / outcome.seconds,
        generated_per_second: generated_tokens as f64 / outcome.seconds,
    }
}

fn latency(variant: Variant, rate: f64, outcome: &Outcome) -> Latency {
    let seconds = |of: fn(&drive::Heard) -> Duration| {
        Percentiles::of(outcome.requests.iter().map(|heard| of(heard).as_secs_f64()).collect())
    };
    let further = outcome.requests.iter().filter(|heard| heard.tokens > 1);
    let each = further.map(|heard| (heard.whole - heard.first).as_secs_f64() / f64::from(heard.tokens - 1));
    Latency {
        variant,
        requests: outcome.requests.len(),
        rate,
        time_to_first_token: seconds(|heard| heard.first),
        time_per_output_token: Percentiles::of(each.collect()),
        latency: seconds(|heard| heard.whole),
    }
}
