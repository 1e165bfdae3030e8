//! The gradients of an equation, derived from it: reverse mode over the same graph, by a table with a row for each operation.
//!
//! With dy the gradient of the output, g = φ'(s) ∘ dy that of the sum before φ, and G = xᵀ g over the rows of one segment:
//!
//! | of | is |
//! |---|---|
//! | x | Σ_v in_v ∘ ((out_v ∘ g) @ w0ᵀ) + Σ_q (g · expand_q) shrink_q: the [`adjoint`](NormalForm::adjoint) normal form |
//! | out_v, in_v | Σ_rows g ∘ ((in_v ∘ x) @ w0), Σ_rows x ∘ ((out_v ∘ g) @ w0ᵀ): a [`FoldedGradient`] |
//! | expand_q, shrink_q | (x · shrink_q)ᵀ g, xᵀ (g · expand_q) |
//! | an adapter's operands | what [`Unfolding`] makes of those, or at once as equations: [`differentiate`] |
//! | bias, residual | Σ_rows g, dy |
//!
//! A multiplicative pair's own gradients are (G ∘ w0) aᵀ and bᵀ (G ∘ w0), which is what [`differentiate`] finds in Eq. 2, and
//! equals what the virtual rows of Eq. 5 give by row reductions. A norm is a constant of the backward pass, as in PEFT's DoRA.
//!
//! ```text
//! NormalForm    ──adjoint──────▶ NormalForm over w0ᵀ          what gives dx                 once a layer
//! VerifiedLayer ──differentiate─▶ Gradient                     equations, for people and the oracle
//! NormalForm    ──unfolding────▶ Unfolding                    what gives the operands'      once a layer
//! FoldedGradient ──unfold──────▶ an adapter's gradients                                     once a step
//! ```

mod adjoint;
mod differentiate;
mod folded;
mod graph;
mod operands;
mod reverse;
mod rules;
mod unfold;

pub use differentiate::{Gradient, differentiate};
pub use folded::{FoldedGradient, LinearGradient, RankOneGradient, VirtualRowGradient};
pub use rules::{GradientRule, rules};
pub use unfold::Unfolding;

#[cfg(doc)]
use crate::algebra::NormalForm;
