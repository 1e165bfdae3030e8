//! The paper's serving experiment on this device (§4.1, Fig. 2): throughput and latency against rank, an adapter for every request.

use super::missing;
use crate::commands::bench::serving_answer::{Answer, DecodeStep, Latency, Throughput, Variant};
use crate::commands::plot::Axis;
use crate::commands::plot::{Chart, GREY, Look, Series};
use crate::commands::report::document::{Block, Figure, Key, Section, Table};

const TITLE: &str = "Serving";

/// Adapters as the legend names them, LoRA's baseline apart from its best.
#[derive(Clone, Copy, PartialEq)]
enum Curve {
    Flora,
    LoraByBmm,
    Lora,
}

const CURVES: [(Curve, &str); 3] =
    [(Curve::Flora, "fLoRA"), (Curve::LoraByBmm, "LoRA by bmm"), (Curve::Lora, "LoRA by its best lowering")];

fn curve(variant: &Variant) -> Option<Curve> {
    match (variant.adapter.as_str(), variant.lowering.as_str()) {
        ("flora", _) => Some(Curve::Flora),
        ("lora", "bmm") => Some(Curve::LoraByBmm),
        ("lora", _) => Some(Curve::Lora),
        _ => None,
    }
}

pub(super) fn section(runs: &[Answer]) -> Section {
    let id = "serving";
    if runs.is_empty() {
        let sentence = "The serving experiment wasn't given. This measures it:";
        return missing(
            id,
            TITLE,
            sentence,
            &["flora bench serving --json > serving.json", "flora report --serving serving.json"],
        );
    }
    let words = "Requests with the lengths of real chats, each with an adapter of its own, under continuous batching. The grey line is \
                 the model without adapters. Marks are measured; curves without marks are predicted by the cost model, of \
                 models that weren't run.";
    let mut blocks = vec![Block::Paragraph(words.to_owned())];
    for run in runs {
        let Answer { device, model, weights, dtype, sequences, adapted, .. } = run;
        let adapted = adapted.join(", ");
        blocks.push(Block::Heading(format!(
            "{model} ({weights} weights), {dtype}, {sequences} sequences at once, adapters on {adapted}, on {device}"
        )));
        let keys = CURVES.iter().enumerate().map(|(number, (_, words))| Key::new(Look::of(number), *words));
        let keys = keys.chain([Key::new(Look::line(GREY), "no adapter")]).collect();
        let mut figures = Vec::new();
        figures.extend(throughput(&run.throughput));
        figures.extend(latency(&run.latency));
        figures.extend(predicted(&run.steps));
        blocks.push(Block::Figures { keys, figures });
        if run.steps.iter().any(|step| step.seconds.is_some()) {
            let words = "What the cost model says of a decoding step of the model that was run, held against its measurement. \
                         Attention, norms and logits are taken from the measured step without adapters.";
            blocks.push(Block::Paragraph(words.to_owned()));
            blocks.push(Block::Table(steps(&run.steps)));
        }
    }
    Section { id, title: TITLE, blocks }
}

