//! `flora plan`: what the cost model says of a model's projections, without running them.
//!
//! Eq. 7 compares two lowerings of two kinds of adapter; so the answer has two halves: how each kind is computed best, and which
//! kind a deployment that may choose should train.

mod merged;
mod training;

use std::path::{Path, PathBuf};

use clap::Args;
use clap::builder::RangedU64ValueParser;
use flora::prelude::*;
use flora_checkpoint::Model;
use flora_plan::batch::{AdapterSlots, BatchShape, Segment};
use flora_plan::cost::{Kernel, LayerPrices, PricedLayer, Regime, eq7, work};
use flora_plan::lowering::Part;
use flora_plan::plan::{Candidate, candidates};
use serde::Serialize;

use super::error::CommandError;
use super::{layer, output, planner, types};
use crate::models::{self, ProjectionShape, QUERY_AND_KEY, is_target, name_in_layer};

/// Price every lowering of a model's projections
#[derive(Args)]
pub(crate) struct Arguments {
    /// starcoder-15b, starcoder-3b, starcoder-1b, smollm2-135m, or a .gguf file, a .safetensors file or a model's folder
    #[arg(long, default_value = "starcoder-15b")]
    model: String,
    /// Ranks, separated by commas
    #[arg(long, value_delimiter = ',', default_value = "1,2,4,8,16", value_parser = RangedU64ValueParser::<u32>::new().range(1..=1024))]
    ranks: Vec<u32>,
    /// Segments of the batch, each with an adapter of its own
    #[arg(long, default_value = "8", value_parser = RangedU64ValueParser::<u32>::new().range(1..=4096))]
    segments: u32,
    /// Rows of a segment, separated by commas: 1 in decode, a prompt's in prefill
    #[arg(long, value_delimiter = ',', default_value = "1,128", value_parser = RangedU64ValueParser::<u32>::new().range(1..=MAX_ROWS))]
    tokens: Vec<u32>,
    /// The type of activations and adapters
    #[arg(long, default_value = "f32", value_parser = types::element())]
    dtype: Element,
    /// The format of the base weight; that of the activations unless given
    #[arg(long, value_parser = types::weight_format())]
    weight: Option<WeightFormat>,
    /// Projections to adapt, by the end of their path, or `all`; the query and key projections unless given, as in the paper
    #[arg(long, value_delimiter = ',')]
    targets: Vec<String>,
    /// Price a step of training, kind by kind, in place of a batch that is served
    #[arg(long)]
    training: bool,
    /// The device whose coefficients are used, as `flora devices` lists it
    #[arg(long, default_value = "auto")]
    device: String,
    /// A tuning file to use in place of the device's own
    #[arg(long, conflicts_with = "device")]
    coefficients: Option<PathBuf>,
    /// Print JSON
    #[arg(long)]
    json: bool,
}

/// Rows of a whole batch, so that no product of extents exceeds 64 bits.
const MAX_ROWS: u64 = 1 << 20;

/// The adapters that are compared, and the part of them that is lowered.
const ADAPTERS: [(&str, Part); 2] = [("flora", Part::Multiplicative), ("lora", Part::Additive)];

/// What the command answers.
#[derive(Serialize)]
struct Answer {
    device: String,
    /// Of the layers that are planned.
    format: String,
    /// The format whose coefficients are used; another where this one wasn't measured.
    measured_for: String,
    plans: Vec<Row>,
    train: Vec<Advice>,
}

/// One line: an adapter of one rank on projections of one shape.
#[derive(Serialize)]
struct Row {
    adapter: &'static str,
    layer: String,
    count: usize,
    d: u32,
    k: u32,
    tokens: u32,
    segments: u32,
    rank: u32,
    /// Seconds per MAC of BMM, at this batch.
    c1: f64,
    /// Seconds per MAC of matmul, at this batch.
    c2: f64,
    eq7: f64,
    critical_rank: Option<f64>,
    base_seconds: f64,
    /// Of those that need no resident weight.
    chosen: Lowering,
    why: String,
    /// `merged` is with the weight of one of the adapters resident.
    candidates: Vec<Candidate>,
    /// The share of the batch's rows from which that is the cheapest.
    merged_pays_from: Option<f64>,
}

