//! `flora tune`: measures the cost model's coefficients on a device and keeps them.

use std::path::PathBuf;

use clap::Args;
use flora::codegen::cost::CoefficientsError;
use flora::prelude::*;
use flora::runtime::tune::{Effort, Tuning};
use serde::Serialize;

use super::error::CommandError;
use super::{output, planner};

/// Measure the cost model's coefficients on a device and save them
#[derive(Args)]
pub(crate) struct Arguments {
    /// The device, as `flora devices` lists it
    #[arg(long, default_value = "auto")]
    device: String,
    /// Measure for under a second, at fewer points
    #[arg(long)]
    quick: bool,
    /// Print JSON
    #[arg(long)]
    json: bool,
}

#[derive(Serialize)]
struct Report {
    path: PathBuf,
    #[serde(flatten)]
    tuning: Tuning,
}

pub(crate) fn tune(arguments: &Arguments) -> Result<(), CommandError> {
    let device = Device::open(&arguments.device)?;
    let folder = planner::config_folder()?;
    let old = Planner::file(&folder, &device);
    match Coefficients::read_for(&old, &device.info().fingerprint(), env!("CARGO_PKG_VERSION")) {
        Err(CoefficientsError::Io { source, .. }) if source.kind() == std::io::ErrorKind::NotFound => {}
        Err(error) => output::note(&format!("warning: {error}\nit will be replaced")),
        Ok(_) => {}
    }
    let effort = if arguments.quick { Effort::QUICK } else { Effort::SHORT };
    let bar = output::progress(0, "measuring");
    let tuning = flora::runtime::tune::tune(&device, effort, |done, total| {
        bar.set_length(total as u64);
        bar.set_position(done as u64);
    })?;
    bar.finish_and_clear();
    let saved = Planner::save(&folder, &device, &tuning.coefficients);
    let path = saved.map_err(|source| CommandError::Io { action: "save the coefficients in", path: folder, source })?;
    let report = Report { path, tuning };
    if arguments.json { output::print_json(&report) } else { output::print(&human(&device, &report)) }
}

fn human(device: &Device, Report { path, tuning }: &Report) -> String {
    let Coefficients { seconds_per_launch, seconds_per_byte, .. } = tuning.coefficients;
    let percent = |spread: f64| format!("±{:.0} %", spread * 50.0);
    let mut text = format!("{} ({})\n\n", device.info().name, device.info().id);
    text +=
        &format!("c0         {} a launch, {}\n", output::seconds(seconds_per_launch), percent(tuning.launch_spread));
    let bandwidth = 1e-9 / seconds_per_byte.max(f64::MIN_POSITIVE);
    text += &format!("bandwidth  {bandwidth:.1} GB/s, {}\n\n", percent(tuning.bandwidth_spread));
    let mut table = output::table(&["<kernel", ">rows", ">time", ">ps/MAC", ">GMAC/s", ">spread"]);
    let mut measurements = tuning.measurements.clone();
    measurements.sort_by_key(|point| (point.kernel, point.regime));
    for point in &measurements {
        table.add_row([
            kernel_name(point.kernel),
            point.regime.to_string(),
            output::seconds(point.seconds),
            point.seconds_per_mac.map_or_else(|| "-".to_owned(), |seconds| format!("{:.3}", seconds * 1e12)),
            point.seconds_per_mac.map_or_else(|| "-".to_owned(), |seconds| format!("{:.1}", 1e-9 / seconds)),
            percent(point.spread),
        ]);
    }
    text += &output::lines(&table);
    text += "\nc1 is low_rank_bmm, c2 is matmul. A kernel's time includes what the model says of its copies and launches.\n";
    text += &format!("saved in {}\n", path.display());
    text
}

/// The name that the tuning file has for a kernel.
fn kernel_name(kernel: flora::codegen::cost::Kernel) -> String {
    match serde_json::to_value(kernel) {
        Ok(serde_json::Value::String(name)) => name,
        _ => format!("{kernel:?}"),
    }
}
