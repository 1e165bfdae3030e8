//! Plain loops, compiled for the instruction set that was chosen at run time.

use pulp::{Simd, WithSimd};

/// Runs `work` with the instruction set's vectors at the compiler's disposal.
pub(crate) fn vectorised<S: Simd, R>(simd: S, work: impl FnOnce() -> R) -> R {
    struct Work<F>(F);
    impl<F: FnOnce() -> R, R> WithSimd for Work<F> {
        type Output = R;
        #[inline(always)]
        fn with_simd<S: Simd>(self, _: S) -> R {
            (self.0)()
        }
    }
    simd.vectorize(Work(work))
}
