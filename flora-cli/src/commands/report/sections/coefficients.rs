//! What the cost model knows of the device.

use std::collections::{BTreeMap, BTreeSet};

use flora_plan::cost::FitError;

use super::{count, median, missing, percent};
use crate::commands::output;
use crate::commands::plot::Axis;
use crate::commands::plot::{Chart, Look, Series};
use crate::commands::report::document::{Block, Figure, Key, Section, Table, Tile};
use crate::commands::report::page::{Format, KernelPoints, Model};

const TITLE: &str = "Device and coefficients";

pub(super) fn section(model: Option<&Model>) -> Section {
    let id = "coefficients";
    let Some(model) = model else {
        let sentence = "There are no coefficients of this device. This measures and keeps them:";
        return missing(id, TITLE, sentence, &["flora tune", "flora report"]);
    };
    let mut blocks = vec![
        Block::Tiles(vec![
            Tile { value: output::seconds(model.seconds_per_launch), label: "c0, a launch" },
            Tile { value: percent(model.launch_spread), label: "spread of c0" },
            Tile { value: bandwidth(model.bytes_per_second), label: "effective bandwidth" },
            Tile { value: percent(model.bandwidth_spread), label: "spread of the bandwidth" },
        ]),
        Block::Paragraph(format!(
            "Measured by flora {} on {}. The planner prices a lowering as its launches times c0 and, for each of its kernels, the \
             greater of its multiply-accumulates (MACs) times the kernel's time per MAC and its bytes over the bandwidth. Spreads are \
             the largest of all passes less the smallest, over the median.",
            model.flora, model.device
        )),
    ];
    for Format { name, kernels, error } in &model.formats {
        blocks.push(Block::Heading(format!("Layers of {name} (activations/adapters/weight)")));
        blocks.extend(error.map(|FitError { points, median, p95, largest }| {
            let [median, p95, largest] = [median, p95, largest].map(percent);
            let held_out = count(points, "prediction", "predictions");
            Block::Paragraph(format!(
                "On batches that were held out, {held_out} were off by {median} in the median, {p95} at the 95th percentile and \
                 {largest} at most."
            ))
        }));
        blocks.push(Block::Table(summary(kernels)));
        blocks.extend(figures(kernels));
        let summary = format!("Every measured point of {name}");
        blocks.push(Block::Folded { summary, table: points(kernels) });
    }
    Section { id, title: TITLE, blocks }
}

fn bandwidth(bytes_per_second: f64) -> String {
    match bytes_per_second.is_finite() {
        true => format!("{:.1} GB/s", bytes_per_second * 1e-9),
        false => "no limit".to_owned(),
    }
}

/// Picoseconds of a MAC.
fn picoseconds(seconds: f64) -> String {
    let value = seconds * 1e12;
    if value >= 100.0 { format!("{value:.0}") } else { format!("{value:.3}") }
}

fn summary(kernels: &[KernelPoints]) -> Table {
    let mut table =
        Table::new(&["<kernel", ">points", ">rows", ">fastest, ps/MAC", ">slowest, ps/MAC", ">median spread"]);
    for KernelPoints { name, points, .. } in kernels {
        let times = || points.iter().map(|point| point.seconds_per_mac);
        let rows = points.iter().map(|point| point.rows);
        let spread = median(points.iter().map(|point| point.spread));
        table.rows.push(vec![
            name.clone(),
            points.len().to_string(),
            match (rows.clone().min(), rows.max()) {
                (Some(least), Some(most)) => format!("{least} to {most}"),
                _ => "-".to_owned(),
            },
            times().reduce(f64::min).map_or_else(|| "-".to_owned(), picoseconds),
            times().reduce(f64::max).map_or_else(|| "-".to_owned(), picoseconds),
            spread.map_or_else(|| "-".to_owned(), percent),
        ]);
    }
    table
}

