//! What was measured, for people and for programs.

use serde::Serialize;

use super::case::{BASE, Case, MIXED, Variant};
use super::peaks::Peaks;
use super::peer::Prepared;
use crate::commands::output;

/// One line of the table, as `benches/peers/torch_lora.py` has it too.
#[derive(Clone, Debug, Serialize)]
pub(super) struct Record {
    pub(super) device: String,
    pub(super) d: u32,
    pub(super) k: u32,
    pub(super) dtype: String,
    pub(super) weight: String,
    pub(super) tokens: u32,
    pub(super) segments: u32,
    pub(super) rank: u32,
    pub(super) adapter: String,
    pub(super) lowering: String,
    pub(super) seconds: f64,
    pub(super) base_seconds: f64,
    pub(super) ratio_to_base: f64,
    pub(super) floor_seconds: f64,
    /// (third quartile − first quartile) / median of the repetitions.
    pub(super) spread: f64,
}

/// The measurements of one case.
pub(super) struct Group {
    pub(super) case: Case,
    pub(super) own: Vec<Record>,
    pub(super) peer: Vec<Record>,
}

/// The repetitions of one variant.
#[derive(Clone, Debug, Default)]
pub(super) struct Times(Vec<f64>);

impl Times {
    pub(super) fn push(&mut self, seconds: f64) {
        self.0.push(seconds);
    }

    /// The quartiles.
    fn quartiles(&self) -> [f64; 3] {
        let mut sorted = self.0.clone();
        sorted.sort_by(f64::total_cmp);
        let at = |part: f64| {
            let place = part * sorted.len().saturating_sub(1) as f64;
            let (low, high) = (place.floor() as usize, place.ceil() as usize);
            match (sorted.get(low), sorted.get(high)) {
                (Some(low), Some(high)) => low + (high - low) * place.fract(),
                _ => f64::NAN,
            }
        };
        [at(0.25), at(0.5), at(0.75)]
    }

    pub(super) fn median(&self) -> f64 {
        self.quartiles()[1]
    }

    pub(super) fn count(&self) -> usize {
        self.0.len()
    }

    /// (third quartile − first quartile) / median.
    pub(super) fn spread(&self) -> f64 {
        let [first, median, third] = self.quartiles();
        (third - first) / median
    }
}

impl Record {
    /// Of one of our own variants.
    pub(super) fn own(device: &str, case: Case, variant: &Variant, times: &Times, base: f64, peaks: &Peaks) -> Self {
        let seconds = times.median();
        Self {
            device: device.to_owned(),
            d: case.shape.d,
            k: case.shape.k,
            dtype: case.format.activations.name().to_owned(),
            weight: case.format.weight.name().to_owned(),
            tokens: variant.tokens,
            segments: variant.segments,
            rank: variant.rank,
            adapter: variant.adapter.to_owned(),
            lowering: variant.lowering.clone(),
            seconds,
            base_seconds: base,
            ratio_to_base: seconds / base,
            floor_seconds: peaks.floor(case.format.activations, variant.macs, variant.bytes),
            spread: times.spread(),
        }
    }

    /// Of one of the peer's.
    pub(super) fn peer(Prepared { described, .. }: &Prepared, times: &Times, base: f64) -> Self {
        let seconds = times.median();
        Self {
            device: described.device.clone(),
            d: described.d,
            k: described.k,
            dtype: described.dtype.clone(),
            weight: described.dtype.clone(),
            tokens: described.tokens,
            segments: described.segments,
            rank: described.rank,
            adapter: described.adapter.clone(),
            lowering: described.lowering.clone(),
            seconds,
            base_seconds: base,
            ratio_to_base: seconds / base,
            floor_seconds: described.floor_seconds,
            spread: times.spread(),
        }
    }

    /// The peer's formulations of the same adapter.
    fn counterparts<'a>(&self, peer: &'a [Record]) -> Vec<&'a Record> {
        peer.iter().filter(|other| other.adapter == self.adapter && other.rank == self.rank).collect()
    }
}

/// Tables that people read, a shape after the other.
pub(super) fn human(device: &str, peaks: &[String], groups: &[Group]) -> String {
    let mut text = format!("{device}\n");
    if let Some(peer) = groups.iter().find_map(|group| group.peer.first()) {
        text += &format!("peer: {}\n", peer.device);
    }
    for group in groups {
        let Case { shape, tokens, format } = group.case;
        let weight = match format.weight.name() == format.activations.name() {
            true => String::new(),
            false => format!(", weight {}", format.weight),
        };
        text += &format!(
            "\nd {}, k {}, {}{weight}, {} segments of {} tokens\n",
            shape.d, shape.k, format.activations, tokens.segments, tokens.rows
        );
        text += &table(group);
    }
    text += &format!("\npeaks: {}\n", peaks.join(", "));
    if groups.iter().any(|group| group.own.iter().any(|record| record.adapter == MIXED)) {
        text += "mixed: what the base rows of a mixed batch cost; `flora bench layers --help` says how it is taken\n";
    }
    text
}

fn table(group: &Group) -> String {
    let has_peer = !group.peer.is_empty();
    let mut columns = vec!["<adapter", ">rank", "<lowering", ">time", ">± %", ">× base", ">floor", ">× floor"];
    if has_peer {
        columns.extend(["<peer", ">time", ">× its base", ">peer / flora"]);
    }
    let mut table = output::table(&columns);
    for record in &group.own {
        let rank = if record.rank == 0 { "-".to_owned() } else { record.rank.to_string() };
        let mut cells = vec![
            if record.adapter == BASE { "base" } else { &record.adapter }.to_owned(),
            rank,
            record.lowering.clone(),
            output::seconds(record.seconds),
            format!("{:.1}", record.spread * 50.0),
            format!("{:.3}", record.ratio_to_base),
            output::seconds(record.floor_seconds),
            format!("{:.2}", record.seconds / record.floor_seconds),
        ];
        if has_peer {
            let peers = record.counterparts(&group.peer);
            // A line of the row for every formulation.
            let lines = |cell: &dyn Fn(&Record) -> String| match &peers[..] {
                [] => "-".to_owned(),
                peers => peers.iter().map(|peer| cell(peer)).collect::<Vec<_>>().join("\n"),
            };
            cells.extend([
                lines(&|peer| peer.lowering.clone()),
                lines(&|peer| output::seconds(peer.seconds)),
                lines(&|peer| format!("{:.3}", peer.ratio_to_base)),
                lines(&|peer| format!("{:.2}", peer.seconds / record.seconds)),
            ]);
        }
        table.add_row(cells);
    }
    output::lines(&table)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_median_of_an_even_number_lies_between_two() {
        let mut times = Times::default();
        assert!(times.median().is_nan());
        [4.0, 1.0, 3.0, 2.0].into_iter().for_each(|seconds| times.push(seconds));
        assert_eq!(times.quartiles(), [1.75, 2.5, 3.25]);
        assert_eq!(times.spread(), 0.6);
    }
}
