//! The whole compiler, top to bottom: each pass takes what the one before it returned.
//!
//! ```text
//! Layer ──verify──▶ VerifiedLayer ──normalize──▶ NormalForm ──parts──▶ [Lowering]      once a layer
//! NormalForm ──adjoint──▶ VerifiedLayer over w0ᵀ ──normalize──▶ as above, for dx        once a layer
//!            ──unfolding──▶ Unfolding ◀── gradients of folded vectors, for the adapter  once a step
//! segments ──shape──▶ BatchShape ──plan──▶ Plan ──schedule──▶ Schedule                    once a batch
//! ```

use flora_ir::algebra::{Derivation, NormalForm, NormalizeError, Normalized, normalize};
use flora_ir::gradient::{Gradient, Unfolding, differentiate};
use flora_ir::{Activation, ElementType, Layer, Role, VerifiedLayer, verify};

use crate::batch::AdapterSlots;
use crate::layer::{Element, Epilogue, LayerFormat, WeightFormat};
use crate::lowering::{Part, parts_of};

/// A layer that is ready to be planned.
#[derive(Clone, Debug)]
pub struct CompiledLayer {
    /// As its author wrote it; what the oracle evaluates.
    pub written: VerifiedLayer,
    /// The normal form.
    pub linear: NormalForm,
    /// How it came about.
    pub derivation: Derivation,
    /// The parts that need a lowering; none for a plain linear.
    pub parts: Vec<Part>,
}

/// Why a layer doesn't compile.
#[derive(Clone, Debug, thiserror::Error)]
#[non_exhaustive]
pub enum CompileError {
    /// Mistakes in the equation, all of them.
    #[error("{}", .0.iter().map(|mistake| format!("{} ({})", mistake.message, mistake.help)).collect::<Vec<_>>().join("; "))]
    Mistakes(Vec<flora_ir::Diagnostic>),
    /// An equation that has no normal form.
    #[error(transparent)]
    NoNormalForm(#[from] NormalizeError),
}

/// Verifies and compiles an equation.
///
/// # Errors
/// Mistakes, or a term that keeps the equation from its normal form.
pub fn compile(layer: Layer) -> Result<CompiledLayer, CompileError> {
    Ok(compile_verified(verify(layer).map_err(CompileError::Mistakes)?)?)
}

/// Compiles an equation that was verified before, as the macro's are.
///
/// # Errors
/// A term that keeps the equation from its normal form.
pub fn compile_verified(written: VerifiedLayer) -> Result<CompiledLayer, NormalizeError> {
    let normalized = normalize(&written)?;
    Ok(with_parts(written, normalized))
}

fn with_parts(written: VerifiedLayer, Normalized { linear, derivation }: Normalized) -> CompiledLayer {
    let parts = parts_of(&linear);
    CompiledLayer { written, linear, derivation, parts }
}

/// What a compiled layer's backward pass is made of.
#[derive(Clone, Debug)]
pub struct CompiledGradient {
    /// What gives dx, from g, the gradient of the sum before bias, activation and residual: a layer over w0ᵀ, `[k, d]`. It is planned
    /// and run like any other, by the same kernels.
    pub adjoint: CompiledLayer,
    /// What makes the gradients of an adapter's operands of those of its folded vectors.
    pub unfolding: Unfolding,
    /// The gradients of all operands as equations, from that of the output: of the layer as it was written, where a multiplicative
    /// pair's are (xᵀ g ∘ w0) aᵀ and bᵀ (xᵀ g ∘ w0). What the oracle evaluates.
    pub written: Gradient,
    /// The same of the normal form, where they are sums over rows of what virtual rows and low-rank pairs give.
    pub normal: Gradient,
}

impl CompiledLayer {
    /// The backward pass, derived from the equation.
    ///
    /// # Errors
    /// A layer whose adjoint is beyond the verifier's limits.
    pub fn gradient(&self) -> Result<CompiledGradient, NormalizeError> {
        let adjoint = self.linear.adjoint()?;
        let adjoint = with_parts(adjoint.derivation.start.clone(), adjoint);
        let (written, normal) = (differentiate(&self.written), differentiate(&self.linear.layer));
        Ok(CompiledGradient { adjoint, unfolding: self.linear.unfolding(), written, normal })
    }

    /// What the layer applies to the sum of its terms.
    pub fn epilogue(&self) -> Epilogue {
        self.linear.epilogue()
    }

    /// φ
    pub fn activation(&self) -> Activation {
        self.linear.activation
    }

    /// The types that the equation gives its operands, f32 where it names none: those of x, of w0, and of the adapter's tensors,
    /// which are kept in one type that holds all of theirs.
    pub fn format(&self) -> LayerFormat {
        let of = |role: Role| {
            let operands = self.written.layer().operands.iter().map(|(_, operand)| operand);
            let elements = operands.filter(move |operand| operand.role == role).map(|operand| operand.ty.element);
            Element::of(elements.reduce(ElementType::join).unwrap_or(ElementType::F32))
        };
        LayerFormat {
            activations: of(Role::Input),
            adapters: of(Role::Adapter),
            weight: WeightFormat::Float(of(Role::BaseWeight)),
            fragments: true,
        }
    }

    /// Slots as an adapter of this form and rank takes them, counted from `first` in both pools: what
    /// [`NormalForm::fold`] makes of it.
    pub fn slots(&self, rank: u32, first: u32) -> AdapterSlots {
        AdapterSlots::of(&self.linear.layout(rank as usize), first)
    }
}
