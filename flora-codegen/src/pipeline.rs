//! The whole compiler, top to bottom: each pass takes what the one before it returned.
//!
//! ```text
//! Layer ──verify──▶ VerifiedLayer ──normalize──▶ AdaptedLinear ──parts──▶ [Lowering]      once a layer
//! segments ──shape──▶ BatchShape ──plan──▶ Plan ──schedule──▶ Schedule ──launch | emit    once a batch
//! ```

use flora_ir::algebra::{AdaptedLinear, Core, Derivation, NormalizeError, Normalized, normalize};
use flora_ir::{Activation, Layer, Shape, VerifiedLayer, verify};

use crate::batch::{AdapterSlots, BatchShape, LayerShape, LowRankSlots, Segment, VirtualRowSlots};
use crate::cost::Coefficients;
use crate::kernels::Epilogue;
use crate::lowering::{Part, parts_of};
use crate::plan::{Plan, plan};
use crate::schedule::{Schedule, ScheduleError, schedule};
use crate::target::{EmitError, EmittedKernel, Emission, Target, emit};

/// A layer that is ready to be planned.
#[derive(Clone, Debug)]
pub struct CompiledLayer {
    /// As its author wrote it; what the oracle evaluates.
    pub written: VerifiedLayer,
    /// The normal form.
    pub linear: AdaptedLinear,
    /// How it came about.
    pub derivation: Derivation,
    /// The parts that need a lowering; none for a plain linear.
    pub parts: Vec<Part>,
}

/// Why a layer doesn't compile.
#[derive(Clone, Debug, thiserror::Error)]
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
    let Normalized { linear, derivation } = normalize(&written)?;
    let parts = parts_of(&linear);
    Ok(CompiledLayer { written, linear, derivation, parts })
}

/// Plans and lays out one batch.
///
/// # Errors
/// A segment of an unknown adapter; a buffer too large to index.
pub fn prepare(
    shape: LayerShape,
    segments: &[Segment],
    adapters: &[AdapterSlots],
    epilogue: Epilogue,
    coefficients: &Coefficients,
) -> Result<(Plan, Schedule), ScheduleError> {
    let batch = BatchShape::of(segments, adapters);
    let plan = plan(shape, &batch, coefficients);
    let schedule = schedule(&plan, shape, segments, adapters, !epilogue.is_identity())?;
    Ok((plan, schedule))
}

impl CompiledLayer {
    /// What the layer applies to the sum of its terms.
    pub fn epilogue(&self) -> Epilogue {
        Epilogue { bias: self.linear.bias.is_some(), activation: self.linear.activation }
    }

    /// φ
    pub fn activation(&self) -> Activation {
        self.linear.activation
    }

    /// Slots as an adapter of this form and rank takes them, counted from `first` in both pools.
    pub fn slots(&self, rank: u32, first: u32) -> AdapterSlots {
        let mut next = first;
        let mut take = |count: u32| {
            next += count;
            next - count
        };
        let is_vector = |node| !matches!(self.linear.layer.type_of(node).shape, Shape::Scalar);
        let mut virtual_rows = Vec::new();
        let mut low_rank = LowRankSlots::default();
        for term in &self.linear.terms {
            match term.core {
                Core::Base => {
                    let in_scale = term.inner.is_some_and(is_vector).then(|| take(1));
                    let out_scale = (term.outer.is_some() || term.inner.is_some() && in_scale.is_none()).then(|| take(1));
                    virtual_rows.push(VirtualRowSlots { in_scale, out_scale });
                }
                Core::Multiplicative { .. } => virtual_rows.extend((0..rank).map(|_| {
                    let slot = take(1);
                    VirtualRowSlots { in_scale: Some(slot), out_scale: Some(slot) }
                })),
                Core::Additive { .. } => {
                    let slot = take(rank);
                    low_rank = LowRankSlots { shrink: slot, expand: slot, rank };
                }
            }
        }
        AdapterSlots { virtual_rows, low_rank }
    }

    /// The launches that `plan` makes on `target` for a batch of `segments` segments of `rows` rows, every one with an adapter
    /// of its own of rank `rank`.
    ///
    /// # Errors
    /// Whatever keeps the batch from being launched there.
    pub fn emit(
        &self,
        target: Target,
        plan: Plan,
        shape: LayerShape,
        rank: u32,
        segments: u32,
        rows: u32,
    ) -> Result<Vec<EmittedKernel>, EmitError> {
        let stride = self.slots(rank, 0);
        let stride = stride.in_slots().max(stride.out_slots());
        let adapters: Vec<_> = (0..segments).map(|adapter| self.slots(rank, adapter * stride)).collect();
        let segments: Vec<_> = (0..segments).map(|adapter| Segment { rows, adapter }).collect();
        let emission =
            Emission { shape, epilogue: self.epilogue(), plan, segments: &segments, adapters: &adapters };
        emit(target, &emission)
    }
}
