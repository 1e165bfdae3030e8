//! `flora bench tuning`: tunes twice, and says whether the coefficients agree within the spread that each run states.

use clap::Args;
use flora::prelude::*;
use flora_plan::cost::Kernel;
use serde::Serialize;

use crate::commands::error::CommandError;
use crate::commands::tune::HowMuch;
use crate::commands::{output, types};

/// Tune twice and compare the coefficients
///
/// Two coefficients agree when they differ by no more than both spreads together: |a − b| ≤ spread(a)·a + spread(b)·b, where a
/// spread is how far a run says that another's coefficient is likely to lie from its own. Nothing is saved.
#[derive(Args)]
pub(super) struct Arguments {
    /// The device, as `flora devices` lists it
    #[arg(long, default_value = "host")]
    device: String,
    /// How much to measure
    #[arg(long, value_enum, default_value = "quick")]
    effort: HowMuch,
    /// The type of activations and adapters
    #[arg(long, default_value = "f32", value_parser = types::element())]
    dtype: Element,
    /// Print JSON
    #[arg(long)]
    json: bool,
}

#[derive(Serialize)]
struct Answer {
    device: String,
    format: String,
    /// Of all coefficients, the share that agrees.
    agreeing: f64,
    kernels: Vec<Row>,
}

/// One kernel's coefficients.
#[derive(Serialize)]
struct Row {
    kernel: &'static str,
    coefficients: usize,
    agreeing: usize,
    median_spread: f64,
    /// |a − b| / mean, the median.
    median_difference: f64,
    p95_difference: f64,
}

pub(super) fn tuning(arguments: &Arguments) -> Result<(), CommandError> {
    let device = devices::open(&arguments.device)?;
    let format = LayerFormat::uniform(arguments.dtype);
    let bar = output::progress(0, "measuring");
    let run = |position: u64| {
        flora_tune::tune::tune(&device, &[format], &arguments.effort.effort(), |done, total| {
            bar.set_length(2 * total);
            bar.set_position(position * total + done);
        })
    };
    let (one, other) = (run(0)?.coefficients, run(1)?.coefficients);
    bar.finish_and_clear();

    let (_, one) = one.of_format(format);
    let (_, other) = other.of_format(format);
    let mut kernels = Vec::new();
    for (name, kernel) in Kernel::TIMED {
        let (Some(one), Some(other)) = (one.seconds_per_mac.get(&kernel), other.seconds_per_mac.get(&kernel)) else {
            continue;
        };
        let (mut agreeing, mut spreads, mut differences) = (0, Vec::new(), Vec::new());
        for place in one.places() {
            let at = one.index(place);
            if !(one.measured[at] && other.measured[at]) {
                continue;
            }
            let (a, b) = (one.seconds_per_mac[at], other.seconds_per_mac[at]);
            agreeing += usize::from((a - b).abs() <= one.spread[at] * a + other.spread[at] * b);
            spreads.push(one.spread[at]);
            differences.push(2.0 * (a - b).abs() / (a + b));
        }
        kernels.push(Row {
            kernel: name,
            coefficients: differences.len(),
            agreeing,
            median_spread: quantile(&mut spreads, 0.5),
            median_difference: quantile(&mut differences, 0.5),
            p95_difference: quantile(&mut differences, 0.95),
        });
    }
    let all: usize = kernels.iter().map(|row| row.coefficients).sum();
    let agreeing = kernels.iter().map(|row| row.agreeing).sum::<usize>() as f64 / all.max(1) as f64;
    let name = format!("{} ({})", device.info().name, device.info().id);
    let answer = Answer { device: name, format: format.to_string(), agreeing, kernels };
    if arguments.json { output::print_json(&answer) } else { output::print(&human(&answer)) }
}

fn quantile(values: &mut [f64], part: f64) -> f64 {
    values.sort_by(f64::total_cmp);
    values.get(((values.len().max(1) - 1) as f64 * part).round() as usize).copied().unwrap_or(0.0)
}

fn human(answer: &Answer) -> String {
    let percent = |share: f64| format!("{:.1} %", 100.0 * share);
    let mut text = format!("{} on {}: two runs\n\n", answer.format, answer.device);
    let columns = ["<kernel", ">coefficients", ">agree", ">median spread", ">median difference", ">95th percentile"];
    let mut table = output::table(&columns);
    for row in &answer.kernels {
        table.add_row([
            row.kernel.to_owned(),
            row.coefficients.to_string(),
            row.agreeing.to_string(),
            percent(row.median_spread),
            percent(row.median_difference),
            percent(row.p95_difference),
        ]);
    }
    text += &output::lines(&table);
    text + &format!("\n{} of the coefficients agree within the spreads of the two runs\n", percent(answer.agreeing))
}