/// Which kind of adapter costs less over all chosen projections of the model, each by its best lowering.
#[derive(Serialize)]
struct Advice {
    tokens: u32,
    segments: u32,
    rank: u32,
    base_seconds: f64,
    flora_seconds: f64,
    lora_seconds: f64,
    cheaper: &'static str,
}

/// Projections of one shape.
struct Group {
    names: Vec<String>,
    count: usize,
    shape: LayerShape,
}

pub(crate) fn plan(arguments: &Arguments) -> Result<(), CommandError> {
    for tokens in &arguments.tokens {
        let rows = u64::from(arguments.segments) * u64::from(*tokens);
        if rows > MAX_ROWS {
            return Err(CommandError::TooMany { what: "the rows of the batch", found: rows, limit: MAX_ROWS });
        }
    }
    let groups = groups(&arguments.model, &arguments.targets)?;
    let coefficients = match &arguments.coefficients {
        Some(path) => DeviceCoefficients::read(path)?,
        None => planner::for_device(&devices::open(&arguments.device)?)?.0.coefficients().clone(),
    };
    let uniform = LayerFormat::uniform(arguments.dtype);
    let format = LayerFormat { weight: arguments.weight.unwrap_or(uniform.weight), ..uniform };
    if arguments.training {
        let answer = training::answer(arguments, &groups, &coefficients, format)?;
        return match arguments.json {
            true => output::print_json(&answer),
            false => output::print(&training::human(arguments, &answer)),
        };
    }
    let mut plans = Vec::new();
    for (adapter, part) in ADAPTERS {
        let compiled = layer::open(adapter)?.compiled;
        for tokens in &arguments.tokens {
            for group in &groups {
                let prices = LayerPrices::new(&coefficients, PricedLayer { shape: group.shape, format });
                let batch = Batch { adapter, part, segments: arguments.segments, tokens: *tokens };
                plans.extend(
                    arguments.ranks.iter().map(|rank| row(&coefficients, &prices, &compiled, group, batch, *rank)),
                );
            }
        }
    }
    let (measured_for, _) = coefficients.of_format(format);
    let answer = Answer {
        device: coefficients.device.clone(),
        format: format.to_string(),
        measured_for: measured_for.to_owned(),
        train: advice(arguments, &plans),
        plans,
    };
    if arguments.json { output::print_json(&answer) } else { output::print(&human(arguments, &answer)) }
}

/// The kinds of adapters that Eq. 7 compares, over all projections.
fn advice(arguments: &Arguments, plans: &[Row]) -> Vec<Advice> {
    let mut advice = Vec::new();
    for tokens in &arguments.tokens {
        for rank in &arguments.ranks {
            let own = |adapter: &'static str| {
                plans.iter().filter(move |row| (row.adapter, row.tokens, row.rank) == (adapter, *tokens, *rank))
            };
            let best = |row: &Row| {
                let own = row.candidates.iter().find(|candidate| candidate.lowering == row.chosen);
                row.count as f64 * own.map_or(f64::NAN, |candidate| candidate.predicted_seconds)
            };
            let (flora_seconds, lora_seconds) =
                (own("flora").map(best).sum::<f64>(), own("lora").map(best).sum::<f64>());
            advice.push(Advice {
                tokens: *tokens,
                segments: arguments.segments,
                rank: *rank,
                base_seconds: own("lora").map(|row| row.count as f64 * row.base_seconds).sum(),
                flora_seconds,
                lora_seconds,
                cheaper: if flora_seconds <= lora_seconds { "flora" } else { "lora" },
            });
        }
    }
    advice
}

