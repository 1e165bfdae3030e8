//! How work is cut into tasks: panels of columns, blocks of rows, and parts of equal size.

use std::ops::Range;

use rayon::prelude::*;

use crate::layout::STRIP;

/// The most columns of a panel. Rows of x are packed once for every panel, so that fewer would be slower; more would leave two
/// threads without a panel to take over where one of them is held up (a tenth to a sixth of the time at 256 rows beside another
/// program, and a hundredth gained without).
pub(crate) const PANEL_COLUMNS: usize = 512;

/// The same for the matrix unit, whose rows are mostly not packed, and which one processor may have to itself while another waits.
pub(crate) const UNIT_PANEL_COLUMNS: usize = 192;

/// The same for rows in 8 bits: it takes longer to round them than to pack them, and less to multiply them.
pub(crate) const BYTE_PANEL_COLUMNS: usize = 1024;

/// Fewer multiply-adds than this are done before other threads would have woken up.
pub(crate) const PARALLEL_MACS: u64 = 1 << 18;

/// Does `work` for every panel of `k` columns, at most `most` of them, and each of so many blocks of rows, on all threads where
/// there is enough to do.
pub(crate) fn panels((k, most): (usize, usize), blocks: usize, macs: u64, work: impl Fn(Range<usize>, usize) + Sync) {
    // Whole strips, and as many panels for every thread as for the others, whatever the blocks cost.
    let count = k.div_ceil(most).next_multiple_of(rayon::current_num_threads());
    let panel = k.div_ceil(count).max(1).next_multiple_of(STRIP);
    let task = |at: usize| {
        let (panel_at, block) = (at / blocks, at % blocks);
        work(panel_at * panel..((panel_at + 1) * panel).min(k), block);
    };
    let tasks = k.div_ceil(panel) * blocks;
    if macs < PARALLEL_MACS {
        (0..tasks).for_each(task);
    } else {
        (0..tasks).into_par_iter().with_max_len(1).for_each(task);
    }
}

/// The rows of a block, or up to half as many more: a few rows in a block of their own would have all of W0 read, and weights of
/// their segment made, for them alone.
const BLOCK_ROWS: usize = 256;

/// How many blocks so many rows are.
pub(crate) fn blocks(rows: usize) -> usize {
    ((rows + BLOCK_ROWS / 2) / BLOCK_ROWS).max(1)
}

/// Part `at` of `parts`.
pub(crate) fn even_part(count: usize, parts: usize, at: usize) -> Range<usize> {
    at * count / parts..(at + 1) * count / parts
}

/// Ranges of at most `most` that differ in length by one at most.
pub(crate) fn even_tiles(count: usize, most: usize) -> impl Iterator<Item = Range<usize>> {
    let parts = count.div_ceil(most);
    (0..parts).map(move |at| even_part(count, parts, at))
}
