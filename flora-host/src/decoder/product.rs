//! Products number by number, of a gated feed-forward network.

use pulp::{Simd, WithSimd};
use rayon::prelude::*;

use crate::HostEngine;
use crate::decoder::error::OperationError;
use crate::partition::PARALLEL_MACS;
use crate::values::{Sink, Values, ValuesMut};
use crate::vectorise::vectorised;

/// Numbers that are multiplied at a time: what two operands and the result have of them stays in the first-level cache.
const CHUNK: usize = 2048;

impl HostEngine {
    /// one ∘ other
    ///
    /// # Errors
    /// Operands of other lengths; nothing is written then.
    pub fn multiply(&self, one: Values<'_>, other: Values<'_>, mut out: ValuesMut<'_>) -> Result<(), OperationError> {
        OperationError::length("a product's second operand", other.len(), one.len())?;
        OperationError::length("a product", out.len(), one.len())?;
        self.arch().dispatch(Product { one, other, sink: Sink::new(&mut out) });
        Ok(())
    }
}

/// Operands that have been checked.
struct Product<'a> {
    one: Values<'a>,
    other: Values<'a>,
    sink: Sink,
}

impl WithSimd for Product<'_> {
    type Output = ();

    fn with_simd<S: Simd>(self, simd: S) {
        let Self { one, other, sink } = self;
        let chunk = |at: usize| {
            let first = at * CHUNK;
            let length = CHUNK.min(one.len() - first);
            let (mut product, mut factor) = ([0.0; CHUNK], [0.0; CHUNK]);
            let (product, factor) = (&mut product[..length], &mut factor[..length]);
            vectorised(
                simd,
                #[inline(always)]
                || {
                    one.widen(first, product);
                    other.widen(first, factor);
                    product.iter_mut().zip(&*factor).for_each(|(product, factor)| *product *= factor);
                },
            );
            // SAFETY: the output outlives the chunks, which don't overlap.
            unsafe { sink.write(simd, first, product) };
        };
        let chunks = one.len().div_ceil(CHUNK);
        if (one.len() as u64) < PARALLEL_MACS {
            (0..chunks).for_each(chunk);
        } else {
            (0..chunks).into_par_iter().for_each(chunk);
        }
    }
}
