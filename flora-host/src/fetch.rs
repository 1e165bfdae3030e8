//! Memory that is needed soon is asked for early, so that less time is spent waiting for it. What is fetched changes no number, and
//! on processors that the standard library has no such instruction for, nothing is fetched.

/// Bytes of a cache line.
const LINE: usize = 64;

/// Asks for the cache lines that hold `values`, into the second-level cache.
#[inline(always)]
pub(crate) fn fetch<T>(values: &[T]) {
    #[cfg(target_arch = "x86_64")]
    for at in (0..size_of_val(values)).step_by(LINE) {
        use std::arch::x86_64::{_MM_HINT_T1, _mm_prefetch};
        // SAFETY: the address lies in `values`, and the instruction reads and writes nothing.
        unsafe { _mm_prefetch::<_MM_HINT_T1>(values.as_ptr().cast::<i8>().add(at)) };
    }
    #[cfg(not(target_arch = "x86_64"))]
    let _ = (values, LINE);
}
