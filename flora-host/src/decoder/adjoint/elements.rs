//! Operations number by number, cut into chunks for all threads.

use pulp::{Simd, WithSimd};
use rayon::prelude::*;

use crate::HostEngine;
use crate::decoder::error::OperationError;
use crate::vectorise::vectorised;

/// Numbers that a task has: two operands stay in the first-level cache.
const CHUNK: usize = 2048;

/// Numbers from which threads share them: those of some tens of rows. Each takes far more than a product does, most of it waiting for
/// memory.
pub(super) const PARALLEL_NUMBERS: usize = 1 << 15;

impl HostEngine {
    /// sum += term
    ///
    /// # Errors
    /// Operands of other lengths; nothing is written then.
    pub fn add(&self, sum: &mut [f32], term: &[f32]) -> Result<(), OperationError> {
        OperationError::length("a sum's second operand", term.len(), sum.len())?;
        self.elements(
            sum,
            term,
            #[inline(always)]
            |sum, term| sum.iter_mut().zip(term).for_each(|(sum, term)| *sum += term),
        );
        Ok(())
    }

    /// Does `work` for pieces of two slices of one length: what it makes of a number depends on the two at its place alone.
    pub(super) fn elements(&self, out: &mut [f32], read: &[f32], work: impl Fn(&mut [f32], &[f32]) + Sync) {
        self.arch().dispatch(Chunks { out, read, work });
    }
}

struct Chunks<'a, W> {
    out: &'a mut [f32],
    read: &'a [f32],
    work: W,
}

impl<W: Fn(&mut [f32], &[f32]) + Sync> WithSimd for Chunks<'_, W> {
    type Output = ();

    fn with_simd<S: Simd>(self, simd: S) {
        let Self { out, read, work } = self;
        let chunk = |(out, read): (&mut [f32], &[f32])| {
            vectorised(
                simd,
                #[inline(always)]
                || work(out, read),
            );
        };
        if out.len() < PARALLEL_NUMBERS {
            chunk((out, read));
        } else {
            out.par_chunks_mut(CHUNK).zip(read.par_chunks(CHUNK)).for_each(chunk);
        }
    }
}
