//! How much is measured.

/// The lattice, the passes over it, and the batches that are held out.
#[derive(Clone, Debug, PartialEq)]
pub struct Effort {
    /// √(d·k) of the layers that are timed; rising, as are the others. No multiples of 1024: rows of so many numbers lie in the same lines
    /// of a processor's cache, and layers between the points are not like that.
    pub(super) extents: &'static [u32],
    /// The same of layers of which GEMMs alone are timed, with those of `extents` among them: every price has one, and what a MAC of a few
    /// rows takes differs by a third from one extent to the next.
    pub(super) gemm_extents: &'static [u32],
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
    /// No pass is begun after so many seconds.
    pub(super) seconds: f64,
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
        extents: &[576, 1248, 2784, 6112],
        gemm_extents: &[576, 832, 1248, 1856, 2784, 4128, 6112],
        gemm_rows: &[1, 2, 4, 8, 16, 32, 64, 128, 256, 512, 1024, 4096],
        rows: &[1, 4, 16, 64, 256],
        ranks: &[1, 4, 16, 64],
        adapters: &[1, 4, 16, 64],
        passes: 5,
        seconds: 125.0,
        longest_call: 0.08,
        held_out: 32,
        blueprints: true,
    };
    /// Under a minute on a host.
    pub const QUICK: Self = Self {
        extents: &[576, 2016],
        gemm_extents: &[576, 1088, 2016],
        gemm_rows: &[1, 4, 16, 64, 256, 1024, 4096],
        rows: &[1, 4, 16, 64],
        ranks: &[1, 8, 64],
        adapters: &[1, 4, 16],
        passes: 3,
        seconds: 30.0,
        longest_call: 0.03,
        held_out: 12,
        blueprints: true,
    };
    /// About a second; where a command needs coefficients and none were saved.
    pub const LEAST: Self = Self {
        extents: &[512],
        gemm_extents: &[512],
        gemm_rows: &[1, 4, 16, 64, 512],
        rows: &[1, 16, 128],
        ranks: &[1, 16],
        adapters: &[4],
        passes: 3,
        seconds: 1.0,
        longest_call: 0.01,
        held_out: 0,
        blueprints: false,
    };
}
