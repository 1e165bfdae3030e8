//! How packed numbers lie: what the files that pack them and the ones that multiply them have to agree on.

/// Columns of a strip: a tile's on the widest instruction set, and whole tiles' on the others.
pub(crate) const STRIP: usize = 32;

/// The depth that a row's products are summed over before they are scaled and added to its sum. Fixed, because a row's bits depend
/// on it.
pub(crate) const SLICE: usize = 1024;

/// The same of inputs in pairs: as long in memory.
pub(crate) const PAIRED_SLICE: usize = 2 * SLICE;

/// Floats from one row of packed x to the next: not a multiple of the cache's period, so that rows don't evict one another.
pub(crate) const X_PITCH: usize = SLICE + 16;

/// The most pieces that follow one another in a product.
pub(crate) const MOST_PIECES: usize = 64;

/// Numbers of a matrix `[rows, k]` in strips.
pub(crate) fn strips_len(rows: usize, k: usize) -> usize {
    rows * k.next_multiple_of(STRIP)
}
