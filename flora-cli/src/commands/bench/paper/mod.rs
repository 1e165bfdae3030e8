//! `flora bench paper`: the paper's throughput against rank (§4.1, Fig. 2), layer by layer, on this device.

mod analysis;

use std::collections::{BTreeMap, BTreeSet};

use clap::Args;
use clap::builder::{PossibleValuesParser, RangedU64ValueParser};
use flora::prelude::*;
use flora_plan::cost::PricedLayer;
use flora_plan::lowering::PartLowering;
use flora_plan::schedule::{Schedule, ScheduleError, schedule};
use flora_runtime::ProjectionError;
use flora_tune::measure::{EqualSegments, LayerBench};

pub(crate) use super::case::BASE;
use super::case::{Case, MATMUL, Tokens, fits, is_impossible};
use super::layers::tokens;
use super::report::Times;
use crate::commands::error::CommandError;
use crate::commands::{output, types};
use crate::models::{self, QUERY_AND_KEY, is_target};
pub(crate) use analysis::{Choice, Coordinates, Crossing, Curves, Record, panels};

/// Redo the paper's analysis: throughput of fLoRA and of LoRA against rank, and where they cross
///
/// Every adapter of a layer has its turn, round after round; the median counts. Each call takes the next of several copies of
/// the layer, which no cache holds together, as a model's layers follow one another. A way to compute an adapter that takes long
/// has fewer turns, and one that takes over 8 times as long as the fastest is measured twice.
#[derive(Args)]
pub(super) struct Arguments {
    /// The device, as `flora devices` lists it
    #[arg(long, default_value = "host")]
    device: String,
    /// Models whose query and key projections are measured, separated by commas
    #[arg(long, value_delimiter = ',', default_value = "starcoder-1b,starcoder-3b,starcoder-15b", value_parser = PossibleValuesParser::new(models::NAMES))]
    models: Vec<String>,
    /// Ranks, separated by commas
    #[arg(long, value_delimiter = ',', default_value = "1,2,3,4,6,8,12,16", value_parser = RangedU64ValueParser::<u32>::new().range(1..=1024))]
    ranks: Vec<u32>,
    /// Segments, each with an adapter of its own, and tokens of each; may be repeated; default 32x1 and 4x128
    #[arg(long, value_name = "SEGMENTSxTOKENS", value_parser = tokens)]
    tokens: Vec<Tokens>,
    /// The type of activations and adapters
    #[arg(long, default_value = "f32", value_parser = types::element())]
    dtype: Element,
    /// Formats of the base weight, separated by commas; that of the activations unless given
    #[arg(long, value_delimiter = ',', value_parser = types::weight_format())]
    weight: Vec<WeightFormat>,
    /// Repetitions that count; fewer of what takes long
    #[arg(long, default_value = "9", value_parser = RangedU64ValueParser::<usize>::new().range(1..=100_000))]
    rounds: usize,
    /// Print JSON
    #[arg(long)]
    json: bool,
}

/// What is compared: the paper's two formulations, and the best that flora has for each adapter.
const VARIANTS: [(&str, PartLowering); 4] = [
    ("flora", PartLowering::Multiplicative(MultiplicativeLowering::Stacked)),
    ("flora", PartLowering::Multiplicative(MultiplicativeLowering::OnChip)),
    ("lora", PartLowering::Additive(AdditiveLowering::Bmm)),
    ("lora", PartLowering::Additive(AdditiveLowering::Fused)),
];
/// How many times as long as the fastest adapter a variant may take to be measured more than twice.
const SLOW: f64 = 8.0;
/// All repetitions of a variant take no longer, unless they are [`LEAST`].
const VARIANT_SECONDS: f64 = 1.0;
/// Repetitions of a variant that takes long, its first among them.
const LEAST: usize = 3;

/// A projection of a model.
struct Layer {
    model: String,
    name: String,
    case: Case,
}

impl Arguments {
    fn layers(&self) -> Vec<Layer> {
        let batches = match &self.tokens[..] {
            [] => vec![Tokens { segments: 32, rows: 1 }, Tokens { segments: 4, rows: 128 }],
            tokens => tokens.to_vec(),
        };
        let own = [WeightFormat::Float(self.dtype)];
        let mut layers = Vec::new();
        for weight in if self.weight.is_empty() { &own[..] } else { &self.weight } {
            let format = LayerFormat { weight: *weight, ..LayerFormat::uniform(self.dtype) };
            for tokens in &batches {
                for model in &self.models {
                    let projections = models::builtin(model).into_iter().flat_map(|shapes| shapes.projections);
                    let adapted = projections
                        .filter(|projection| QUERY_AND_KEY.iter().any(|end| is_target(&projection.name, end)));
                    layers.extend(adapted.map(|projection| {
                        let shape = LayerShape { d: projection.d as u32, k: projection.k as u32 };
                        let case = Case { shape, tokens: *tokens, format };
                        Layer { model: model.clone(), name: projection.name, case }
                    }));
                }
            }
        }
        layers
    }
}

