//! The backward pass of a layer: dx by the adjoint's schedule over the same weight, and the gradients of the adapters' vectors by
//! row reductions ([`reduced`]), tiles of xᵀ g ∘ W0 ([`outer`]) and small products ([`low_rank`]).
//!
//! An adapter's sums go over its own rows in the order of the batch, and over extents in an order that the layer fixes. So its
//! gradients have the same bits in any batch and on any number of threads.

mod low_rank;
mod outer;
mod reduced;

use flora_plan::schedule::{AdapterGradient, BackwardSchedule};
use pulp::{Simd, WithSimd};

use crate::call_memory::CallMemory;
use crate::check::check_backward;
use crate::engine::{HostEngine, Sources};
use crate::error::HostError;
use crate::finish::Finish;
use crate::operands::{Layer, Operands};
use crate::pack::Vectors;
use crate::pool::Pool;
use crate::scratch::Scratch;
use crate::values::{RowsMut, Values, ValuesMut};

/// Where the gradients of a batch are written: what is wanted of them.
#[derive(Debug)]
pub struct GradientsMut<'a> {
    /// dx `[tokens, d]`.
    pub input: Option<ValuesMut<'a>>,
    /// Those of in-vectors `[in_vectors, d]` and of out-vectors `[out_vectors, k]`, in the order of the schedule's adapters.
    pub vectors: Option<[&'a mut [f32]; 2]>,
}

impl HostEngine {
    /// Runs a backward pass for x `[tokens, d]` and g `[tokens, k]`, the gradient of the sum before the epilogue. Sums are f32
    /// whatever the types are, and dx is rounded once.
    ///
    /// # Errors
    /// Operands and schedule that don't belong together; nothing is written then.
    pub fn backward(
        &self,
        operands: &Operands<'_>,
        schedule: &BackwardSchedule,
        x: Values<'_>,
        g: Values<'_>,
        gradients: GradientsMut<'_>,
    ) -> Result<(), HostError> {
        let lengths = gradients.vectors.as_ref().map(|vectors| [vectors[0].len(), vectors[1].len()]);
        let dx = gradients.input.as_ref().map(ValuesMut::len);
        check_backward(operands, schedule, (x.len(), g.len()), (dx, lengths))?;
        self.calls.lend(|memory| {
            let call = Call { engine: self, layer: operands.layer(), schedule, x, g, gradients, memory };
            self.arch().dispatch(call);
        });
        Ok(())
    }
}

/// One backward pass that has been checked.
struct Call<'a> {
    engine: &'a HostEngine,
    layer: Layer<'a>,
    schedule: &'a BackwardSchedule,
    x: Values<'a>,
    g: Values<'a>,
    gradients: GradientsMut<'a>,
    memory: &'a mut CallMemory,
}

/// What the gradients of vectors are made of.
#[derive(Clone, Copy)]
struct Inputs<'a, S> {
    simd: S,
    layer: Layer<'a>,
    /// `[tokens, d]`
    x: Vectors<'a>,
    /// `[tokens, k]`
    g: Vectors<'a>,
    scratches: &'a Pool<Scratch>,
}

impl WithSimd for Call<'_> {
    type Output = ();

    fn with_simd<S: Simd>(self, simd: S) {
        let Call { engine, layer, schedule, x, g, gradients, memory } = self;
        let scratches = &engine.scratches;
        let x = Vectors::dense(x, layer.in_pool.width);
        let g = Vectors::dense(g, layer.out_pool.width);
        if let Some(dx) = gradients.input {
            let (adjoint, finish) = (layer.adjoint(), Finish::default());
            let sources =
                Sources { simd, layer: adjoint, x: g, gates: None, finish, scratches, unit: None, rounds: false };
            sources.run(schedule.input(), RowsMut { values: dx, pitch: layer.in_pool.width }, memory);
        }
        if let Some(vectors) = gradients.vectors {
            let inputs = Inputs { simd, layer, x, g, scratches };
            inputs.vectors(schedule.adapters(), vectors, memory);
        }
    }
}

impl<S: Simd> Inputs<'_, S> {
    /// The gradients of all vectors.
    fn vectors(&self, adapters: &[AdapterGradient], gradients: [&mut [f32]; 2], memory: &mut CallMemory) {
        let [in_gradients, out_gradients] = gradients;
        in_gradients.fill(0.0);
        out_gradients.fill(0.0);
        reduced::out_scales(self, adapters, out_gradients, &mut memory.lent);
        reduced::in_scales(self, adapters, in_gradients, &mut memory.lent);
        outer::scales(self, adapters, (in_gradients, out_gradients), &mut memory.lent.gradient);
        low_rank::expand(self, adapters, out_gradients, &mut memory.lent);
        low_rank::shrink(self, adapters, in_gradients, &mut memory.lent);
    }
}
