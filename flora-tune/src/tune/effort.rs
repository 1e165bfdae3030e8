//! How much is measured.

/// The lattice, the passes over it, and the batches that are held out.
#[derive(Clone, Debug, PartialEq)]
pub struct Effort {
    /// √(d·k) of the layers that are timed; rising, as are the others.
    pub(super) extents: &'static [u32],
    /// Rows of a GEMM, and virtual rows.
    pub(super) gemm_rows: &'static [u32],
    /// Rows of an adapter.
    pub(super) rows: &'static [u32],
    /// Ranks.
    pub(super) ranks: &'static [u32],
    /// Distinct adapters.
    pub(super) adapters: &'static [u32],
    /// Measurements of every point, after one that says how long it takes.
    pub(super) passes: usize,
    /// Points that take longer than so many seconds a call are left out, and have a neighbour's value.
    pub(super) longest_call: f64,
    /// Batches that are held out.
    pub(super) held_out: usize,
    /// Whether tiles and the like are compared.
    pub(super) blueprints: bool,
}

/// No batch of more rows is timed: where there are so many, a MAC takes what it takes with fewer.
pub(super) const MOST_ROWS: u32 = 1024;
/// No pool of more vectors is made.
pub(super) const MOST_SLOTS: u32 = 4096;

impl Effort {
    /// Up to three minutes on a host.
    pub const FULL: Self = Self {
        extents: &[576, 1152, 2048, 6144],
        gemm_rows: &[1, 2, 4, 8, 16, 32, 64, 128, 256, 512, 1024],
        rows: &[1, 4, 16, 64, 256],
        ranks: &[1, 4, 16, 64],
        adapters: &[1, 4, 16, 64],
        passes: 5,
        longest_call: 0.08,
        held_out: 32,
        blueprints: true,
    };
    /// Under a minute on a host.
    pub const QUICK: Self = Self {
        extents: &[576, 2048],
        gemm_rows: &[1, 4, 16, 64, 256, 1024],
        rows: &[1, 4, 16, 64],
        ranks: &[1, 8, 64],
        adapters: &[1, 4, 16],
        passes: 3,
        longest_call: 0.03,
        held_out: 12,
        blueprints: true,
    };
    /// About a second; where a command needs coefficients and none were saved.
    pub const LEAST: Self = Self {
        extents: &[512],
        gemm_rows: &[1, 16, 128],
        rows: &[1, 16, 128],
        ranks: &[1, 16],
        adapters: &[4],
        passes: 3,
        longest_call: 0.01,
        held_out: 0,
        blueprints: false,
    };
}
