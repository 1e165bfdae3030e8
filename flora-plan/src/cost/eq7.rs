//! Eq. 7: when fLoRA by `stacked` is cheaper than LoRA by `bmm`.

use serde::Serialize;

use crate::layer::LayerShape;

/// Eq. 7 for one layer and rank, generalised to d ≠ k.
#[derive(Clone, Copy, Debug, PartialEq, Serialize)]
pub struct Eq7 {
    /// c1·(d+k)/(c2·d·k) + 1/r, which is 2c1/(d·c2) + 1/r for d = k.
    pub left: f64,
    /// left ≥ 1: fLoRA is the cheaper.
    pub flora_is_cheaper: bool,
    /// The rank up to which fLoRA is the cheaper, 1/(1 − c1·(d+k)/(c2·d·k)); `None` when it is at every rank.
    pub critical_rank: Option<f64>,
}

/// Evaluates Eq. 7. c1 and c2 in seconds per MAC.
pub fn eq7(shape: LayerShape, rank: u64, c1: f64, c2: f64) -> Eq7 {
    let (d, k) = (f64::from(shape.d), f64::from(shape.k));
    let overhead = c1 * (d + k) / (c2 * d * k);
    let left = overhead + 1.0 / rank as f64;
    Eq7 { left, flora_is_cheaper: left >= 1.0, critical_rank: (overhead < 1.0).then(|| 1.0 / (1.0 - overhead)) }
}
