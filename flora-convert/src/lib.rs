//! A trained LoRA adapter as one that multiplies the base weight: fLoRA's x @ (w0 ∘ (b a)) or HiRA's x @ (w0 + w0 ∘ (b a)).
//!
//! No product of low rank times w0 is near a low-rank update, weight by weight. What a layer's inputs x let through is less than all
//! weights, so the fit is of outputs: with an update U `[d, k]`, and C = xᵀx of the inputs,
//!
//! ```text
//! min over b, a of ‖x (T − w0 ∘ (b a))‖² = tr (T − w0 ∘ (b a))ᵀ C (T − w0 ∘ (b a)),   T = U for HiRA, w0 + U for fLoRA
//! ```
//!
//! With b given this is a least-squares problem of r numbers for each output, and with a given one of d · r numbers. [`fit`] solves
//! them in turn, in f64. [`Gram`] is C, and says how many directions the inputs have.

mod als;
mod gram;

pub use als::{Fit, FitError, Kind, Limits, Problem, fit, residual};
pub use gram::{Gram, GramError, Spectrum};
