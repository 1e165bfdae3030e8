//! `flora tune`: measures the cost model's coefficients on a device and keeps them.

use std::path::PathBuf;

use clap::{Args, ValueEnum};
use flora::prelude::*;
use flora_plan::cost::{Coefficients, Kernel, Regime};
use flora_plan::lowering::Part;
use flora_tune::tune::{Effort, HeldOut, Tuning};
use serde::Serialize;

use super::error::CommandError;
use super::{output, planner, types};

/// Measure the cost model's coefficients on a device and save them
///
/// What was saved for other formats stays. A file that is damaged, another device's or another version's is replaced.
#[derive(Args)]
pub(crate) struct Arguments {
    /// The device, as `flora devices` lists it
    #[arg(long, default_value = "auto")]
    device: String,
    /// Types of activations and adapters, separated by commas
    #[arg(long, value_delimiter = ',', default_value = "f32", value_parser = types::element())]
    dtype: Vec<Element>,
    /// Formats of the base weight, separated by commas; that of the activations unless given
    #[arg(long, value_delimiter = ',', value_parser = types::weight_format())]
    weight: Vec<WeightFormat>,
    /// Measure for under a minute; the same as `--effort quick`
    #[arg(long, conflicts_with = "effort")]
    quick: bool,
    /// How much to measure
    #[arg(long, value_enum, default_value = "full")]
    effort: HowMuch,
    /// Print JSON
    #[arg(long)]
    json: bool,
}

#[derive(Clone, Copy, Debug, PartialEq, Eq, ValueEnum)]
pub(crate) enum HowMuch {
    /// Up to three minutes a format
    Full,
    /// Under a minute
    Quick,
    /// About a second: what other commands do where nothing was saved
    Least,
}

impl HowMuch {
    pub(crate) fn effort(self) -> Effort {
        match self {
            HowMuch::Full => Effort::FULL,
            HowMuch::Quick => Effort::QUICK,
            HowMuch::Least => Effort::LEAST,
        }
    }
}

#[derive(Serialize)]
struct Report {
    path: PathBuf,
    #[serde(flatten)]
    tuning: Tuning,
}

pub(crate) fn tune(arguments: &Arguments) -> Result<(), CommandError> {
    let device = devices::open(&arguments.device)?;
    let folder = planner::config_folder()?;
    match Planner::saved(&folder, &device) {
        Err(error) if !error.is_missing() => output::note(&format!("warning: {error}\nit will be replaced")),
        _ => {}
    }
    let effort = if arguments.quick { HowMuch::Quick } else { arguments.effort }.effort();
    let bar = output::progress(0, "measuring");
    let formats = types::formats(&arguments.dtype, &arguments.weight);
    let tuning = flora_tune::tune::tune(&device, &formats, &effort, |done, total| {
        bar.set_length(total);
        bar.set_position(done);
    })?;
    bar.finish_and_clear();
    let saved = Planner::save(&folder, &device, &tuning.coefficients);
    let path = saved.map_err(|source| CommandError::Io { action: "save the coefficients in", path: folder, source })?;
    let report = Report { path, tuning };
    if arguments.json { output::print_json(&report) } else { output::print(&human(&device, &report)) }
}

fn percent(share: f64) -> String {
    format!("{:.1} %", 100.0 * share)
}

fn human(device: &Device, Report { path, tuning }: &Report) -> String {
    let own = &tuning.coefficients;
    let mut text = format!("{} ({})\n\n", device.info().name, device.info().id);
    text += &format!(
        "c0         {} a launch, spread {}\n",
        output::seconds(own.seconds_per_launch),
        percent(own.launch_spread)
    );
    let bandwidth = 1e-9 / own.seconds_per_byte.max(f64::MIN_POSITIVE);
    text += &format!("bandwidth  {bandwidth:.1} GB/s, spread {}\n", percent(own.bandwidth_spread));
    for (name, format) in &own.formats {
        text += &format!("\n{name}: ps/MAC, the median spread of the kernel's points last\n\n{}", surfaces(format));
        text += &errors(format, tuning.held_out.get(name).map_or(&[], Vec::as_slice));
    }
    text += "\nc1 is low_rank_bmm, c2 is matmul. What low-rank kernels take is beyond their base GEMM.\n";
    text += &format!("saved in {}\n", path.display());
    text
}

