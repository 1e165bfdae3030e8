//! `flora bench planner`: what the planner's choices cost beside the best that could have been chosen.

use std::path::PathBuf;

use clap::Args;
use clap::builder::RangedU64ValueParser;
use flora::prelude::*;
use flora_plan::batch::BatchShape;
use flora_plan::cost::{Kernel, LayerPrices, PricedLayer, work};
use flora_plan::plan::plan;
use flora_plan::schedule::{Schedule, can_hold, schedule};
use flora_runtime::ProjectionError;
use flora_tune::measure::{LayerBench, Sample};
use serde::Serialize;

use super::grid::{Grid, Point};
use crate::commands::error::CommandError;
use crate::commands::{output, planner, types};

/// Run every plan of many batches, and say what the planner's choice costs beside the fastest
///
/// The batches are drawn from a grid: layers of d and k from 128 to 8192, decode and prefill, ranks 1 to 64, 1 to 256 segments,
/// one adapter for all of them to one for each, fLoRA, HiRA, LoRA and mixtures. No batch is one that tuning has timed. Plans take
/// turns, round after round, and the medians count; a plan that takes more than three times as long as another in its first two
/// calls is not called again.
#[derive(Args)]
pub(super) struct Arguments {
    /// The device, as `flora devices` lists it
    #[arg(long, default_value = "host")]
    device: String,
    /// A tuning file to use in place of the device's own
    #[arg(long)]
    coefficients: Option<PathBuf>,
    /// Batches
    #[arg(long, default_value = "240", value_parser = RangedU64ValueParser::<usize>::new().range(1..=100_000))]
    points: usize,
    /// Repetitions that count
    #[arg(long, default_value = "9", value_parser = RangedU64ValueParser::<usize>::new().range(1..=10_000))]
    rounds: usize,
    /// The longest call in milliseconds: batches whose best plan is predicted to take longer are drawn again
    #[arg(long, default_value = "60", value_parser = RangedU64ValueParser::<u32>::new().range(1..=60_000))]
    longest: u32,
    /// The type of activations and adapters
    #[arg(long, default_value = "f32", value_parser = types::element())]
    dtype: Element,
    /// The format of the base weight; that of the activations unless given
    #[arg(long, value_parser = types::weight_format())]
    weight: Option<WeightFormat>,
    /// Which batches are drawn
    #[arg(long, default_value = "1")]
    seed: u64,
    /// Print JSON
    #[arg(long)]
    json: bool,
}

/// What the command answers.
#[derive(Serialize)]
struct Answer {
    device: String,
    format: String,
    seed: u64,
    points: usize,
    /// The share of batches whose chosen plan was the fastest.
    top1: f64,
    /// Seconds of the chosen plan over those of the fastest, less 1; a little below 0 where another plan only seemed faster.
    mean_regret: f64,
    p95_regret: f64,
    max_regret: f64,
    /// |predicted / measured − 1| of the chosen plans.
    median_error: f64,
    worst: Vec<Outcome>,
    results: Vec<Outcome>,
}

/// One batch.
#[derive(Clone, Debug, Serialize)]
struct Outcome {
    #[serde(flatten)]
    point: Point,
    chosen: String,
    fastest: String,
    regret: f64,
    candidates: Vec<Candidate>,
}

#[derive(Clone, Debug, Serialize)]
struct Candidate {
    lowering: String,
    predicted_seconds: f64,
    seconds: f64,
    /// (largest − smallest) / median over the rounds; `None` for a plan that was dropped after its first call.
    spread: Option<f64>,
}

/// Outcomes that are shown by themselves.
const WORST: usize = 10;
/// A plan is called once where it takes so many times as long as another.
const HOPELESS: f64 = 3.0;

pub(super) fn planner(arguments: &Arguments) -> Result<(), CommandError> {
    let device = devices::open(&arguments.device)?;
    let coefficients = match &arguments.coefficients {
        Some(path) => DeviceCoefficients::read(path)?,
        None => planner::for_device(&device)?.0.coefficients().clone(),
    };
    let device = device.tuned(&coefficients.blueprints);
    let uniform = LayerFormat::uniform(arguments.dtype);
    let format = LayerFormat { weight: arguments.weight.unwrap_or(uniform.weight), ..uniform };
    let is_timed = |point: &Point| is_timed(&coefficients, format, point);
    let longest = f64::from(arguments.longest) * 1e-3;
    let too_long = |point: &Point| {
        let prices = LayerPrices::new(&coefficients, PricedLayer { shape: point.shape(), format });
        let batch = point.shape_of_batch();
        let chosen = plan(&prices, &batch, false);
        prices.price(&work(&chosen, prices.layer(), &batch, false, prices.pads_blocks())) > longest
    };
    let fits = |point: &Point| format.weight.fits(point.shape()) && point.fits(device.info().largest_buffer_bytes);
    let points =
        Grid::new(arguments.seed).draw(arguments.points, |point| fits(point) && !is_timed(point) && !too_long(point));

    let bar = output::progress(points.len(), "measuring");
    let mut results = Vec::with_capacity(points.len());
    // Points of one layer follow one another, so that its operands are made once.
    for own in points.chunk_by(|one, other| one.shape() == other.shape()) {
        let layer = PricedLayer { shape: own[0].shape(), format };
        let bench = LayerBench::new(&device, layer, 1)?;
        let prices = LayerPrices::new(&coefficients, layer);
        for point in own {
            results.push(outcome(&bench.with_slots(point.slots() as u32)?, &prices, point, arguments.rounds)?);
            bar.inc(1);
        }
    }
    bar.finish_and_clear();
    let name = format!("{} ({})", device.info().name, device.info().id);
    let answer = summary(name, format.to_string(), arguments.seed, results);
    if arguments.json { output::print_json(&answer) } else { output::print(&human(&answer)) }
}

