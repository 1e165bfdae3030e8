//! The cost model (paper §3.2): cost = launches·c0 + Σ max(MACs·c, bytes·c_bw), with coefficients measured on the device.
//!
//! [`work`] says what a plan does to a batch, [`Coefficients`] what the device takes for it, [`LayerPrices`] brings both together
//! for one layer, quickly enough to be asked for every batch.

mod coefficients;
mod eq7;
mod gradients;
mod prices;
mod surface;
mod work;

use arrayvec::ArrayVec;
pub use coefficients::{Coefficients, CoefficientsError, DeviceCoefficients, FitError, SCHEMA};
pub use eq7::{Eq7, eq7};
pub use gradients::{GradientKernel, GradientTerm, OuterIsCheaper, gradient_work, outer_is_cheaper};
pub use prices::LayerPrices;
use serde::{Deserialize, Serialize};
pub use surface::{Place, Regime, Surface};
pub(crate) use work::Parts;
pub use work::work;

use crate::layer::{LayerFormat, LayerShape};

/// What a term of work runs on; each has its own seconds per MAC, as a function of its [`Regime`].
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash, PartialOrd, Ord, Serialize, Deserialize)]
#[serde(rename_all = "snake_case")]
pub enum Kernel {
    /// The base GEMM: the paper's c2. Regime: rows.
    Matmul,
    /// The GEMM over virtual rows. Regime: virtual rows.
    Stacked,
    /// The GEMM whose tiles of W_i are made where they are multiplied; making a value of W_i counts a MAC for each virtual row.
    OnChip,
    /// W_i made in global memory, counted likewise, and a matmul with it.
    Bmm,
    /// Shrink and expand inside the base GEMM: what they add to it.
    Fused,
    /// Batched matmuls with low-rank factors, padded, with the gathers that they need: the paper's c1.
    LowRankBmm,
    /// Shrink and expand by segment.
    Segmented,
    /// The GEMM with a resident W_i, which is kept in the type of the activations: as `matmul` of a layer whose weight is. Regime: rows.
    Merged,
    /// What only moves numbers, such as an epilogue by itself: bytes alone.
    Move,
}

impl Kernel {
    /// Every kernel with seconds per MAC, with its name in files and reports.
    pub const TIMED: [(&'static str, Self); 7] = [
        ("matmul", Kernel::Matmul),
        ("stacked", Kernel::Stacked),
        ("on_chip", Kernel::OnChip),
        ("bmm", Kernel::Bmm),
        ("fused", Kernel::Fused),
        ("low_rank_bmm", Kernel::LowRankBmm),
        ("segmented", Kernel::Segmented),
    ];

    /// The name in files and reports.
    pub fn name(self) -> &'static str {
        let untimed = if self == Kernel::Merged { "merged" } else { "move" };
        Self::TIMED.iter().find(|(_, kernel)| *kernel == self).map_or(untimed, |(name, _)| name)
    }

    /// Whether it multiplies rows whatever their adapters are, so that its regime is a number of rows.
    pub fn is_gemm(self) -> bool {
        matches!(self, Kernel::Matmul | Kernel::Stacked)
    }
}

/// A layer as far as its cost goes.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
pub struct PricedLayer {
    /// Extents.
    pub shape: LayerShape,
    /// Types.
    pub format: LayerFormat,
}

impl PricedLayer {
    /// √(d·k)
    pub fn extent(self) -> f64 {
        (f64::from(self.shape.d) * f64::from(self.shape.k)).sqrt()
    }
}

/// One term of a lowering's work.
#[derive(Clone, Copy, Debug, PartialEq)]
pub struct Term {
    /// What runs it.
    pub kernel: Kernel,
    /// The point of the kernel's surface.
    pub regime: Regime,
    /// Multiply-accumulates.
    pub macs: u64,
    /// Bytes of global memory.
    pub bytes: u64,
}

/// The most terms of a plan: a GEMM, tiles of W_i, a low-rank sum, an epilogue by itself, a resident W_i.
const MOST_TERMS: usize = 5;

/// The work of a plan on a batch.
#[derive(Clone, Debug, Default, PartialEq)]
pub struct Work {
    /// Kernel launches.
    pub launches: u64,
    /// What they do.
    pub terms: ArrayVec<Term, MOST_TERMS>,
}

impl Work {
    /// Multiply-accumulates in all.
    pub fn macs(&self) -> u64 {
        self.terms.iter().map(|term| term.macs).sum()
    }

    /// Bytes of global memory in all.
    pub fn bytes(&self) -> u64 {
        self.terms.iter().map(|term| term.bytes).sum()
    }
}
