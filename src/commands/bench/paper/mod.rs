//! `flora bench paper`: the paper's throughput against rank (§4.1, Fig. 2), layer by layer, on this device.

mod analysis;

use std::collections::{BTreeMap, BTreeSet};

use clap::Args;
use clap::builder::{PossibleValuesParser, RangedU64ValueParser};
use flora::prelude::*;
use flora::runtime::device::BackendKind;

pub(crate) use super::case::{BASE, plan};
use super::case::{Case, Tokens, Variant, Wanted, variants};
use super::layers::tokens;
use super::report::Times;
use super::timed::{Clock, Residence};
use crate::commands::error::CommandError;
use crate::commands::{output, types};
use crate::models::{self, QUERY_AND_KEY, is_target};
pub(crate) use analysis::{Choice, Coordinates, Crossing, Curves, Record, panels};

/// Redo the paper's analysis: throughput of fLoRA and of LoRA against rank, and where they cross
///
/// Every adapter of a layer has its turn, round after round; the median counts. Each call takes the next of so many layers that
/// no cache holds their base weights, as a model does. A way to compute an adapter that takes long has fewer turns, and one that
/// takes over 8 times as long as the fastest is measured twice.
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
const VARIANTS: [(&str, Lowering); 4] =
    [("flora", Lowering::Stacked), ("flora", Lowering::OnChip), ("lora", Lowering::Bmm), ("lora", Lowering::Fused)];
/// How many times as long as the fastest adapter a variant may take to be measured more than twice.
const SLOW: f64 = 8.0;
/// All repetitions of a variant take no longer, unless they are [`LEAST`].
const VARIANT_SECONDS: f64 = 1.0;
/// Repetitions of a variant that takes long.
const LEAST: usize = 3;
/// A host's call of this length is a repetition by itself.
const LONG_CALL: f64 = 0.1;

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
    let device = Device::open(&arguments.device)?;
    let long_call = if device.info().backend == BackendKind::Host { LONG_CALL } else { f64::INFINITY };
    let clock = Clock { long_call, ..Clock::new(&device, None) };
    let mut ranks = arguments.ranks.clone();
    ranks.sort_unstable();
    ranks.dedup();
    let variants = VARIANTS.iter().map(|(adapter, lowering)| ((*adapter).to_owned(), *lowering)).collect();
    let wanted = Wanted { ranks, variants, split: false, residence: Residence::Cold };
    let name = format!("{} ({})", device.info().name, device.info().id);

    let layers = arguments.layers();
    let bar = output::progress(layers.len() * (arguments.rounds + 1), "measuring");
    let mut records = Vec::new();
    for layer in &layers {
        let note = |text: &str| bar.suspend(|| output::note(&format!("note: {}: {text}", title(layer))));
        let measured = measure(clock, layer.case, &wanted, arguments.rounds, note, &bar)?;
        let base = measured.first().map_or(f64::NAN, |(_, times)| times.median());
        records.extend(measured.iter().map(|(variant, times)| record(&name, layer, variant, times, base)));
    }
    bar.finish_and_clear();
    if arguments.json { output::print_json(&records) } else { output::print(&human(&name, &records)) }
}

fn title(Layer { model, name, case }: &Layer) -> String {
    let Case { tokens: Tokens { segments, rows }, format, .. } = case;
    format!("{model} {name}, {segments}x{rows} tokens, weight {}", format.weight)
}

/// Every variant in turn, the base GEMM first; slow ones every few rounds, very slow ones not at all after two repetitions.
fn measure(
    clock: Clock,
    case: Case,
    wanted: &Wanted,
    rounds: usize,
    note: impl Fn(&str),
    bar: &indicatif::ProgressBar,
) -> Result<Vec<(Variant, Times)>, CommandError> {
    let mut left_out = Vec::new();
    let variants = variants(clock, case, wanted, &mut left_out)?;
    left_out.iter().for_each(|variant| note(&format!("left out: {variant}")));
    bar.inc(1);
    let mut measured: Vec<_> = variants.into_iter().map(|variant| (variant, Times::default())).collect();
    let mut slow = BTreeMap::<_, Vec<_>>::new();
    let fastest = measured.iter().skip(1).map(|(variant, _)| variant.first_seconds).fold(f64::INFINITY, f64::min);
    for (variant, times) in measured.iter_mut().filter(|(variant, _)| variant.first_seconds > SLOW * fastest) {
        // Something else may have slowed the first repetition down.
        let second = variant.seconds(clock)?;
        if second > SLOW * fastest {
            times.push(variant.first_seconds);
            times.push(second);
            slow.entry((variant.adapter, variant.lowering.clone())).or_default().push(variant.rank.to_string());
        }
    }
    if !slow.is_empty() {
        let of = |((adapter, lowering), ranks): (_, Vec<String>)| {
            format!("{adapter} by {lowering} of ranks {}", ranks.join(", "))
        };
        let slow: Vec<_> = slow.into_iter().map(of).collect();
        note(&format!("measured twice only, over {SLOW} times as slow as the fastest adapter: {}", slow.join("; ")));
    }
    let mut others: Vec<_> = measured.iter_mut().filter(|(_, times)| times.count() == 0).collect();
    for round in 0..rounds {
        for (variant, times) in &mut others {
            let affordable = (VARIANT_SECONDS / variant.first_seconds) as usize;
            if round % rounds.div_ceil(affordable.max(LEAST)) == 0 {
                times.push(variant.seconds(clock)?);
            }
        }
        bar.inc(1);
    }
    Ok(measured)
}

fn record(device: &str, layer: &Layer, variant: &Variant, times: &Times, base_seconds: f64) -> Record {
    let Case { shape, format, .. } = layer.case;
    let seconds = times.median();
    Record {
        device: device.to_owned(),
        model: layer.model.clone(),
        layer: layer.name.clone(),
        d: shape.d,
        k: shape.k,
        dtype: format.activations.name().to_owned(),
        weight: format.weight.name().to_owned(),
        tokens: variant.tokens,
        segments: variant.segments,
        rank: variant.rank,
        adapter: variant.adapter.to_owned(),
        lowering: variant.lowering.clone(),
        seconds,
        spread: times.spread(),
        repetitions: times.count(),
        base_seconds,
        tokens_per_second: f64::from(variant.tokens) / seconds,
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
