//! The page's sections, each from its part of the data.

mod coefficients;
mod paper;
mod regret;
mod roofline;
mod serving;

use super::document::{Block, Document, Section};
use super::page::Page;

/// Lays the page out.
pub(super) fn document(page: &Page) -> Document {
    let measured = page.paper.iter().map(|panel| panel.coordinates.device.as_str());
    let measured = measured.chain(page.planner.iter().map(|regret| regret.device.as_str()));
    let measured = measured.chain(page.serving.iter().map(|run| run.device.as_str()));
    let mut devices: std::collections::BTreeSet<_> = measured.collect();
    if devices.is_empty() {
        devices.extend(page.model.iter().map(|model| model.device.as_str()));
    }
    let subtitle = match devices.is_empty() {
        true => "Nothing was measured yet; every section says how.".to_owned(),
        false => format!("Measured on {}.", devices.into_iter().collect::<Vec<_>>().join("; ")),
    };
    Document {
        title: "flora on this device".to_owned(),
        subtitle,
        sections: vec![
            coefficients::section(page.model.as_ref()),
            roofline::section(page.model.as_ref()),
            paper::section(&page.paper),
            regret::section(&page.planner),
            serving::section(&page.serving),
        ],
        footer: format!("Made by flora report, version {}.", env!("CARGO_PKG_VERSION")),
    }
}

/// A section for which nothing was given.
fn missing(id: &'static str, title: &'static str, sentence: &'static str, commands: &[&str]) -> Section {
    let commands = commands.iter().map(|command| (*command).to_owned()).collect();
    Section { id, title, blocks: vec![Block::Missing { sentence, commands }] }
}

/// A share as a percentage.
fn percent(share: f64) -> String {
    match share * 100.0 {
        percent if percent > 0.0 && percent < 0.05 => "< 0.1 %".to_owned(),
        percent if percent > 0.0 && percent < 10.0 => format!("{percent:.1} %"),
        percent => format!("{percent:.0} %"),
    }
}

/// The middle one; `None` of none.
fn median(values: impl Iterator<Item = f64>) -> Option<f64> {
    let mut sorted: Vec<_> = values.collect();
    sorted.sort_by(f64::total_cmp);
    match sorted.len() {
        0 => None,
        count if count % 2 == 1 => Some(sorted[count / 2]),
        count => Some((sorted[count / 2 - 1] + sorted[count / 2]) / 2.0),
    }
}

/// A count with its noun.
fn count(number: usize, one: &str, several: &str) -> String {
    format!("{number} {}", if number == 1 { one } else { several })
}

#[cfg(test)]
mod tests;
