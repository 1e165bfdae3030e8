//! The batch as the planner and the scheduler see it: contiguous segments of rows, and where each adapter's vectors lie in the
//! device's pools. No tensor data.

/// Rows that share a tile of W_i in the cost of `on_chip` on a device; the host shares it among all rows of a segment.
pub const ON_CHIP_TILE_ROWS: u64 = 64;

/// A run of rows that share one adapter; segments follow one another in the batch.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
pub struct Segment {
    /// How many rows.
    pub rows: u32,
    /// Index into the batch's table of [`AdapterSlots`].
    pub adapter: u32,
}

/// One virtual row of an adapter: positions in the pool of in-vectors `[slots, d]` and out-vectors `[slots, k]`.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Hash)]
pub struct VirtualRowSlots {
    /// `None`: not scaled.
    pub in_scale: Option<u32>,
    /// `None`: not scaled.
    pub out_scale: Option<u32>,
}

/// The additive part of an adapter: `rank` consecutive vectors in both pools.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Hash)]
pub struct LowRankSlots {
    /// The first shrink vector, in the pool of in-vectors.
    pub shrink: u32,
    /// The first expand vector, in the pool of out-vectors.
    pub expand: u32,
    /// How many; 0 for none.
    pub rank: u32,
}

impl LowRankSlots {
    fn end(self, first: u32) -> u32 {
        if self.rank == 0 { 0 } else { first.saturating_add(self.rank) }
    }
}

/// Where a folded adapter lies in the pools.
#[derive(Clone, Debug, PartialEq, Eq, Hash)]
pub struct AdapterSlots {
    /// At least one for every adapter that has a multiplicative or base part.
    pub virtual_rows: Vec<VirtualRowSlots>,
    /// The additive part.
    pub low_rank: LowRankSlots,
}

impl AdapterSlots {
    /// The base weight alone.
    pub fn base() -> Self {
        Self { virtual_rows: vec![VirtualRowSlots::default()], low_rank: LowRankSlots::default() }
    }

    /// One past the largest in-vector slot.
    pub fn in_slots(&self) -> u32 {
        let scales = self.virtual_rows.iter().filter_map(|scales| scales.in_scale);
        scales.map(|slot| slot.saturating_add(1)).max().unwrap_or(0).max(self.low_rank.end(self.low_rank.shrink))
    }

    /// One past the largest out-vector slot.
    pub fn out_slots(&self) -> u32 {
        let scales = self.virtual_rows.iter().filter_map(|scales| scales.out_scale);
        scales.map(|slot| slot.saturating_add(1)).max().unwrap_or(0).max(self.low_rank.end(self.low_rank.expand))
    }

    /// Whether its virtual part is exactly x @ w0.
    pub fn is_plain(&self) -> bool {
        matches!(self.virtual_rows[..], [VirtualRowSlots { in_scale: None, out_scale: None }])
    }
}

/// What pricing needs to know of a batch: a few sums, taken in one pass.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Hash)]
pub struct BatchShape {
    /// All rows.
    pub tokens: u64,
    /// Distinct adapters with rows, the base among them.
    pub adapters: u64,
    /// Rows whose virtual part is x @ w0: base rows and LoRA rows.
    pub plain_rows: u64,
    /// Rows with scales or several virtual rows.
    pub multiplicative: GroupShape,
    /// Rows with an additive part beside x @ w0 (LoRA); counted above too.
    pub additive: GroupShape,
    /// Rows with an additive part beside a scaled one (DoRA); counted above too.
    pub scaled_additive: GroupShape,
}

/// One kind of rows in a batch. "Width" is the number of virtual rows, or the rank of the additive part.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Hash)]
pub struct GroupShape {
    /// Rows.
    pub tokens: u64,
    /// Σ over rows of the width.
    pub tokens_times_width: u64,
    /// Distinct adapters.
    pub adapters: u64,
    /// Σ over distinct adapters of the width.
    pub widths: u64,
    /// Σ over distinct adapters of the width times the tiles of [`ON_CHIP_TILE_ROWS`] rows that its rows fill.
    pub widths_by_tile: u64,
    /// The largest width.
    pub largest_width: u64,
    /// The rows of the adapter with the most rows.
    pub longest: u64,
}

impl GroupShape {
    /// Both groups as one.
    pub(crate) fn and(self, other: Self) -> Self {
        Self {
            tokens: self.tokens + other.tokens,
            tokens_times_width: self.tokens_times_width + other.tokens_times_width,
            adapters: self.adapters + other.adapters,
            widths: self.widths + other.widths,
            widths_by_tile: self.widths_by_tile + other.widths_by_tile,
            largest_width: self.largest_width.max(other.largest_width),
            longest: self.longest.max(other.longest),
        }
    }

    fn add(&mut self, rows: u64, width: u64) {
        self.tokens += rows;
        self.tokens_times_width += rows * width;
        self.adapters += 1;
        self.widths += width;
        self.widths_by_tile += width * rows.div_ceil(ON_CHIP_TILE_ROWS);
        self.largest_width = self.largest_width.max(width);
        self.longest = self.longest.max(rows);
    }
}

impl BatchShape {
    /// Sums up a batch. Segments that name the same adapter count as one adapter.
    ///
    /// Segments that name no entry of `adapters` are ignored; [`schedule`](crate::schedule::schedule) reports them.
    pub fn of(segments: &[Segment], adapters: &[AdapterSlots]) -> Self {
        let mut rows_of = vec![0u64; adapters.len()];
        for segment in segments {
            if let Some(rows) = rows_of.get_mut(segment.adapter as usize) {
                *rows += u64::from(segment.rows);
            }
        }
        let mut shape = Self::default();
        for (adapter, rows) in adapters.iter().zip(rows_of).filter(|(_, rows)| *rows > 0) {
            shape.tokens += rows;
            shape.adapters += 1;
            if adapter.is_plain() {
                shape.plain_rows += rows;
            } else {
                shape.multiplicative.add(rows, adapter.virtual_rows.len() as u64);
            }
            let rank = u64::from(adapter.low_rank.rank);
            match (rank > 0, adapter.is_plain()) {
                (false, _) => {}
                (true, true) => shape.additive.add(rows, rank),
                (true, false) => shape.scaled_additive.add(rows, rank),
            }
        }
        shape
    }
}
