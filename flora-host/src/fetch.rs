//! Memory that is needed soon is asked for early, so that less time is spent waiting for it. What is fetched changes no number, and
//! on processors that the standard library has no such instruction for, nothing is fetched.

/// Bytes of a cache line.
const LINE: usize = 64;

/// Cache lines that are asked for while something else is computed, some at every turn.
pub(crate) struct Ahead<'a> {
    bytes: &'a [u8],
    per_turn: usize,
}

impl<'a> Ahead<'a> {
    /// All of `bytes` within so many turns.
    pub(crate) fn new(bytes: &'a [u8], turns: usize) -> Self {
        Self { bytes, per_turn: bytes.len().div_ceil(LINE * turns.max(1)) * LINE }
    }

    /// The next lines, into the second-level cache.
    #[inline(always)]
    pub(crate) fn fetch(&mut self) {
        let (lines, rest) = self.bytes.split_at(self.per_turn.min(self.bytes.len()));
        self.bytes = rest;
        #[cfg(target_arch = "x86_64")]
        for line in lines.chunks(LINE) {
            use std::arch::x86_64::{_MM_HINT_T1, _mm_prefetch};
            // SAFETY: the instruction reads and writes nothing.
            unsafe { _mm_prefetch::<_MM_HINT_T1>(line.as_ptr().cast()) };
        }
        #[cfg(not(target_arch = "x86_64"))]
        let _ = lines;
    }
}

/// Asks for the line at an address, which may be none, into the first-level cache.
#[inline(always)]
pub(crate) fn fetch_near(at: *const f32) {
    #[cfg(target_arch = "x86_64")]
    {
        use std::arch::x86_64::{_MM_HINT_T0, _mm_prefetch};
        // SAFETY: the instruction reads and writes nothing, and an address that isn't mapped is no fault.
        unsafe { _mm_prefetch::<_MM_HINT_T0>(at.cast()) };
    }
    #[cfg(not(target_arch = "x86_64"))]
    let _ = at;
}
