//! Memory that is needed soon is asked for early, so that less time is spent waiting for it. What is fetched changes no number, and
//! on processors that the standard library has no such instruction for, nothing is fetched.

use std::ops::Range;

/// Bytes of a cache line.
const LINE: usize = 64;

/// Memory that will be needed: pieces of one length, equally far apart.
#[derive(Clone, Copy, Default)]
pub(crate) struct Pieces<'a> {
    /// From the first piece to the end of the last one.
    bytes: &'a [u8],
    /// Lines of a piece.
    lines: usize,
    /// Bytes from one piece to the next.
    pitch: usize,
    /// Which lines, counted over all pieces.
    first: usize,
    end: usize,
}

impl<'a> Pieces<'a> {
    /// So many pieces of `len` bytes.
    pub(crate) fn new(bytes: &'a [u8], count: usize, len: usize, pitch: usize) -> Self {
        let lines = len.div_ceil(LINE);
        Self { bytes, lines, pitch, first: 0, end: count * lines }
    }

    /// Where the first line lies, and how many follow one another from it on.
    #[cfg_attr(not(all(target_arch = "x86_64", target_os = "linux")), expect(dead_code))]
    pub(crate) fn run(self) -> (*const u8, usize) {
        let Self { bytes, lines, pitch, first, end } = self;
        let Some(piece) = first.checked_div(lines) else { return (bytes.as_ptr(), 0) };
        let line = first % lines;
        (bytes.as_ptr().wrapping_add(piece * pitch + line * LINE), (lines - line).min(end - first))
    }

    /// Part `range` of `parts`.
    pub(crate) fn part(self, range: &Range<usize>, parts: usize) -> Self {
        let len = self.end - self.first;
        let at = |part: usize| self.first + len * part / parts.max(1);
        Self { first: at(range.start), end: at(range.end), ..self }
    }
}

/// Cache lines that are asked for while something else is computed, some at every turn.
pub(crate) struct Ahead<'a> {
    pieces: Pieces<'a>,
    /// Where the next line lies, in bytes.
    at: usize,
    /// Lines of its piece from it on.
    in_piece: usize,
    per_turn: usize,
}

impl<'a> Ahead<'a> {
    /// All of `pieces` within so many turns.
    pub(crate) fn new(pieces: Pieces<'a>, turns: usize) -> Self {
        let Pieces { lines, pitch, first, end, .. } = pieces;
        if first == end {
            return Self { pieces, at: 0, in_piece: 0, per_turn: 0 };
        }
        let (piece, line) = (first / lines, first % lines);
        let per_turn = (end - first).div_ceil(turns.max(1));
        Self { pieces, at: piece * pitch + line * LINE, in_piece: lines - line, per_turn }
    }

    /// The next lines, into the second-level cache.
    #[inline(always)]
    pub(crate) fn fetch(&mut self) {
        let Pieces { bytes, lines, pitch, first, end } = self.pieces;
        let next = end.min(first + self.per_turn);
        self.pieces.first = next;
        for _ in first..next {
            #[cfg(target_arch = "x86_64")]
            {
                use std::arch::x86_64::{_MM_HINT_T1, _mm_prefetch};
                // SAFETY: the instruction reads and writes nothing.
                unsafe { _mm_prefetch::<_MM_HINT_T1>(bytes.as_ptr().wrapping_add(self.at).cast()) };
            }
            self.at += LINE;
            self.in_piece -= 1;
            if self.in_piece == 0 {
                self.at = self.at.wrapping_add(pitch).wrapping_sub(lines * LINE);
                self.in_piece = lines;
            }
        }
        #[cfg(not(target_arch = "x86_64"))]
        let _ = bytes;
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