/// Rows of a table by rows of a batch: a slice of every surface.
fn surfaces(format: &Coefficients) -> String {
    let middle = |axis: &[u32]| axis.get(axis.len() / 2).copied().unwrap_or(1);
    let (mut rank, mut adapters, mut extent, mut rows) = (1, 1, 1, Vec::new());
    for surface in format.seconds_per_mac.values() {
        rank = rank.max(middle(&surface.ranks));
        adapters = adapters.max(middle(&surface.adapters));
        extent = extent.max(middle(&surface.extents));
        rows.extend(surface.rows.iter().copied());
    }
    rows.sort_unstable();
    rows.dedup();
    let names: Vec<String> = Kernel::TIMED.iter().map(|(name, _)| format!(">{name}")).collect();
    let columns: Vec<&str> = std::iter::once(">rows").chain(names.iter().map(String::as_str)).collect();
    let mut table = output::table(&columns);
    for own in rows {
        let cell = |(_, kernel): &(&str, Kernel)| match format.seconds_per_mac.get(kernel) {
            Some(surface) if surface.rows.contains(&own) => {
                let regime = Regime { rows: f64::from(own), rank: f64::from(rank), adapters: f64::from(adapters) };
                format!("{:.3}", 1e12 * surface.at(f64::from(extent), regime))
            }
            _ => "-".to_owned(),
        };
        table.add_row(std::iter::once(own.to_string()).chain(Kernel::TIMED.iter().map(cell)).collect::<Vec<_>>());
    }
    let spread = |(_, kernel): &(&str, Kernel)| {
        let Some(surface) = format.seconds_per_mac.get(kernel) else { return "-".to_owned() };
        let measured = surface.spread.iter().zip(&surface.measured).filter(|(_, measured)| **measured);
        let mut spreads: Vec<f64> = measured.map(|(spread, _)| *spread).collect();
        spreads.sort_by(f64::total_cmp);
        spreads.get(spreads.len() / 2).map_or_else(|| "-".to_owned(), |spread| percent(*spread))
    };
    table.add_row(std::iter::once("spread".to_owned()).chain(Kernel::TIMED.iter().map(spread)).collect::<Vec<_>>());
    format!(
        "{}rows: of the batch for matmul and stacked, else of each of {adapters} adapters of rank {rank}; d = k = {extent}\n",
        output::lines(&table)
    )
}

/// How far the model was off.
fn errors(format: &Coefficients, held_out: &[HeldOut]) -> String {
    let Some(error) = format.error else { return String::new() };
    let mut text = format!(
        "\nheld out: {} predictions for {} batches that no coefficient comes from; off by {} (median), {} (95th percentile), {} (most)\n",
        error.points,
        held_out.len(),
        percent(error.median),
        percent(error.p95),
        percent(error.largest)
    );
    for (part, names) in [(Part::Multiplicative, "multiplicative"), (Part::Additive, "additive")] {
        for lowering in flora_plan::lowering::lowerings_of(part).map(flora_plan::lowering::Row::lowering) {
            let plans = held_out.iter().filter(|point| point.part == part).flat_map(|point| &point.plans);
            let own = plans.filter(|plan| plan.lowering == lowering);
            let pairs = own.map(|plan| (plan.predicted_seconds, plan.seconds));
            if let Some(error) = flora_plan::cost::FitError::of(pairs) {
                let title = format!("{names} {lowering}");
                text += &format!("  {title:<24} {:>7} median {:>7} p95\n", percent(error.median), percent(error.p95));
            }
        }
    }
    text
}
