//! Products of packed pairs with weights that lie in pieces anywhere: keys and values of a cache.

use pulp::Simd;

use crate::kernel::{Operand, accumulate, store, tile_columns, tile_rows, with_rows};
use crate::layout::{MOST_PIECES, STRIP};
use crate::matrix_unit::MatrixUnit;
use crate::products::Pairs;

/// Packed rows times strips of pairs that lie in pieces `[Pairs::STEP, STRIP]` anywhere.
pub(crate) struct PairedProducts<'a> {
    /// Pairs `[rows, steps · Pairs::STEP]`, `x_pitch` apart; for the matrix unit with rows of no matter after them.
    pub(crate) x: &'a [f32],
    pub(crate) x_pitch: usize,
    /// At most a tile's.
    pub(crate) rows: usize,
    pub(crate) strips: usize,
    /// Pieces of a strip, at most [`MOST_PIECES`].
    pub(crate) steps: usize,
    /// `[rows, strips · STRIP]`, `out_pitch` apart; the matrix unit writes up to [`UNIT_ROWS`](crate::matrix_unit::UNIT_ROWS) rows.
    pub(crate) out: &'a mut [f32],
    pub(crate) out_pitch: usize,
}

impl PairedProducts<'_> {
    /// Writes the products; `piece` is piece `step` of `strip`.
    ///
    /// # Panics
    /// Where a slice is shorter than its extents say.
    #[inline(always)]
    pub(crate) fn run<'p, S: Simd>(
        self,
        simd: S,
        unit: Option<MatrixUnit>,
        piece: impl Fn(usize, usize) -> &'p [f32] + Copy,
    ) {
        let Self { x, x_pitch, rows, strips, steps, out, out_pitch } = self;
        assert!(rows > 0 && steps > 0 && steps <= MOST_PIECES);
        assert!(x.len() >= (rows - 1) * x_pitch + steps * Pairs::STEP);
        assert!(out.len() >= (rows - 1) * out_pitch + strips * STRIP);
        let mut pieces: [&[f32]; MOST_PIECES] = [&[]; MOST_PIECES];
        // As many strips at a time as there is room for.
        let together = MOST_PIECES / steps;
        for first in (0..strips).step_by(together) {
            let strips = first..strips.min(first + together);
            let pieces = &mut pieces[..strips.len() * steps];
            for strip in strips.clone() {
                for step in 0..steps {
                    pieces[(strip - first) * steps + step] = piece(strip, step);
                }
            }
            assert!(pieces.iter().all(|piece| piece.len() >= Pairs::STEP * STRIP));
            let out = &mut out[first * STRIP..];
            match unit {
                Some(unit) => unit.multiply_pieces((x, rows, x_pitch), pieces, steps, out, out_pitch),
                None => {
                    assert!(Pairs::are_multiplied::<S>() && rows <= tile_rows::<S>());
                    let work = Pieced { x, x_pitch, pieces, steps, out, out_pitch };
                    // SAFETY: the processor has the instructions.
                    unsafe { with_rows!(rows, multiply_pieces, simd, work) }
                }
            }
        }
    }
}

/// [`PairedProducts`] by vectors; its extents have been compared with its slices.
struct Pieced<'a, 'p> {
    x: &'a [f32],
    x_pitch: usize,
    pieces: &'a [&'p [f32]],
    steps: usize,
    out: &'a mut [f32],
    out_pitch: usize,
}

/// # Safety
/// The processor has the instructions: see [`Pairs::are_multiplied`].
#[cfg_attr(
    target_arch = "x86_64",
    target_feature(
        enable = "avx512f,avx512bw,avx512cd,avx512dq,avx512vl,avx512bf16,avx2,fma,bmi1,bmi2,f16c,lzcnt,popcnt"
    )
)]
unsafe fn multiply_pieces<S: Simd, const ROWS: usize>(simd: S, work: Pieced<'_, '_>) {
    let Pieced { x, x_pitch, pieces, steps, out, out_pitch } = work;
    for (strip, pieces) in pieces.chunks_exact(steps).enumerate() {
        for column in (0..STRIP).step_by(tile_columns::<S>()) {
            // SAFETY: extents have been compared with their slices, and the caller's promise.
            unsafe {
                let mut sums = [[simd.splat_f32s(0.0); 2]; ROWS];
                for (step, piece) in pieces.iter().enumerate() {
                    let right = Operand { values: piece.as_ptr().add(column), pitch: STRIP };
                    let x = x.as_ptr().add(step * Pairs::STEP);
                    sums = accumulate::<S, Pairs, ROWS, false>(simd, sums, x, x_pitch, 1, right, Pairs::STEP);
                }
                for (row, sums) in sums.into_iter().enumerate() {
                    let at = out.as_mut_ptr().add(row * out_pitch + strip * STRIP + column);
                    store::<S>(at, sums[0]);
                    store::<S>(at.add(S::F32_LANES), sums[1]);
                }
            }
        }
    }
}
