//! How near each kernel comes to what the device's arithmetic and its memory allow.

use super::missing;
use crate::commands::plot::Axis;
use crate::commands::plot::{Chart, INK, Look, Series};
use crate::commands::report::document::{Block, Figure, Key, Section, Table};
use crate::commands::report::page::{Format, KernelPoints, Model, Point};

const TITLE: &str = "Roofline of each kernel";

/// A point under the roof.
#[derive(Clone, Copy)]
struct Attained {
    macs_per_byte: f64,
    macs_per_second: f64,
}

/// A kernel's points, of which there is one at least.
struct Kernel {
    name: String,
    multiplies_weight: bool,
    points: Vec<Attained>,
}

pub(super) fn section(model: Option<&Model>) -> Section {
    let id = "roofline";
    let Some(model) = model else {
        let sentence = "A roofline needs the coefficients of the device:";
        return missing(id, TITLE, sentence, &["flora tune", "flora report"]);
    };
    let mut blocks = Vec::new();
    for Format { name, kernels, .. } in &model.formats {
        let of = |kernel: &KernelPoints| Kernel {
            name: kernel.name.clone(),
            multiplies_weight: kernel.multiplies_weight,
            points: kernel.points.iter().filter_map(attained).collect(),
        };
        let kernels: Vec<_> = kernels.iter().map(of).filter(|kernel| !kernel.points.is_empty()).collect();
        if !kernels.is_empty() {
            blocks.push(Block::Heading(format!("Layers of {name}")));
            blocks.extend(roofline(&kernels, model.bytes_per_second));
        }
    }
    if blocks.is_empty() {
        let sentence = "The file of coefficients has no point that is a rate. This measures again:";
        return missing(id, TITLE, sentence, &["flora tune", "flora report"]);
    }
    let words = "Each mark is a measured point: the MACs a second that the kernel attains at so many MACs for each byte that it must \
                 move. The roof is the lesser of the bandwidth times that and the highest rate of any kernel that multiplies by a \
                 weight. Marks above it found their operands in a cache, or are low-rank sums, timed as what they add to a GEMM, \
                 that the GEMM hides.";
    blocks.insert(0, Block::Paragraph(words.to_owned()));
    Section { id, title: TITLE, blocks }
}

fn attained(point: &Point) -> Option<Attained> {
    let is_rate = |rate: f64| rate.is_finite() && rate > 0.0;
    let attained = Attained { macs_per_byte: point.macs_per_byte, macs_per_second: 1.0 / point.seconds_per_mac };
    (is_rate(attained.macs_per_byte) && is_rate(attained.macs_per_second)).then_some(attained)
}

fn roofline(kernels: &[Kernel], bytes_per_second: f64) -> [Block; 2] {
    let all = || kernels.iter().flat_map(|kernel| &kernel.points);
    let weights = kernels.iter().filter(|kernel| kernel.multiplies_weight).flat_map(|kernel| &kernel.points);
    let peak = weights.map(|point| point.macs_per_second).fold(0.0, f64::max);
    // The ridge belongs on the axis: left of it memory limits, right of it arithmetic.
    let ridge = peak / bytes_per_second;
    let x = Axis::over("MACs per byte", all().map(|point| point.macs_per_byte).chain([ridge]));
    let y = Axis::over("GMAC/s", all().map(|point| point.macs_per_second * 1e-9).chain([peak * 1e-9]));
    let roof = |macs_per_byte: f64| (macs_per_byte * bytes_per_second).min(peak) * 1e-9;
    // The slope is drawn from where it enters the chart.
    let left = x.low().max(y.low() * 1e9 / bytes_per_second);
    let corners = [left, ridge, x.high()].into_iter().filter(|at| at.is_finite() && x.holds(*at));
    let roof_line =
        Series { look: Look::line(INK), points: corners.map(|at| [at, roof(at)]).collect(), bars: Vec::new() };
    let look = Look::of(0).dots();
    let mut figures = Vec::new();
    let mut table = Table::new(&["<kernel", ">best, GMAC/s", ">at MACs per byte", ">of the roof there"]);
    for Kernel { name, points, .. } in kernels {
        let marks = points.iter().map(|point| [point.macs_per_byte, point.macs_per_second * 1e-9]).collect();
        let series = vec![roof_line.clone(), Series { look, points: marks, bars: Vec::new() }];
        let chart = Chart { x: x.clone(), y: y.clone(), series, verticals: Vec::new() };
        let best = points.iter().max_by(|one, other| one.macs_per_second.total_cmp(&other.macs_per_second));
        let caption =
            best.map(|best| format!("At best {:.1} GMAC/s.", best.macs_per_second * 1e-9)).unwrap_or_default();
        figures.push(Figure { title: name.clone(), svg: chart.svg(), caption });
        table.rows.extend(best.map(|best| {
            let share = best.macs_per_second * 1e-9 / roof(best.macs_per_byte);
            vec![
                name.clone(),
                format!("{:.1}", best.macs_per_second * 1e-9),
                format!("{:.2}", best.macs_per_byte),
                format!("{:.0} %", share * 100.0),
            ]
        }));
    }
    let keys = vec![Key::new(Look::line(INK), "roof"), Key::new(look, "measured")];
    [Block::Figures { keys, figures }, Block::Table(table)]
}