/// A chart for each kernel, all of one scale. A series is of one number of adapters; where rank or extent differ too, its line
/// joins the medians.
fn figures(kernels: &[KernelPoints]) -> Option<Block> {
    let all = || kernels.iter().flat_map(|kernel| &kernel.points);
    let x = Axis::over("rows", all().map(|point| point.rows as f64));
    let y = Axis::over("ps per MAC", all().map(|point| point.seconds_per_mac * 1e12));
    let adapters: BTreeSet<_> = all().map(|point| point.adapters).collect();
    let looks: BTreeMap<_, _> = adapters.iter().enumerate().map(|(number, key)| (*key, Look::of(number))).collect();
    let mut keys: Vec<_> = looks
        .iter()
        .map(|(adapters, look)| match adapters {
            Some(number) => Key::new(*look, count(*number as usize, "adapter", "adapters")),
            None => Key::new(*look, "any number of adapters"),
        })
        .collect();
    if keys.len() == 1 {
        keys.clear();
    }
    let mut several = false;
    let mut figures = Vec::new();
    for KernelPoints { name, points, .. } in kernels.iter().filter(|kernel| kernel.points.len() > 1) {
        let mut series = Vec::new();
        for (adapters, look) in &looks {
            let mut by_rows = BTreeMap::<u64, Vec<f64>>::new();
            for point in points.iter().filter(|point| point.adapters == *adapters) {
                by_rows.entry(point.rows).or_default().push(point.seconds_per_mac * 1e12);
            }
            if by_rows.values().any(|times| times.len() > 1) {
                several = true;
                let dots = by_rows.iter().flat_map(|(rows, times)| times.iter().map(|time| [*rows as f64, *time]));
                series.push(Series { look: look.dots(), points: dots.collect(), bars: Vec::new() });
            }
            let medians =
                by_rows.into_iter().filter_map(|(rows, times)| Some([rows as f64, median(times.into_iter())?]));
            series.push(Series { look: *look, points: medians.collect(), bars: Vec::new() });
        }
        let chart = Chart { x: x.clone(), y: y.clone(), series, verticals: Vec::new() };
        figures.push(Figure { title: name.clone(), svg: chart.svg(), caption: caption(name).to_owned() });
    }
    if several {
        keys.push(Key::new(Look::of(0).dots(), "one point; lines join the medians over rank and extent"));
    }
    (!figures.is_empty()).then_some(Block::Figures { keys, figures })
}

/// What a kernel does, and what its rows are.
fn caption(kernel: &str) -> &'static str {
    match kernel {
        "matmul" => "The base GEMM, the paper's c2, over rows of the batch.",
        "stacked" => "The GEMM over virtual rows (Eq. 6).",
        "on_chip" => "The GEMM that makes W_i tile by tile, over rows of an adapter.",
        "bmm" => "Making a dense W_i and multiplying by it, over rows of an adapter.",
        "fused" => "Shrink and expand inside the base GEMM, over rows of an adapter.",
        "segmented" => "Shrink and expand by segment, over rows of an adapter.",
        "low_rank_bmm" => "Batched matmuls with low-rank factors (A.2), the paper's c1, over rows of an adapter.",
        _ => "",
    }
}

fn points(kernels: &[KernelPoints]) -> Table {
    let columns =
        ["<kernel", ">rows", ">rank", ">adapters", ">√(d·k)", ">ps/MAC", ">GMAC/s", ">MACs a byte", ">spread"];
    let mut table = Table::new(&columns);
    let or_dash = |value: Option<u64>| value.map_or_else(|| "-".to_owned(), |value| value.to_string());
    for KernelPoints { name, points, .. } in kernels {
        table.rows.extend(points.iter().map(|point| {
            vec![
                name.clone(),
                point.rows.to_string(),
                or_dash(point.rank),
                or_dash(point.adapters),
                point.extent.to_string(),
                picoseconds(point.seconds_per_mac),
                format!("{:.1}", 1e-9 / point.seconds_per_mac),
                if point.macs_per_byte.is_finite() { format!("{:.2}", point.macs_per_byte) } else { "-".to_owned() },
                percent(point.spread),
            ]
        }));
    }
    table
}