/// Whether the coefficients come from this very batch.
fn is_timed(coefficients: &DeviceCoefficients, format: LayerFormat, point: &Point) -> bool {
    let (_, own) = coefficients.of_format(format);
    let Some(surface) = own.seconds_per_mac.get(&Kernel::OnChip) else { return false };
    let equal = point.d == point.k && surface.extents.contains(&point.d);
    let rows = point.tokens / point.adapters;
    equal
        && surface.rows.contains(&rows)
        && surface.ranks.contains(&point.rank)
        && surface.adapters.contains(&point.adapters)
}

/// Times every plan of a batch.
fn outcome(
    bench: &LayerBench<'_>,
    prices: &LayerPrices,
    point: &Point,
    rounds: usize,
) -> Result<Outcome, CommandError> {
    let (segments, adapters) = point.batch();
    let batch = BatchShape::of(&segments, &adapters);
    let layer = prices.layer();
    let schedule_of = |plan: &Plan| -> Result<Schedule, CommandError> {
        Ok(schedule(plan, layer.shape, &segments, &adapters, false).map_err(ProjectionError::from)?)
    };
    let chosen = plan(prices, &batch, false);
    // Plans that lay the batch out alike are one.
    let mut timed: Vec<(Plan, Schedule, f64, Sample)> = Vec::new();
    let largest = bench.device().info().largest_buffer_bytes;
    let held = Plan::unmerged().filter(|plan| can_hold(plan, layer.shape, &batch, largest));
    for plan in std::iter::once(chosen).chain(held) {
        let schedule = schedule_of(&plan)?;
        if timed.iter().all(|(_, own, _, _)| *own != schedule) {
            // The lesser of two: a first call may still meet a compiler at work.
            let first = bench.seconds(&schedule)?.min(bench.seconds(&schedule)?);
            timed.push((plan, schedule, first, Sample::default()));
        }
    }
    let least = timed.iter().map(|(_, _, first, _)| *first).fold(f64::INFINITY, f64::min);
    for _ in 0..rounds {
        for (_, schedule, first, sample) in &mut timed {
            if *first <= HOPELESS * least {
                sample.push(bench.seconds(schedule)?);
            }
        }
    }
    let name = |plan: &Plan| point.name_of(plan);
    let candidate = |(plan, _, first, sample): &(Plan, Schedule, f64, Sample)| Candidate {
        lowering: name(plan),
        predicted_seconds: prices.price(&work(plan, layer, &batch, false, prices.pads_blocks())),
        seconds: if sample.is_empty() { *first } else { sample.median() },
        spread: (!sample.is_empty()).then(|| sample.spread()),
    };
    let candidates: Vec<Candidate> = timed.iter().map(candidate).collect();
    let fastest = candidates.iter().min_by(|one, other| one.seconds.total_cmp(&other.seconds));
    let (fastest, seconds) = fastest.map_or((String::new(), f64::NAN), |own| (own.lowering.clone(), own.seconds));
    // The chosen plan was the first. Where it was dropped, its first calls say enough.
    let rounds: Vec<Vec<f64>> = timed.iter().map(|(_, _, _, sample)| sample.iter().collect()).collect();
    let regret = regret(&rounds).unwrap_or(candidates[0].seconds / seconds - 1.0);
    Ok(Outcome { point: point.clone(), chosen: name(&chosen), fastest, regret, candidates })
}

/// What the first plan costs beside the fastest, less 1; `None` where it wasn't run. Of each plan the seconds of every round, none of one
/// that was dropped. The fastest by one half of the rounds is held against in the other half, round by round, and the other way round:
/// the least of several medians is the luckiest of them too, and beside that in its own rounds every choice would cost something.
fn regret(plans: &[Vec<f64>]) -> Option<f64> {
    let chosen = plans.first().filter(|own| own.len() > 1)?;
    let of_half = |half: usize| {
        let by_median = |own: &&Vec<f64>| median(every_other(own, half));
        let ran = plans.iter().filter(|own| own.len() == chosen.len());
        let fastest = ran.min_by(|one, other| by_median(one).total_cmp(&by_median(other))).unwrap_or(chosen);
        let pairs = every_other(chosen, 1 - half).zip(every_other(fastest, 1 - half));
        median(pairs.map(|(chosen, fastest)| chosen / fastest - 1.0))
    };
    Some((of_half(0) + of_half(1)) / 2.0)
}

