//! The batches that planners are judged by.

use flora::prelude::*;
use flora_plan::batch::{AdapterSlots, BatchShape, LowRankSlots, Segment, VirtualRowSlots};
use flora_plan::lowering::Part;
use serde::Serialize;

/// One batch on one layer.
#[derive(Clone, Debug, PartialEq, Eq, Serialize)]
pub(super) struct Point {
    pub(super) d: u32,
    pub(super) k: u32,
    /// All rows.
    pub(super) tokens: u32,
    pub(super) segments: u32,
    /// Distinct ones; each has as many segments as the others, or one more.
    pub(super) adapters: u32,
    /// Whether there are fewer adapters than segments.
    pub(super) shared: bool,
    pub(super) rank: u32,
    pub(super) adapter: &'static str,
}

/// Extents of layers: SmolLM2's and StarCoder's, square ones, and others that are like none of them.
const SHAPES: [(u32, u32); 14] = [
    (576, 576),
    (576, 192),
    (576, 1536),
    (1536, 576),
    (1024, 1024),
    (960, 2560),
    (2048, 128),
    (2048, 2048),
    (2816, 2816),
    (2048, 8192),
    (3072, 1024),
    (4096, 4096),
    (6144, 128),
    (6144, 6144),
];
const SEGMENTS: [u32; 9] = [1, 2, 4, 8, 16, 32, 64, 128, 256];
/// Rows of a segment: decode half of the time, else prefill.
const ROWS: [u32; 8] = [1, 1, 1, 1, 7, 32, 100, 256];
const RANKS: [u32; 10] = [1, 2, 3, 4, 6, 8, 16, 24, 32, 64];
/// The kinds of adapters of a batch.
const ADAPTERS: [&str; 5] = ["flora", "flora", "lora", "hira", "mixed"];
/// No batch has more rows than this.
const MOST_TOKENS: u32 = 2048;
/// No pool of more bytes is made.
const MOST_POOL_BYTES: u64 = 256 << 20;

/// Draws points.
pub(super) struct Grid {
    random: fastrand::Rng,
}

impl Grid {
    pub(super) fn new(seed: u64) -> Self {
        Self { random: fastrand::Rng::with_seed(seed) }
    }

    /// As many distinct points as are wanted, and acceptable to `fits`, by layer; fewer where the grid doesn't hold so many.
    pub(super) fn draw(mut self, wanted: usize, fits: impl Fn(&Point) -> bool) -> Vec<Point> {
        let mut points: Vec<Point> = Vec::with_capacity(wanted);
        for _ in 0..200 * wanted {
            if points.len() == wanted {
                break;
            }
            let point = self.point();
            if !points.contains(&point) && fits(&point) {
                points.push(point);
            }
        }
        points.sort_by_key(|point| (point.d, point.k));
        points
    }

    fn point(&mut self) -> Point {
        let mut of = |choices: usize| self.random.usize(0..choices);
        let (d, k) = SHAPES[of(SHAPES.len())];
        let segments = SEGMENTS[of(SEGMENTS.len())];
        let rows = ROWS[of(ROWS.len())];
        let (rank, adapter) = (RANKS[of(RANKS.len())], ADAPTERS[of(ADAPTERS.len())]);
        // All distinct half of the time, else one for all, else one for four segments.
        let adapters = match of(4) {
            0 => 1,
            1 => segments.div_ceil(4),
            _ => segments,
        };
        Point { d, k, tokens: segments * rows, segments, adapters, shared: adapters < segments, rank, adapter }
    }
}

impl Point {
    pub(super) fn shape(&self) -> LayerShape {
        LayerShape { d: self.d, k: self.k }
    }

    /// Vectors in either pool.
    pub(super) fn slots(&self) -> u64 {
        u64::from(self.adapters) * u64::from(self.rank)
    }

    /// Whether it can be run at all.
    pub(super) fn fits(&self, largest_buffer_bytes: Option<u64>) -> bool {
        let most = largest_buffer_bytes.unwrap_or(u64::MAX).min(MOST_POOL_BYTES);
        self.tokens <= MOST_TOKENS && self.slots() * 4 * u64::from(self.d.max(self.k)) <= most
    }

    /// Segments and adapters; those of one adapter follow one another.
    pub(super) fn batch(&self) -> (Vec<Segment>, Vec<AdapterSlots>) {
        let rows = self.tokens / self.segments;
        let adapter_of =
            |segment: u32| (u64::from(segment) * u64::from(self.adapters) / u64::from(self.segments)) as u32;
        let segments = (0..self.segments).map(|segment| Segment { rows, adapter: adapter_of(segment) });
        (segments.collect(), (0..self.adapters).map(|position| self.slots_of(position)).collect())
    }

    pub(super) fn shape_of_batch(&self) -> BatchShape {
        let (segments, adapters) = self.batch();
        BatchShape::of(&segments, &adapters)
    }

    fn slots_of(&self, position: u32) -> AdapterSlots {
        let first = position * self.rank;
        let scaled =
            (first..first + self.rank).map(|slot| VirtualRowSlots { in_scale: Some(slot), out_scale: Some(slot) });
        let multiplicative = |rows: Vec<VirtualRowSlots>| AdapterSlots { virtual_rows: rows, ..AdapterSlots::base() };
        let kind = match (self.adapter, position % 4) {
            ("mixed", 0) => "flora",
            ("mixed", 1) => "lora",
            ("mixed", 2) => "none",
            ("mixed", _) => "hira",
            (kind, _) => kind,
        };
        match kind {
            "flora" => multiplicative(scaled.collect()),
            "hira" => multiplicative(std::iter::once(VirtualRowSlots::default()).chain(scaled).collect()),
            "lora" => AdapterSlots {
                low_rank: LowRankSlots { shrink: first, expand: first, rank: self.rank },
                ..AdapterSlots::base()
            },
            _ => AdapterSlots::base(),
        }
    }

    /// What tells a plan of this batch from the others: the lowering of the part that its adapters have.
    pub(super) fn name_of(&self, plan: &Plan) -> String {
        let (multiplicative, additive) = (plan.of(Part::Multiplicative), plan.of(Part::Additive));
        let multiplicative = match plan.parts().on_chip_from() {
            1 => multiplicative.to_string(),
            from => format!("{multiplicative} from {from} rows"),
        };
        match self.adapter {
            "lora" => additive.to_string(),
            "mixed" => format!("{multiplicative}+{additive}"),
            _ => multiplicative,
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_seed_draws_the_same_points_and_none_twice() {
        let draw = || Grid::new(7).draw(60, |point| point.fits(None));
        let points = draw();
        assert_eq!(points, draw());
        assert_eq!(points.len(), 60);
        for (at, point) in points.iter().enumerate() {
            assert!(!points[..at].contains(point));
            let shape = point.shape_of_batch();
            assert_eq!(shape.tokens, u64::from(point.tokens), "{point:?}");
            assert_eq!(point.shared, point.adapters < point.segments);
        }
    }
}
