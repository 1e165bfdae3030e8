//! `flora plan --training`: what a step of training takes in a model's projections, kind by kind, and from how many rows on tiles of
//! xᵀg ∘ w0 are the cheaper way to the gradients of scales.

use flora::prelude::*;
use flora_plan::batch::{AdapterSlots, BatchShape, Segment};
use flora_plan::cost::{
    GradientKernel, GradientTerm, LayerPrices, OuterIsCheaper, PricedLayer, Regime, Work, gradient_work,
    outer_is_cheaper, work,
};
use flora_plan::gradient::GradientLowering;
use flora_plan::schedule::backward_schedule;
use serde::Serialize;

use super::{Arguments, Group};
use crate::commands::error::CommandError;
use crate::commands::{layer, output};

/// The kinds that are compared: LoRA first, because the others are held against it.
const KINDS: [&str; 5] = ["lora", "dora", "hira", "flora", "ia3"];

/// What the command answers.
#[derive(Serialize)]
pub(super) struct Answer {
    device: String,
    /// Of the layers that are planned.
    format: String,
    /// The format whose coefficients are used; another where this one wasn't measured.
    measured_for: String,
    layers: Vec<Row>,
    steps: Vec<Step>,
}

/// A part of a step: one pass over one projection.
#[derive(Clone, Copy, Debug, Serialize)]
struct Cost {
    macs: u64,
    bytes: u64,
    /// `None` where its coefficients weren't measured.
    seconds: Option<f64>,
}

/// An adapter of one kind and rank on projections of one shape.
#[derive(Serialize)]
struct Row {
    kind: &'static str,
    layer: String,
    count: usize,
    d: u32,
    k: u32,
    tokens: u32,
    segments: u32,
    /// `None` for a kind without ranks.
    rank: Option<u32>,
    forward: Cost,
    /// The gradient of the input.
    input: Cost,
    /// Those of the adapters' vectors.
    vectors: Cost,
    scales: Option<Scales>,
}

/// How the gradients of an adapter's scales are computed.
#[derive(Serialize)]
struct Scales {
    /// How many an adapter has.
    count: u64,
    /// By multiply-adds, which is what training goes by.
    lowering: &'static str,
    /// By the coefficients.
    priced: &'static str,
    /// Eq. 7's counterpart at these rows, where the coefficients were measured.
    outer: Option<OuterIsCheaper>,
}

/// All chosen projections of the model together, forward and backward.
#[derive(Serialize)]
struct Step {
    kind: &'static str,
    tokens: u32,
    segments: u32,
    rank: Option<u32>,
    macs: u64,
    seconds: Option<f64>,
    /// Of a step of rows without an adapter, whose input's gradient is wanted.
    of_base: Option<f64>,
    /// Of LoRA's at the same rank; at the first rank for a kind without any.
    of_lora: Option<f64>,
}

impl Cost {
    fn of(prices: &LayerPrices, work: &Work) -> Self {
        Self { macs: work.macs(), bytes: work.bytes(), seconds: Some(prices.price(work)) }
    }

    fn of_vectors(prices: &LayerPrices, terms: &[GradientTerm]) -> Self {
        let sum = |of: fn(&GradientTerm) -> u64| terms.iter().map(of).fold(0, u64::saturating_add);
        // No work takes no time, whatever was measured.
        let seconds = if terms.is_empty() { Some(0.0) } else { prices.price_gradients(terms) };
        Self { macs: sum(|term| term.macs), bytes: sum(|term| term.bytes), seconds }
    }
}

/// A batch of equal segments, each with an adapter of its own.
#[derive(Clone, Copy)]
struct Batch {
    segments: u32,
    tokens: u32,
}