pub(super) fn paper(arguments: &Arguments) -> Result<(), CommandError> {
    let device = devices::open(&arguments.device)?;
    let mut ranks = arguments.ranks.clone();
    ranks.sort_unstable();
    ranks.dedup();
    let name = format!("{} ({})", device.info().name, device.info().id);
    let layers = arguments.layers();
    let bar = output::progress(layers.len() * (arguments.rounds + 1), "measuring");
    let mut records = Vec::new();
    for layer in &layers {
        let note = |text: &str| bar.suspend(|| output::note(&format!("note: {}: {text}", title(layer))));
        let measured = measure(&device, layer.case, &ranks, arguments.rounds, note, &bar)?;
        let base = measured.first().map_or(f64::NAN, |base| base.times.median());
        records.extend(measured.iter().map(|variant| record(&name, layer, variant, base)));
    }
    bar.finish_and_clear();
    if arguments.json { output::print_json(&records) } else { output::print(&human(&name, &records)) }
}

fn title(Layer { model, name, case }: &Layer) -> String {
    let Case { tokens: Tokens { segments, rows }, format, .. } = case;
    format!("{model} {name}, {segments}x{rows} tokens, weight {}", format.weight)
}

/// A way to compute a layer.
struct Variant {
    adapter: &'static str,
    lowering: &'static str,
    rank: u32,
    schedule: Schedule,
    first_seconds: f64,
    times: Times,
}

/// Every variant that the device can run, after a call of each; the base GEMM first.
fn variants(
    bench: &LayerBench<'_>,
    case: Case,
    ranks: &[u32],
    note: impl Fn(&str),
) -> Result<Vec<Variant>, CommandError> {
    let Case { shape, tokens: Tokens { segments: adapters, rows }, .. } = case;
    let time = |adapter, lowering, rank, schedule: Result<Schedule, ScheduleError>| -> Result<_, CommandError> {
        let schedule = schedule.map_err(ProjectionError::from)?;
        let first_seconds = bench.seconds(&schedule)?;
        Ok(Variant { adapter, lowering, rank, schedule, first_seconds, times: Times::default() })
    };
    let mut variants = vec![time(BASE, MATMUL, 0, Schedule::base_gemm(shape, case.tokens.all()))?];
    for (adapter, computes) in VARIANTS {
        let (part, lowering) = (computes.part(), computes.lowering());
        let plan = Plan::default().with_part(computes);
        for rank in ranks {
            let (segments, slots) = EqualSegments { part, adapters, rows, rank: *rank }.batch();
            match time(adapter, lowering.name(), *rank, schedule(&plan, shape, &segments, &slots, false)) {
                Ok(variant) => variants.push(variant),
                Err(error) if is_impossible(&error) => {
                    note(&format!("left out: {adapter} of rank {rank} by {lowering}: {error}"));
                }
                Err(error) => return Err(error),
            }
        }
    }
    Ok(variants)
}