/// The chosen projections of a model, those of one shape together.
fn groups(model: &str, targets: &[String]) -> Result<Vec<Group>, CommandError> {
    let shapes: Vec<ProjectionShape> = match models::builtin(model) {
        Some(shapes) => std::iter::repeat_n(shapes.projections, shapes.layers).flatten().collect(),
        None if Path::new(model).exists() => {
            let model = Model::open(Path::new(model))?;
            let shape = |projection: &flora_checkpoint::Projection| {
                let name = name_in_layer(&projection.path).to_owned();
                ProjectionShape { name, d: projection.d, k: projection.k }
            };
            model.projections().iter().map(shape).collect()
        }
        None => {
            return Err(CommandError::UnknownModel { name: model.to_owned(), known: models::NAMES.join(", ") });
        }
    };
    let is_chosen = |name: &str| match targets {
        [] => QUERY_AND_KEY.iter().any(|target| is_target(name, target)),
        targets => targets.iter().any(|target| target == "all" || is_target(name, target)),
    };
    let mut groups: Vec<Group> = Vec::new();
    for ProjectionShape { name, d, k } in shapes.iter().filter(|shape| is_chosen(&shape.name)) {
        let too_many = |what, extent: usize| CommandError::TooMany { what, found: extent as u64, limit: 1 << 20 };
        let extent = |what, extent: usize| match u32::try_from(extent) {
            Ok(small) if small <= 1 << 20 => Ok(small),
            _ => Err(too_many(what, extent)),
        };
        let shape =
            LayerShape { d: extent("the inputs of a projection", *d)?, k: extent("the outputs of a projection", *k)? };
        let position = groups.iter().position(|group| group.shape == shape).unwrap_or_else(|| {
            groups.push(Group { names: Vec::new(), count: 0, shape });
            groups.len() - 1
        });
        groups[position].count += 1;
        if !groups[position].names.contains(name) {
            groups[position].names.push(name.clone());
        }
    }
    if groups.is_empty() {
        let mut known: Vec<_> = shapes.into_iter().map(|shape| shape.name).collect();
        known.sort();
        known.dedup();
        let wanted: Vec<&str> = match targets {
            [] => QUERY_AND_KEY.to_vec(),
            targets => targets.iter().map(String::as_str).collect(),
        };
        let known = format!("{}; choose with --targets, or take --targets all", known.join(", "));
        return Err(CommandError::NoTarget { model: model.to_owned(), targets: wanted.join(" or "), known });
    }
    Ok(groups)
}

/// A batch of equal segments, each with an adapter of its own.
#[derive(Clone, Copy)]
struct Batch {
    adapter: &'static str,
    part: Part,
    segments: u32,
    tokens: u32,
}

fn row(
    coefficients: &DeviceCoefficients,
    prices: &LayerPrices,
    compiled: &CompiledLayer,
    group: &Group,
    batch: Batch,
    rank: u32,
) -> Row {
    let Batch { adapter, part, segments, tokens } = batch;
    let mut slots = (0..segments).map(|_| compiled.slots(rank, 0)).collect::<Vec<_>>();
    let rows = (0..segments).map(|adapter| Segment { rows: tokens, adapter }).collect::<Vec<_>>();
    let batch = BatchShape::of(&rows, &slots);
    let layer = prices.layer();
    let (_, own) = coefficients.of_format(layer.format);
    let seconds_per_mac = |kernel: Kernel, regime: Regime| {
        own.seconds_per_mac.get(&kernel).map_or(f64::NAN, |surface| surface.at(layer.extent(), regime))
    };
    let bmm = Regime { rows: f64::from(tokens), rank: f64::from(rank), adapters: f64::from(segments) };
    let (c1, c2) =
        (seconds_per_mac(Kernel::LowRankBmm, bmm), seconds_per_mac(Kernel::Matmul, Regime::of_rows(batch.tokens)));
    let eq7 = eq7(group.shape, u64::from(rank), c1, c2);
    let base = BatchShape::of(&[Segment { rows: segments * tokens, adapter: 0 }], &[AdapterSlots::base()]);
    let base_seconds = prices.price(&work(&Plan::default(), layer, &base, false, prices.pads_blocks()));
    slots[0].is_merged = true;
    let candidates = candidates(part, prices, &BatchShape::of(&rows, &slots));
    // Whether a weight is worth keeping is no question of one batch; its price is there to be compared with.
    let mut choices = candidates.iter().filter(|candidate| candidate.lowering != Lowering::Merged);
    let (chosen, why) = match (choices.next(), choices.next()) {
        (Some(best), Some(next)) => {
            let times = next.predicted_seconds / best.predicted_seconds;
            (best.lowering, format!("{} takes {times:.2} times as long", next.lowering))
        }
        (Some(only), None) => (only.lowering, "there is no other".to_owned()),
        // Every part has lowerings; see the table.
        (None, _) => (Lowering::Stacked, "there is none".to_owned()),
    };
    Row {
        adapter,
        layer: group.names.join(", "),
        count: group.count,
        d: group.shape.d,
        k: group.shape.k,
        tokens,
        segments,
        rank,
        c1,
        c2,
        eq7: eq7.left,
        critical_rank: eq7.critical_rank,
        base_seconds,
        chosen,
        why,
        candidates,
        merged_pays_from: merged::pays_from(prices, compiled, rank, (segments, tokens)),
    }
}

