//! The paper's question of the measurements of a layer: up to which rank does a batch of fLoRA adapters run faster than one of
//! LoRA adapters by batched matmul (Fig. 2, Eq. 7)?

use std::collections::BTreeMap;

use serde::{Deserialize, Serialize};

/// One measurement, as `flora bench paper --json` prints it.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
pub(crate) struct Record {
    pub(crate) device: String,
    pub(crate) model: String,
    pub(crate) layer: String,
    pub(crate) d: u32,
    pub(crate) k: u32,
    pub(crate) dtype: String,
    pub(crate) weight: String,
    /// Of the whole batch.
    pub(crate) tokens: u32,
    /// Each with an adapter of its own.
    pub(crate) segments: u32,
    /// 0 for the base GEMM.
    pub(crate) rank: u32,
    pub(crate) adapter: String,
    pub(crate) lowering: String,
    /// Median of the repetitions.
    pub(crate) seconds: f64,
    /// (third quartile − first quartile) / median of the repetitions; 0 where there is only one.
    pub(crate) spread: f64,
    pub(crate) repetitions: usize,
    /// Of the base GEMM over the batch's tokens.
    pub(crate) base_seconds: f64,
    pub(crate) tokens_per_second: f64,
}

/// What the records of one panel have in common.
#[derive(Clone, Debug, PartialEq, Eq, PartialOrd, Ord)]
pub(crate) struct Coordinates {
    pub(crate) device: String,
    pub(crate) dtype: String,
    pub(crate) weight: String,
    pub(crate) segments: u32,
    pub(crate) tokens: u32,
    pub(crate) model: String,
    pub(crate) layer: String,
    pub(crate) d: u32,
    pub(crate) k: u32,
}

impl Coordinates {
    fn of(record: &Record) -> Self {
        let Record { device, dtype, weight, segments, tokens, model, layer, d, k, .. } = record.clone();
        Self { device, dtype, weight, segments, tokens, model, layer, d, k }
    }

    /// Whether a record is of this panel.
    pub(crate) fn holds(&self, record: &Record) -> bool {
        *self == Self::of(record)
    }

    /// The batch in words.
    pub(crate) fn batch(&self) -> String {
        match self.tokens == self.segments {
            true => format!("decode, {} segments of 1 token", self.segments),
            false => format!("prefill, {} segments of {} tokens", self.segments, self.tokens / self.segments.max(1)),
        }
    }
}

/// Seconds by rank, for every way to compute an adapter.
#[derive(Clone, Debug, Default, PartialEq)]
pub(crate) struct Curves(BTreeMap<(String, String), BTreeMap<u32, f64>>);

/// One layer in one batch and one choice of types.
#[derive(Clone, Debug, PartialEq)]
pub(crate) struct Panel {
    pub(crate) coordinates: Coordinates,
    pub(crate) base_seconds: f64,
    pub(crate) curves: Curves,
}

/// Whether `on_chip`, which the paper hasn't got, may compute fLoRA too.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum Choice {
    /// fLoRA by `stacked`, the paper's Eq. 6.
    Stacked,
    /// fLoRA by the faster of `stacked` and `on_chip`.
    Best,
}

/// Where the time of fLoRA passes that of LoRA by `bmm`.
#[derive(Clone, Copy, Debug, PartialEq)]
pub(crate) enum Crossing {
    /// fLoRA is the slower at the lowest measured rank already.
    Below(u32),
    /// Between two measured ranks, which a straight line joins.
    At(f64),
    /// fLoRA is the faster at the highest measured rank still.
    Above(u32),
}

impl std::fmt::Display for Crossing {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        match self {
            Self::Below(rank) => f.pad(&format!("< {rank}")),
            Self::At(rank) => f.pad(&format!("{rank:.1}")),
            Self::Above(rank) => f.pad(&format!("> {rank}")),
        }
    }
}

/// The panels of these records, in the order in which they come first.
pub(crate) fn panels(records: &[Record]) -> Vec<Panel> {
    let mut panels = Vec::<Panel>::new();
    let mut positions = BTreeMap::new();
    for record in records {
        let position = *positions.entry(Coordinates::of(record)).or_insert_with_key(|coordinates| {
            let (coordinates, base_seconds) = (coordinates.clone(), record.base_seconds);
            panels.push(Panel { coordinates, base_seconds, curves: Curves::default() });
            panels.len() - 1
        });
        // The base GEMM has no rank, and every other record has its time too.
        if record.rank > 0 {
            panels[position].curves.insert(&record.adapter, &record.lowering, record.rank, record.seconds);
        }
    }
    panels
}

