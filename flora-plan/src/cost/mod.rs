//! The cost model (paper §3.2): cost = launches·c0 + Σ max(MACs·c, bytes·c_bw), with coefficients measured on the device.

mod coefficients;
mod eq7;
mod work;

pub use coefficients::{Coefficients, CoefficientsError, Curve, SCHEMA};
pub use eq7::{Eq7, eq7};
pub use work::work;

use serde::{Deserialize, Serialize};

/// What a term of work runs on; each has its own seconds per MAC, as a function of how many rows it gets.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash, PartialOrd, Ord, Serialize, Deserialize)]
#[serde(rename_all = "snake_case")]
pub enum Kernel {
    /// The base GEMM: the paper's c2. Regime: rows.
    Matmul,
    /// The GEMM over virtual rows. Regime: virtual rows.
    Stacked,
    /// The GEMM whose tiles of W_i are made where they are multiplied; making a value of W_i counts a MAC for each virtual row.
    /// Regime: rows an adapter.
    OnChip,
    /// Matmul with a dense `[d, k]` an adapter. Regime: rows an adapter.
    Bmm,
    /// Shrink and expand inside the base GEMM. Regime: rows an adapter.
    Fused,
    /// Batched matmuls with low-rank factors, padded: the paper's c1. Regime: rows an adapter.
    LowRankBmm,
    /// Shrink and expand by segment. Regime: rows an adapter.
    Segmented,
    /// Making W_i. One regime.
    Materialise,
    /// What only moves numbers, such as an epilogue by itself: bytes alone.
    Move,
}

/// One term of a lowering's work.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Term {
    /// What runs it.
    pub kernel: Kernel,
    /// The point of the kernel's curve.
    pub regime: u64,
    /// Multiply-accumulates.
    pub macs: u64,
    /// Bytes of global memory.
    pub bytes: u64,
}

/// The work of a lowering on a batch.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct Work {
    /// Kernel launches.
    pub launches: u64,
    /// What they do.
    pub terms: Vec<Term>,
}

impl Work {
    /// Adds a term.
    pub(crate) fn term(&mut self, kernel: Kernel, regime: u64, macs: u64, bytes: u64) {
        self.terms.push(Term { kernel, regime, macs, bytes });
    }

    /// Adds bytes to the last term, if there is one.
    pub(crate) fn add_bytes(&mut self, bytes: u64) {
        if let Some(term) = self.terms.last_mut() {
            term.bytes += bytes;
        }
    }

    /// Seconds on a device with these coefficients.
    pub fn price(&self, coefficients: &Coefficients) -> f64 {
        let terms = self.terms.iter().map(|term| {
            let arithmetic = term.macs as f64 * coefficients.seconds_per_mac(term.kernel, term.regime);
            arithmetic.max(term.bytes as f64 * coefficients.seconds_per_byte)
        });
        self.launches as f64 * coefficients.seconds_per_launch + terms.sum::<f64>()
    }
}