fn human(arguments: &Arguments, answer: &Answer) -> String {
    let Arguments { model, segments, .. } = arguments;
    let Answer { device, format, measured_for, plans, train } = answer;
    let mut text = format!("{model} in {format}, {segments} segments, on {device}\n");
    if measured_for != format {
        text += &format!(
            "by the coefficients of {measured_for}: {format} wasn't measured; `flora tune --dtype {} --weight {}` does\n",
            arguments.dtype,
            format.rsplit('/').next().unwrap_or_default()
        );
    }
    for tokens in &arguments.tokens {
        let phase = if *tokens == 1 { "decode, 1 row".to_owned() } else { format!("prefill, {tokens} rows") };
        text += &format!("\n{phase} a segment\n\n");
        let columns = [
            "<adapter",
            "<layer",
            ">count",
            ">d",
            ">k",
            ">rank",
            ">c1 / c2",
            ">Eq. 7",
            ">critical rank",
            ">base",
            "<chosen",
            ">merged from",
            "<predicted, each",
        ];
        let mut table = output::table(&columns);
        for row in plans.iter().filter(|row| row.tokens == *tokens) {
            let predicted = |candidate: &Candidate| {
                format!("{} {}", candidate.lowering, output::seconds(candidate.predicted_seconds))
            };
            table.add_row([
                row.adapter.to_owned(),
                row.layer.clone(),
                row.count.to_string(),
                row.d.to_string(),
                row.k.to_string(),
                row.rank.to_string(),
                format!("{:.1}", row.c1 / row.c2),
                format!("{:.3}", row.eq7),
                row.critical_rank.map_or_else(|| "none".to_owned(), |rank| format!("{rank:.2}")),
                output::seconds(row.base_seconds),
                row.chosen.to_string(),
                row.merged_pays_from.map_or_else(|| "never".to_owned(), |share| format!("{:.0} %", 100.0 * share)),
                row.candidates.iter().map(predicted).collect::<Vec<_>>().join(", "),
            ]);
        }
        text += &output::lines(&table);
    }
    text += "\nEq. 7 at 1 or more: fLoRA by stacked is cheaper than LoRA by bmm. Below the critical rank that holds.\n";
    text += "merged is what the batch takes with the weight of one of its adapters kept (`flora serve --merge`). It pays where the adapter \
             has at least that share of so many rows, the others sharing the rest.\n";
    text += "\nWhich adapter to train: all of these projections, each by its best lowering\n\n";
    let columns = [">rows a segment", ">rank", ">base", ">flora", ">lora", "<cheaper"];
    let mut table = output::table(&columns);
    for row in train {
        let of_base = |seconds: f64| format!("{:.3}x", seconds / row.base_seconds);
        let times = row.flora_seconds.max(row.lora_seconds) / row.flora_seconds.min(row.lora_seconds);
        table.add_row([
            row.tokens.to_string(),
            row.rank.to_string(),
            output::seconds(row.base_seconds),
            of_base(row.flora_seconds),
            of_base(row.lora_seconds),
            format!("{}, {times:.2} times", row.cheaper),
        ]);
    }
    text + &output::lines(&table)
}
