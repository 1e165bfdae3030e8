//! `flora plan`: what the cost model says of a model's projections, without running them.

use std::path::{Path, PathBuf};

use clap::Args;
use clap::builder::RangedU64ValueParser;
use flora::checkpoint::Model;
use flora::codegen::batch::{BatchShape, Segment};
use flora::codegen::cost::{Kernel, eq7};
use flora::codegen::lowering::Part;
use flora::codegen::plan::{Candidate, candidates};
use flora::prelude::*;
use serde::Serialize;

use super::error::CommandError;
use super::{layer, output, planner};
use crate::models::{self, ProjectionShape, is_target, name_in_layer};

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
    /// Rows of a segment
    #[arg(long, default_value = "1", value_parser = RangedU64ValueParser::<u32>::new().range(1..=MAX_ROWS))]
    tokens: u32,
    /// Projections to adapt, by the end of their path, or `all`; the query and key projections unless given, as in the paper
    #[arg(long, value_delimiter = ',')]
    targets: Vec<String>,
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

/// What is adapted unless --targets says otherwise: query and key, by StarCoder's and by Llama's names.
const QUERY_AND_KEY: [&str; 4] = ["attn.q", "attn.k", "q_proj", "k_proj"];

/// The adapters that are compared, and the part of them that is lowered.
const ADAPTERS: [(&str, Part); 2] = [("flora", Part::Multiplicative), ("lora", Part::Additive)];

/// One line: an adapter of one rank on projections of one shape.
#[derive(Serialize)]
struct Row {
    adapter: &'static str,
    layer: String,
    count: usize,
    d: u32,
    k: u32,
    rank: u32,
    eq7: f64,
    critical_rank: Option<f64>,
    chosen: Lowering,
    why: String,
    candidates: Vec<Candidate>,
}

/// Projections of one shape.
struct Group {
    names: Vec<String>,
    count: usize,
    shape: LayerShape,
}

pub(crate) fn plan(arguments: &Arguments) -> Result<(), CommandError> {
    let rows = u64::from(arguments.segments) * u64::from(arguments.tokens);
    if rows > MAX_ROWS {
        return Err(CommandError::TooMany { what: "the rows of the batch", found: rows, limit: MAX_ROWS });
    }
    let groups = groups(&arguments.model, &arguments.targets)?;
    let coefficients = match &arguments.coefficients {
        Some(path) => Coefficients::read(path)?,
        None => planner::for_device(&Device::open(&arguments.device)?)?.0.coefficients().clone(),
    };
    let mut plans = Vec::new();
    for (adapter, part) in ADAPTERS {
        let compiled = layer::open(adapter)?.compiled;
        for group in &groups {
            let rows = arguments.ranks.iter().map(|rank| {
                row(adapter, part, &compiled, group, *rank, arguments.segments, arguments.tokens, &coefficients)
            });
            plans.extend(rows);
        }
    }
    if arguments.json { output::print_json(&plans) } else { output::print(&human(arguments, &coefficients, &plans)) }
}

/// The chosen projections of a model, those of one shape together.
fn groups(model: &str, targets: &[String]) -> Result<Vec<Group>, CommandError> {
    let shapes: Vec<ProjectionShape> = match models::builtin(model) {
        Some(shapes) => std::iter::repeat_n(shapes.projections, shapes.layers).flatten().collect(),
        None if Path::new(model).exists() => {
            let model = Model::open(Path::new(model))?;
            let shape = |projection: &flora::checkpoint::Projection| {
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

#[expect(clippy::too_many_arguments, reason = "the coordinates of one line of the table")]
fn row(
    adapter: &'static str,
    part: Part,
    compiled: &CompiledLayer,
    group: &Group,
    rank: u32,
    segments: u32,
    tokens: u32,
    coefficients: &Coefficients,
) -> Row {
    let slots = (0..segments).map(|_| compiled.slots(rank, 0)).collect::<Vec<_>>();
    let segments = (0..segments).map(|adapter| Segment { rows: tokens, adapter }).collect::<Vec<_>>();
    let batch = BatchShape::of(&segments, &slots);
    let shape = group.shape;
    let c1 = coefficients.seconds_per_mac(Kernel::LowRankBmm, u64::from(tokens));
    let c2 = coefficients.seconds_per_mac(Kernel::Matmul, batch.tokens);
    let eq7 = eq7(shape, u64::from(rank), c1, c2);
    let candidates = candidates(part, shape, &batch, coefficients);
    // Whether a weight is worth merging is no question of one batch; its price is there to be compared with.
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
        d: shape.d,
        k: shape.k,
        rank,
        eq7: eq7.left,
        critical_rank: eq7.critical_rank,
        chosen,
        why,
        candidates,
    }
}

fn human(arguments: &Arguments, coefficients: &Coefficients, plans: &[Row]) -> String {
    let Arguments { model, segments, tokens, .. } = arguments;
    let mut text = format!("{model}, {segments} segments of {tokens} rows, on {}\n\n", coefficients.device);
    let columns = [
        "<adapter",
        "<layer",
        ">count",
        ">d",
        ">k",
        ">rank",
        ">Eq. 7",
        ">critical rank",
        "<chosen",
        "<predicted, each",
    ];
    let mut table = output::table(&columns);
    for row in plans {
        let predicted =
            |candidate: &Candidate| format!("{} {}", candidate.lowering, output::seconds(candidate.predicted_seconds));
        table.add_row([
            row.adapter.to_owned(),
            row.layer.clone(),
            row.count.to_string(),
            row.d.to_string(),
            row.k.to_string(),
            row.rank.to_string(),
            format!("{:.3}", row.eq7),
            row.critical_rank.map_or_else(|| "none".to_owned(), |rank| format!("{rank:.2}")),
            row.chosen.to_string(),
            row.candidates.iter().map(predicted).collect::<Vec<_>>().join(", "),
        ]);
    }
    text += &output::lines(&table);
    if plans.iter().any(|row| row.candidates.iter().any(|candidate| candidate.lowering == Lowering::Merged)) {
        text += "\nmerged is never chosen for a batch: it needs W_i made and kept, for an adapter that has every batch to itself.";
    }
    text += "\nEq. 7 at 1 or more: fLoRA by stacked is cheaper than LoRA by bmm. Below the critical rank that holds.\n";
    text
}
