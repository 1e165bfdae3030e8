//! Memory for numbers, on cache lines. A buffer grows to what its largest use needed and is then used again, so that a call
//! allocates nothing once the engine is warm.

use std::fmt;

use bytemuck::{Pod, Zeroable};

/// A cache line: vectors that are loaded from a buffer never straddle two.
#[derive(Clone, Copy, Pod, Zeroable)]
#[repr(C, align(64))]
struct Line([f32; 16]);

/// A buffer of floats on a cache line.
#[derive(Default)]
pub(crate) struct Buffer(Vec<Line>);

impl Buffer {
    /// The first `len` floats, with whatever the last use left in them.
    pub(crate) fn floats(&mut self, len: usize) -> &mut [f32] {
        self.numbers_mut(len)
    }

    /// The first `len` numbers, likewise.
    pub(crate) fn numbers_mut<T: Pod>(&mut self, len: usize) -> &mut [T] {
        let lines = (len * size_of::<T>()).div_ceil(size_of::<Line>());
        if self.0.len() < lines {
            self.0.reserve_exact(lines - self.0.len());
            prefer_large_pages(&self.0);
            self.0.resize(lines, Line::zeroed());
        }
        &mut bytemuck::cast_slice_mut(&mut self.0)[..len]
    }

    /// All there are.
    pub(crate) fn numbers<T: Pod>(&self) -> &[T] {
        bytemuck::cast_slice(&self.0)
    }
}

/// Asks for large pages where they pay: a weight is read through thousands of small ones, each of which has to be looked up. What
/// the system makes of it changes no number.
fn prefer_large_pages(lines: &Vec<Line>) {
    #[cfg(target_os = "linux")]
    {
        const PAGE: usize = 4096;
        const WORTHWHILE: usize = 4 << 20;
        let (first, bytes) = (lines.as_ptr() as usize, lines.capacity() * size_of::<Line>());
        let (start, end) = (first.next_multiple_of(PAGE), (first + bytes) / PAGE * PAGE);
        if bytes >= WORTHWHILE {
            // SAFETY: whole pages within the vector's memory, whose contents the advice leaves alone.
            unsafe { libc::madvise(start as *mut libc::c_void, end - start, libc::MADV_HUGEPAGE) };
        }
    }
    #[cfg(not(target_os = "linux"))]
    let _ = lines;
}

impl fmt::Debug for Buffer {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "{} bytes", size_of_val(self.0.as_slice()))
    }
}