/// A chart of `value` against rank; none where there is nothing to draw.
fn against_rank<'a, T: 'a>(
    title: String,
    label: &'static str,
    records: &'a [T],
    look: fn(Look) -> Look,
    value: impl Fn(&'a T) -> (&'a Variant, f64),
    caption: impl Fn(&[[f64; 2]], Option<f64>) -> String,
) -> Option<Figure> {
    let values: Vec<_> = records.iter().map(value).collect();
    let ranks = values.iter().map(|(variant, _)| f64::from(variant.rank)).filter(|rank| *rank > 0.0);
    let x = Axis::at("rank", ranks);
    let bases: Vec<_> = values.iter().filter(|(variant, _)| variant.rank == 0).map(|(_, value)| *value).collect();
    let base = (!bases.is_empty()).then(|| bases.iter().sum::<f64>() / bases.len() as f64);
    let mut series = Vec::new();
    if let Some(base) = base {
        series.push(Series {
            look: Look::line(GREY),
            points: vec![[x.low(), base], [x.high(), base]],
            bars: Vec::new(),
        });
    }
    let mut first = Vec::new();
    for (number, (own, _)) in CURVES.iter().enumerate() {
        let points = values.iter().filter(|(variant, _)| curve(variant) == Some(*own));
        let points: Vec<_> = points.map(|(variant, value)| [f64::from(variant.rank), *value]).collect();
        if number == 0 {
            first.clone_from(&points);
        }
        series.push(Series { look: look(Look::of(number)), points, bars: Vec::new() });
    }
    if series.iter().all(|series| series.points.is_empty()) || values.iter().all(|(variant, _)| variant.rank == 0) {
        return None;
    }
    let y = Axis::over(label, series.iter().flat_map(|series| &series.points).map(|[_, y]| *y));
    Some(Figure { title, svg: Chart { x, y, series, verticals: Vec::new() }.svg(), caption: caption(&first, base) })
}

fn throughput(records: &[Throughput]) -> Option<Figure> {
    let requests = records.first().map_or(0, |first| first.requests);
    let title = format!("Throughput, {requests} requests at once");
    against_rank(
        title,
        "tokens per second",
        records,
        |look| look,
        |one| (&one.variant, one.tokens_per_second),
        |flora, base| {
            let shares = flora.iter().filter_map(|[rank, value]| Some(format!("{:.2} at rank {rank}", value / base?)));
            format!("fLoRA's share of the throughput without adapters: {}.", shares.collect::<Vec<_>>().join(", "))
        },
    )
}

fn latency(records: &[Latency]) -> Vec<Figure> {
    let rate = records.first().map_or(0.0, |first| first.rate);
    let figures = [
        against_rank(
            format!("Time to first token, {rate} requests a second"),
            "seconds, 95th percentile",
            records,
            |look| look,
            |one| (&one.variant, one.time_to_first_token.p95),
            |_, _| "From a request's arrival to its first token.".to_owned(),
        ),
        against_rank(
            format!("Time per output token, {rate} requests a second"),
            "seconds, median",
            records,
            |look| look,
            |one| (&one.variant, one.time_per_output_token.p50),
            |_, _| "Of each token after the first.".to_owned(),
        ),
    ];
    figures.into_iter().flatten().collect()
}

/// Models that were only predicted, a figure each.
fn predicted(steps: &[DecodeStep]) -> Vec<Figure> {
    let mut models: Vec<&str> = Vec::new();
    for step in steps.iter().filter(|step| step.seconds.is_none()) {
        if !models.contains(&step.model.as_str()) {
            models.push(&step.model);
        }
    }
    let figure = |model: &str| {
        let own: Vec<_> = steps.iter().filter(|step| step.model == model && step.seconds.is_none()).cloned().collect();
        against_rank(
            format!("{model}, decoding, predicted"),
            "tokens per second",
            &own,
            Look::unmarked,
            |one| (&one.variant, f64::from(one.sequences) / one.predicted_seconds),
            |_, _| "Predicted from the projections alone; not measured.".to_owned(),
        )
    };
    models.into_iter().filter_map(figure).collect()
}

fn steps(steps: &[DecodeStep]) -> Table {
    let mut table = Table::new(&["<adapter", "<lowering", ">rank", ">measured, ms", ">predicted, ms", ">off by"]);
    for step in steps {
        let Some(measured) = step.seconds else { continue };
        let Variant { adapter, lowering, rank } = &step.variant;
        table.rows.push(vec![
            adapter.clone(),
            lowering.clone(),
            if *rank == 0 { "-".to_owned() } else { rank.to_string() },
            format!("{:.1}", measured * 1e3),
            format!("{:.1}", step.predicted_seconds * 1e3),
            format!("{:+.1} %", (step.predicted_seconds / measured - 1.0) * 100.0),
        ]);
    }
    table
}