pub(super) fn answer(
    arguments: &Arguments,
    groups: &[Group],
    coefficients: &DeviceCoefficients,
    format: LayerFormat,
) -> Result<Answer, CommandError> {
    let (mut layers, mut steps) = (Vec::new(), Vec::new());
    for tokens in &arguments.tokens {
        let batch = Batch { segments: arguments.segments, tokens: *tokens };
        let base = groups.iter().map(|group| base_seconds(coefficients, group, format, batch)).sum::<f64>();
        let first = steps.len();
        for kind in KINDS {
            let compiled = layer::open(kind)?.compiled;
            let has_ranks = compiled.slots(1, 0) != compiled.slots(2, 0);
            let ranks = if has_ranks { &arguments.ranks[..] } else { &arguments.ranks[..1] };
            for rank in ranks {
                let rows = groups.iter().map(|group| {
                    let row = row(coefficients, &compiled, group, format, batch, *rank)?;
                    Ok(Row { kind, rank: has_ranks.then_some(*rank), ..row })
                });
                let rows = rows.collect::<Result<Vec<_>, CommandError>>()?;
                let seconds = rows.iter().map(Row::seconds).sum::<Option<f64>>();
                let lora = steps[first..].iter().find(|step: &&Step| step.kind == "lora" && step.rank == Some(*rank));
                let lora = if kind == "lora" { seconds } else { lora.and_then(|step| step.seconds) };
                steps.push(Step {
                    kind,
                    tokens: *tokens,
                    segments: batch.segments,
                    rank: has_ranks.then_some(*rank),
                    macs: rows.iter().map(Row::macs).fold(0, u64::saturating_add),
                    seconds,
                    of_base: seconds.map(|seconds| seconds / base),
                    of_lora: seconds.zip(lora).map(|(own, lora)| own / lora),
                });
                layers.extend(rows);
            }
        }
    }
    let (measured_for, _) = coefficients.of_format(format);
    let (device, measured_for) = (coefficients.device.clone(), measured_for.to_owned());
    Ok(Answer { device, format: format.to_string(), measured_for, layers, steps })
}

impl Row {
    fn parts(&self) -> [Cost; 3] {
        [self.forward, self.input, self.vectors]
    }

    /// Of all projections of the shape.
    fn seconds(&self) -> Option<f64> {
        let each = self.parts().iter().map(|part| part.seconds).sum::<Option<f64>>();
        each.map(|each| self.count as f64 * each)
    }

    fn macs(&self) -> u64 {
        let each = self.parts().iter().map(|part| part.macs).fold(0, u64::saturating_add);
        each.saturating_mul(self.count as u64)
    }
}

/// A step of rows without an adapter.
fn base_seconds(coefficients: &DeviceCoefficients, group: &Group, format: LayerFormat, batch: Batch) -> f64 {
    let rows = batch.segments * batch.tokens;
    let shape = BatchShape::of(&[Segment { rows, adapter: 0 }], &[AdapterSlots::base()]);
    let pass = |shape_of_layer| {
        let layer = PricedLayer { shape: shape_of_layer, format };
        let prices = LayerPrices::new(coefficients, layer);
        prices.price(&work(&Plan::fixed(), layer, &shape, false, prices.pads_blocks()))
    };
    group.count as f64 * (pass(group.shape) + pass(group.shape.transposed()))
}

fn row(
    coefficients: &DeviceCoefficients,
    compiled: &CompiledLayer,
    group: &Group,
    format: LayerFormat,
    batch: Batch,
    rank: u32,
) -> Result<Row, CommandError> {
    let Batch { segments, tokens } = batch;
    let slots = (0..segments).map(|_| compiled.slots(rank, 0)).collect::<Vec<_>>();
    let adjoint = slots.iter().map(AdapterSlots::adjoint).collect::<Vec<_>>();
    let rows = (0..segments).map(|adapter| Segment { rows: tokens, adapter }).collect::<Vec<_>>();
    let layer = PricedLayer { shape: group.shape, format };
    let transposed = PricedLayer { shape: group.shape.transposed(), format };
    let (prices, back) = (LayerPrices::new(coefficients, layer), LayerPrices::new(coefficients, transposed));
    let pads = prices.pads_blocks();
    let schedule = backward_schedule(&Plan::fixed_adjoint(), group.shape, &rows, &slots)?;
    // Every adapter is like the first.
    let scales = schedule.adapters().first().filter(|own| own.scales() > 0).map(|own| {
        let (_, measured) = coefficients.of_format(format);
        let regime = Regime { rows: f64::from(tokens), rank: own.scales() as f64, adapters: 1.0 };
        let seconds_per_mac = |lowering| {
            let surface = measured.gradients.get(&GradientKernel::of(lowering))?;
            Some(surface.at(layer.extent(), regime))
        };
        let both = seconds_per_mac(GradientLowering::Reduced).zip(seconds_per_mac(GradientLowering::Outer));
        Scales {
            count: own.scales(),
            lowering: own.lowering.row().name,
            priced: prices.gradient_lowering(own.rows(), own.scales()).row().name,
            outer: both.map(|(reduced, outer)| outer_is_cheaper(own.rows(), own.scales(), reduced, outer)),
        }
    });
    Ok(Row {
        kind: "",
        layer: group.names.join(", "),
        count: group.count,
        d: group.shape.d,
        k: group.shape.k,
        tokens,
        segments,
        rank: None,
        forward: Cost::of(&prices, &work(&Plan::fixed(), layer, &BatchShape::of(&rows, &slots), false, pads)),
        input: Cost::of(
            &back,
            &work(&Plan::fixed_adjoint(), transposed, &BatchShape::of(&rows, &adjoint), false, pads),
        ),
        vectors: Cost::of_vectors(&prices, &gradient_work(layer, schedule.adapters())),
        scales,
    })
}

