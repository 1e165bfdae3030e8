//! The legal ways to compute the gradients of an adapter's scales, as one table, and which of them is taken.
//!
//! With G = xᵀ g over the adapter's rows, the gradients of the scales of virtual row v are
//!
//! ```text
//! out_v: Σ_rows g ∘ ((in_v ∘ x) @ w0)   = (G ∘ w0)ᵀ in_v
//! in_v:  Σ_rows x ∘ ((out_v ∘ g) @ w0ᵀ) = (G ∘ w0) out_v
//! ```
//!
//! The left forms are products of the adapter's stacked rows, the right ones make a tile of G ∘ w0 once for all of its scales.

/// How the gradients of an adapter's scales are computed.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
pub enum GradientLowering {
    /// By row reductions of stacked products.
    Reduced,
    /// By tiles of G ∘ w0, which is never whole in memory.
    Outer,
}

/// A row of the table.
#[derive(Clone, Copy, Debug)]
pub struct Row {
    /// The lowering.
    pub lowering: GradientLowering,
    /// The name in reports.
    pub name: &'static str,
    /// One line for people.
    pub summary: &'static str,
    /// Multiply-adds for each number of w0, for so many rows and scales of an adapter.
    pub macs: fn(rows: u64, scales: u64) -> u64,
}

/// Every lowering. Of two that cost the same, the first is taken.
pub const TABLE: [Row; 2] = [
    Row {
        lowering: GradientLowering::Reduced,
        name: "reduced",
        summary: "a product with w0 or its transposed for each row and scale, and sums over the rows",
        macs: |rows, scales| rows.saturating_mul(scales),
    },
    Row {
        lowering: GradientLowering::Outer,
        name: "outer",
        summary: "tiles of xᵀ g ∘ w0, each multiplied by the vectors of all scales while it is in cache",
        // G, its product with w0, and each scale's.
        macs: |rows, scales| rows.saturating_add(1).saturating_add(scales),
    },
];

impl GradientLowering {
    /// That of the fewest multiply-adds for so many rows and scales of one adapter;
    /// [`LayerPrices::gradient_lowering`](crate::cost::LayerPrices::gradient_lowering) goes by measured prices. Nothing else in the batch has a say, so that an adapter's gradients
    /// have the same bits in any company.
    pub fn cheapest(rows: u64, scales: u64) -> Self {
        let [reduced, outer] = &TABLE;
        let is_reduced = (reduced.macs)(rows, scales) <= (outer.macs)(rows, scales);
        if is_reduced { Self::Reduced } else { Self::Outer }
    }

    /// Its row of the table.
    pub fn row(self) -> &'static Row {
        match self {
            Self::Reduced => &TABLE[0],
            Self::Outer => &TABLE[1],
        }
    }
}

impl std::fmt::Display for GradientLowering {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.pad(self.row().name)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn every_lowering_has_its_row() {
        for row in &TABLE {
            assert_eq!(row.lowering.row().name, row.name);
            assert_eq!(row.lowering.row().lowering, row.lowering);
        }
    }

    #[test]
    fn a_scale_alone_and_a_row_alone_are_reduced() {
        assert_eq!(GradientLowering::cheapest(1000, 1), GradientLowering::Reduced);
        assert_eq!(GradientLowering::cheapest(1, 64), GradientLowering::Reduced);
        assert_eq!(GradientLowering::cheapest(3, 2), GradientLowering::Reduced);
        assert_eq!(GradientLowering::cheapest(4, 2), GradientLowering::Outer);
        assert_eq!(GradientLowering::cheapest(128, 32), GradientLowering::Outer);
    }
}