fn every_other(own: &[f64], first: usize) -> impl Iterator<Item = f64> {
    own.iter().skip(first).step_by(2).copied()
}

fn median(of: impl Iterator<Item = f64>) -> f64 {
    let mut sample = Sample::default();
    of.for_each(|own| sample.push(own));
    sample.median()
}

fn summary(device: String, format: String, seed: u64, results: Vec<Outcome>) -> Answer {
    let mut worst = results.clone();
    worst.sort_by(|one, other| other.regret.total_cmp(&one.regret));
    let count = results.len().max(1);
    let at = |part: f64| worst.get(((count - 1) as f64 * (1.0 - part)).round() as usize).map_or(0.0, |own| own.regret);
    let (p95_regret, max_regret) = (at(0.95), at(1.0));
    let error = |own: &Outcome| (own.candidates[0].predicted_seconds / own.candidates[0].seconds - 1.0).abs();
    let mut errors: Vec<f64> = results.iter().map(error).collect();
    errors.sort_by(f64::total_cmp);
    worst.truncate(WORST);
    Answer {
        device,
        format,
        seed,
        points: results.len(),
        top1: results.iter().filter(|own| own.chosen == own.fastest).count() as f64 / count as f64,
        mean_regret: results.iter().map(|own| own.regret).sum::<f64>() / count as f64,
        p95_regret,
        max_regret,
        median_error: errors.get(errors.len() / 2).copied().unwrap_or(0.0),
        worst,
        results,
    }
}

fn human(answer: &Answer) -> String {
    let percent = |share: f64| format!("{:.1} %", 100.0 * share);
    let mut text = format!("{} batches in {} on {}\n\n", answer.points, answer.format, answer.device);
    text += &format!("the fastest was chosen  {}\n", percent(answer.top1));
    text += &format!("mean regret             {}\n", percent(answer.mean_regret));
    text += &format!("95th percentile         {}\n", percent(answer.p95_regret));
    text += &format!("worst                   {}\n", percent(answer.max_regret));
    text += &format!(
        "prediction off by       {} (median of the chosen plans)\n\nthe worst cases\n\n",
        percent(answer.median_error)
    );
    let columns = [
        ">regret",
        "<adapters",
        ">d",
        ">k",
        ">tokens",
        ">segments",
        ">adapters",
        ">rank",
        "<plans: measured (predicted)",
    ];
    let mut table = output::table(&columns);
    for own in &answer.worst {
        let point = &own.point;
        let time = |candidate: &Candidate| {
            let (measured, predicted) =
                (output::seconds(candidate.seconds), output::seconds(candidate.predicted_seconds));
            let mark = if candidate.lowering == own.chosen { "*" } else { "" };
            format!("{}{mark} {measured} ({predicted})", candidate.lowering)
        };
        table.add_row([
            percent(own.regret),
            point.adapter.to_owned(),
            point.d.to_string(),
            point.k.to_string(),
            point.tokens.to_string(),
            point.segments.to_string(),
            point.adapters.to_string(),
            point.rank.to_string(),
            own.candidates.iter().map(time).collect::<Vec<_>>().join(", "),
        ]);
    }
    text += &output::lines(&table);
    text + "\n*: the planner's choice\n"
}

#[cfg(test)]
mod tests {
    use super::*;

    /// Two equal plans that nothing but noise tells apart cost nothing beside one another, and a slower one what it costs.
    #[test]
    fn regret_is_what_another_plan_would_have_saved() {
        let mut random = fastrand::Rng::with_seed(7);
        let mut noisy = |seconds: f64| -> Vec<f64> { (0..9).map(|_| seconds * (1.0 + 0.2 * random.f64())).collect() };
        let mean = |of: &mut dyn FnMut() -> f64| (0..400).map(|_| of()).sum::<f64>() / 400.0;
        let equal = mean(&mut || regret(&[noisy(1.0), noisy(1.0), noisy(1.0), vec![]]).expect("it ran"));
        assert!(equal.abs() < 0.01, "{equal}");
        let slower = mean(&mut || regret(&[noisy(1.5), noisy(1.0), noisy(1.1)]).expect("it ran"));
        assert!((slower - 0.5).abs() < 0.03, "{slower}");
        assert_eq!(regret(&[vec![2.0; 4], vec![2.0; 4]]), Some(0.0));
        assert_eq!(regret(&[vec![], vec![1.0; 4]]), None);
    }
}