pub(super) fn human(arguments: &Arguments, answer: &Answer) -> String {
    let Arguments { model, segments, .. } = arguments;
    let Answer { device, format, measured_for, layers, steps } = answer;
    let mut text = format!("{model} in {format}, a step of {segments} jobs, on {device}\n");
    if measured_for != format {
        text += &format!("by the coefficients of {measured_for}: {format} wasn't measured\n");
    }
    for tokens in &arguments.tokens {
        text += &format!("\n{tokens} rows a job: each projection\n\n");
        let columns = [
            "<kind",
            "<layer",
            ">count",
            ">d",
            ">k",
            ">rank",
            ">forward",
            ">GMAC",
            ">MiB",
            ">dx",
            ">GMAC",
            ">MiB",
            ">vectors",
            ">GMAC",
            ">MiB",
            "<scales by",
            "<cheaper",
            ">outer from",
        ];
        let mut table = output::table(&columns);
        for row in layers.iter().filter(|row| row.tokens == *tokens) {
            let costs = row.parts().into_iter().flat_map(cells);
            let scales = match &row.scales {
                None => ["-"; 3].map(str::to_owned).to_vec(),
                Some(Scales { lowering, priced, outer, .. }) => {
                    let from = match outer {
                        None => "not measured".to_owned(),
                        Some(OuterIsCheaper { critical_rows: None, .. }) => "never".to_owned(),
                        Some(OuterIsCheaper { critical_rows: Some(rows), .. }) => format!("{rows:.1} rows"),
                    };
                    vec![(*lowering).to_owned(), (*priced).to_owned(), from]
                }
            };
            let names = [row.kind.to_owned(), row.layer.clone(), row.count.to_string()];
            let extents = [row.d.to_string(), row.k.to_string(), rank(row.rank)];
            table.add_row(names.into_iter().chain(extents).chain(costs).chain(scales));
        }
        text += &output::lines(&table);
        text += &format!("\n{tokens} rows a job: all of these projections\n\n");
        let mut table = output::table(&["<kind", ">rank", ">GMAC", ">a step", ">of the base", ">of lora"]);
        let times = |share: Option<f64>| share.map_or_else(|| "-".to_owned(), |share| format!("{share:.2}"));
        for step in steps.iter().filter(|step| step.tokens == *tokens) {
            table.add_row([
                step.kind.to_owned(),
                rank(step.rank),
                giga(step.macs),
                seconds(step.seconds),
                times(step.of_base),
                times(step.of_lora),
            ]);
        }
        text += &output::lines(&table);
    }
    text += "\nA step is the forward pass, dx and the gradients of the adapters' vectors. Attention, activations and the output matrix \
             are the same for every kind and not in it.\nouter from: n scales of an adapter with t rows take n·t·cr by reduced and \
             (t + 1 + n)·co by outer for each number of w0, so outer is the cheaper from (1 + n)·co / (n·cr − co) rows on, by the \
             coefficients at the rows of the table. Training goes by multiply-adds, cr = co, so that no measurement changes its bits.\n";
    text
}

fn rank(rank: Option<u32>) -> String {
    rank.map_or_else(|| "-".to_owned(), |rank| rank.to_string())
}

fn seconds(seconds: Option<f64>) -> String {
    seconds.map_or_else(|| "not measured".to_owned(), output::seconds)
}

fn giga(macs: u64) -> String {
    format!("{:.3}", macs as f64 * 1e-9)
}

fn cells(cost: Cost) -> [String; 3] {
    [seconds(cost.seconds), giga(cost.macs), format!("{:.1}", cost.bytes as f64 / f64::from(1 << 20))]
}