/// Every variant in turn; slow ones every few rounds, very slow ones not at all after two repetitions.
fn measure(
    device: &Device,
    case: Case,
    ranks: &[u32],
    rounds: usize,
    note: impl Fn(&str),
    bar: &indicatif::ProgressBar,
) -> Result<Vec<Variant>, CommandError> {
    let Case { shape, tokens, format } = case;
    let (widest, highest) = (u64::from(shape.d.max(shape.k)), u64::from(ranks.last().copied().unwrap_or(1)));
    fits("the numbers of the adapters", u64::from(tokens.segments) * highest * widest)?;
    fits("the numbers of the batch's rows", u64::from(tokens.all()) * widest.max(4 * highest))?;
    let slots = u64::from(tokens.segments) * highest;
    let bench = LayerBench::new(device, PricedLayer { shape, format }, slots as u32)?;
    let mut variants = variants(&bench, case, ranks, &note)?;
    bar.inc(1);
    let fastest = variants.iter().skip(1).map(|variant| variant.first_seconds).fold(f64::INFINITY, f64::min);
    let mut slow = BTreeMap::<_, Vec<_>>::new();
    for variant in variants.iter_mut().filter(|variant| variant.first_seconds > SLOW * fastest) {
        // Something else may have slowed the first repetition down.
        let second = bench.seconds(&variant.schedule)?;
        if second > SLOW * fastest {
            variant.times.push(variant.first_seconds);
            variant.times.push(second);
            slow.entry((variant.adapter, variant.lowering)).or_default().push(variant.rank.to_string());
        }
    }
    if !slow.is_empty() {
        let of = |((adapter, lowering), ranks): (_, Vec<String>)| {
            format!("{adapter} by {lowering} of ranks {}", ranks.join(", "))
        };
        let slow: Vec<_> = slow.into_iter().map(of).collect();
        note(&format!("measured twice only, over {SLOW} times as slow as the fastest adapter: {}", slow.join("; ")));
    }
    // The others, with after how many rounds their turn comes again.
    let mut others = Vec::new();
    for variant in variants.iter_mut().filter(|variant| variant.times.count() == 0) {
        let affordable = (VARIANT_SECONDS / variant.first_seconds) as usize;
        let turns = if affordable < LEAST { LEAST - 1 } else { affordable };
        if affordable < LEAST {
            variant.times.push(variant.first_seconds);
        }
        others.push((rounds.div_ceil(turns), variant));
    }
    for round in 0..rounds {
        for (every, variant) in &mut others {
            if round % *every == 0 {
                variant.times.push(bench.seconds(&variant.schedule)?);
            }
        }
        bar.inc(1);
    }
    Ok(variants)
}

fn record(device: &str, layer: &Layer, variant: &Variant, base_seconds: f64) -> Record {
    let Case { shape, tokens, format } = layer.case;
    let seconds = variant.times.median();
    Record {
        device: device.to_owned(),
        model: layer.model.clone(),
        layer: layer.name.clone(),
        d: shape.d,
        k: shape.k,
        dtype: format.activations.name().to_owned(),
        weight: format.weight.name().to_owned(),
        tokens: tokens.all(),
        segments: tokens.segments,
        rank: variant.rank,
        adapter: variant.adapter.to_owned(),
        lowering: variant.lowering.to_owned(),
        seconds,
        spread: variant.times.spread(),
        repetitions: variant.times.count(),
        base_seconds,
        tokens_per_second: f64::from(tokens.all()) / seconds,
    }
}

/// A table of throughputs for every layer, and one of crossings.
fn human(device: &str, records: &[Record]) -> String {
    let panels = panels(records);
    let mut text = format!("{device}\n");
    for panel in &panels {
        let Coordinates { model, layer, d, k, dtype, weight, tokens, .. } = &panel.coordinates;
        let base = f64::from(*tokens) / panel.base_seconds;
        text += &format!("\n{model} {layer}, d {d}, k {k}, {dtype}, weight {weight}; {}\n", panel.coordinates.batch());
        text += &format!("tokens a second, of the base GEMM {base:.0}\n");
        let curves: Vec<_> = panel.curves.iter().collect();
        let mut columns = vec![">rank".to_owned()];
        columns.extend(curves.iter().map(|(adapter, lowering, _)| format!(">{adapter} {lowering}")));
        let mut table = output::table(&columns.iter().map(String::as_str).collect::<Vec<_>>());
        let ranks: BTreeSet<_> = curves.iter().flat_map(|(_, _, seconds)| seconds.keys()).collect();
        for rank in ranks {
            let rate = |seconds: &f64| format!("{:.0}", f64::from(*tokens) / seconds);
            let cells = curves.iter().map(|(_, _, seconds)| seconds.get(rank).map_or_else(|| "-".to_owned(), rate));
            table.add_row(std::iter::once(rank.to_string()).chain(cells));
        }
        text += &output::lines(&table);
    }
    text += "\nThe rank from which LoRA by bmm is faster than fLoRA\n";
    let columns = ["<model", "<layer", "<weight", "<batch", ">than stacked", ">than the better of stacked and on_chip"];
    let mut table = output::table(&columns);
    for panel in &panels {
        let Coordinates { model, layer, weight, .. } = &panel.coordinates;
        let crossing =
            |choice| panel.curves.crossing(choice).map_or_else(|| "-".to_owned(), |crossing| crossing.to_string());
        table.add_row([
            model.clone(),
            layer.clone(),
            weight.clone(),
            panel.coordinates.batch(),
            crossing(Choice::Stacked),
            crossing(Choice::Best),
        ]);
    }
    text += &output::lines(&table);
    text += "< or >: at every measured rank.\n";
    text
}