impl Curves {
    /// Adds a point.
    pub(crate) fn insert(&mut self, adapter: &str, lowering: &str, rank: u32, seconds: f64) {
        self.0.entry((adapter.to_owned(), lowering.to_owned())).or_default().insert(rank, seconds);
    }

    /// Every curve with its adapter and lowering.
    pub(crate) fn iter(&self) -> impl Iterator<Item = (&str, &str, &BTreeMap<u32, f64>)> {
        self.0.iter().map(|((adapter, lowering), seconds)| (adapter.as_str(), lowering.as_str(), seconds))
    }

    /// Seconds by rank; `None` where there is no such curve.
    pub(crate) fn get(&self, adapter: &str, lowering: &str) -> Option<&BTreeMap<u32, f64>> {
        self.0.get(&(adapter.to_owned(), lowering.to_owned()))
    }

    /// `None` where no rank has both times.
    pub(crate) fn crossing(&self, choice: Choice) -> Option<Crossing> {
        let mut flora = self.get("flora", "stacked").cloned().unwrap_or_default();
        if choice == Choice::Best {
            for (rank, seconds) in self.get("flora", "on_chip").into_iter().flatten() {
                let best = flora.entry(*rank).or_insert(*seconds);
                *best = best.min(*seconds);
            }
        }
        let lora = self.get("lora", "bmm")?;
        crossing(flora.iter().filter_map(|(rank, flora)| Some((*rank, flora - lora.get(rank)?))))
    }
}

/// Where the excess of fLoRA's time over LoRA's, by rising rank, first turns positive.
fn crossing(excess: impl Iterator<Item = (u32, f64)>) -> Option<Crossing> {
    let mut last: Option<(u32, f64)> = None;
    for (rank, excess) in excess {
        if excess > 0.0 {
            return Some(match last {
                None => Crossing::Below(rank),
                Some((before, less)) => {
                    let share = -less / (excess - less);
                    Crossing::At(f64::from(before) + share * f64::from(rank - before))
                }
            });
        }
        last = Some((rank, excess));
    }
    last.map(|(rank, _)| Crossing::Above(rank))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn curves_cross_where_a_line_between_ranks_does() {
        let of = |excess: &[(u32, f64)]| crossing(excess.iter().copied());
        assert_eq!(of(&[]), None);
        assert_eq!(of(&[(2, 0.5)]), Some(Crossing::Below(2)));
        assert_eq!(of(&[(1, -1.0), (8, -0.5)]), Some(Crossing::Above(8)));
        assert_eq!(of(&[(1, -1.0), (4, -1.0), (8, 3.0), (12, -1.0)]), Some(Crossing::At(5.0)));
        assert_eq!(of(&[(1, 0.0), (2, 1.0)]), Some(Crossing::At(1.0)));
    }

    #[test]
    fn the_better_of_two_ways_crosses_later() {
        let record = |adapter: &str, lowering: &str, rank: u32, seconds: f64| Record {
            device: "the host".into(),
            model: "m".into(),
            layer: "q".into(),
            d: 8,
            k: 8,
            dtype: "f32".into(),
            weight: "f32".into(),
            tokens: 2,
            segments: 2,
            rank,
            adapter: adapter.into(),
            lowering: lowering.into(),
            seconds,
            spread: 0.0,
            repetitions: 1,
            base_seconds: 1.0,
            tokens_per_second: 2.0 / seconds,
        };
        let mut records = vec![record("none", "matmul", 0, 1.0)];
        // Not in the order of the ranks, and the last one a second time.
        for rank in [4, 1, 2, 2] {
            records.push(record("flora", "stacked", rank, f64::from(rank)));
            records.push(record("flora", "on_chip", rank, 1.5));
            records.push(record("lora", "bmm", rank, 1.75));
        }
        let panels = panels(&records);
        let [panel] = &panels[..] else { panic!("one panel: {panels:?}") };
        assert_eq!(panel.curves.iter().map(|(_, _, seconds)| seconds.len()).collect::<Vec<_>>(), [3; 3]);
        assert_eq!(panel.curves.crossing(Choice::Stacked), Some(Crossing::At(1.75)));
        assert_eq!(panel.curves.crossing(Choice::Best), Some(Crossing::Above(4)));
        assert_eq!(panel.coordinates.batch(), "decode, 2 segments of 1 token");
    }
}
