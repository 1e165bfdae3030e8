//! Blocks of a strip turned by a quarter while they are in cache, so that the kernels which multiply along a weight's outputs multiply
//! along its inputs.

use pulp::Simd;

use crate::layout::STRIP;
use crate::vectorise::vectorised;

/// Turns rows `[rows, STRIP]`, at most [`STRIP`] of them, to `[columns, STRIP]`: as many columns as `out` has rows. What `out` has
/// beyond the rows becomes zeros.
pub(crate) fn transpose<S: Simd>(simd: S, rows: &[f32], out: &mut [f32]) {
    match (rows.first_chunk(), out.first_chunk_mut()) {
        (Some(rows), Some(out)) => vectorised(
            simd,
            #[inline(always)]
            || whole(simd, rows, out),
        ),
        _ => {
            out.fill(0.0);
            for (column, out) in out.chunks_exact_mut(STRIP).enumerate() {
                out.iter_mut().zip(rows.chunks_exact(STRIP)).for_each(|(out, row)| *out = row[column]);
            }
        }
    }
}

#[inline(always)]
fn whole<S: Simd>(simd: S, rows: &[f32; STRIP * STRIP], out: &mut [f32; STRIP * STRIP]) {
    #[cfg(target_arch = "x86_64")]
    if in_vectors(simd, rows, out) {
        return;
    }
    let _ = simd;
    for row in 0..STRIP {
        for column in 0..STRIP {
            out[column * STRIP + row] = rows[row * STRIP + column];
        }
    }
}

/// In squares of eight, whose halves are loaded to where they belong; `false` on an instruction set without the shuffles.
#[cfg(target_arch = "x86_64")]
#[inline(always)]
fn in_vectors<S: Simd>(simd: S, rows: &[f32; STRIP * STRIP], out: &mut [f32; STRIP * STRIP]) -> bool {
    use std::any::Any;

    use pulp::x86::{V3, V4};

    let simd: &dyn Any = &simd;
    let simd = match (simd.downcast_ref::<V3>(), simd.downcast_ref::<V4>()) {
        (Some(simd), _) => *simd,
        (None, Some(simd)) => **simd,
        (None, None) => return false,
    };
    for row in (0..STRIP).step_by(SQUARE) {
        for column in (0..STRIP).step_by(SQUARE) {
            square(simd, &rows[row * STRIP + column..], &mut out[column * STRIP + row..]);
        }
    }
    true
}

/// Rows and columns that are turned in registers.
#[cfg(target_arch = "x86_64")]
const SQUARE: usize = 8;

#[cfg(target_arch = "x86_64")]
#[inline(always)]
fn square(simd: pulp::x86::V3, rows: &[f32], out: &mut [f32]) {
    use std::arch::x86_64::__m128;

    const LAST: usize = (SQUARE - 1) * STRIP + SQUARE;
    let (rows, out) = (&rows[..LAST], &mut out[..LAST]);
    let avx = simd.avx;
    let quarter = |row: usize, column: usize| -> __m128 {
        // SAFETY: four of the numbers that were checked to be there; a vector is a plain array of floats.
        unsafe { rows.as_ptr().add(row * STRIP + column).cast::<__m128>().read_unaligned() }
    };
    // Columns `column` to `column + 4` of a row, and of the fourth after it.
    let pair = |row: usize, column: usize| {
        let (low, high) = (quarter(row, column), quarter(row + 4, column));
        avx._mm256_insertf128_ps::<1>(avx._mm256_castps128_ps256(low), high)
    };
    for column in [0, 4] {
        let [a, b, c, d] = [0, 1, 2, 3].map(|row| pair(row, column));
        let (ab_low, ab_high) = (avx._mm256_unpacklo_ps(a, b), avx._mm256_unpackhi_ps(a, b));
        let (cd_low, cd_high) = (avx._mm256_unpacklo_ps(c, d), avx._mm256_unpackhi_ps(c, d));
        let turned = [
            avx._mm256_shuffle_ps::<0b01_00_01_00>(ab_low, cd_low),
            avx._mm256_shuffle_ps::<0b11_10_11_10>(ab_low, cd_low),
            avx._mm256_shuffle_ps::<0b01_00_01_00>(ab_high, cd_high),
            avx._mm256_shuffle_ps::<0b11_10_11_10>(ab_high, cd_high),
        ];
        for (at, turned) in turned.into_iter().enumerate() {
            let out: &mut [f32] = &mut out[(column + at) * STRIP..][..SQUARE];
            // SAFETY: eight numbers that nothing else refers to.
            unsafe { out.as_mut_ptr().cast::<std::arch::x86_64::__m256>().write_unaligned(turned) };
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    struct Turning<'a>(&'a [f32], &'a mut [f32]);

    impl pulp::WithSimd for Turning<'_> {
        type Output = ();
        fn with_simd<S: Simd>(self, simd: S) {
            transpose(simd, self.0, self.1);
        }
    }

    #[test]
    fn every_number_goes_to_its_place() {
        for (rows, columns) in [(32, 32), (32, 7), (5, 32), (1, 1), (31, 30)] {
            let numbers: Vec<f32> = (0..rows * STRIP).map(|at| at as f32).collect();
            for engine in crate::HostEngine::all() {
                let mut out = vec![f32::NAN; columns * STRIP];
                engine.arch().dispatch(Turning(&numbers, &mut out));
                for (at, found) in out.iter().enumerate() {
                    let (column, row) = (at / STRIP, at % STRIP);
                    assert_eq!(*found, if row < rows { numbers[row * STRIP + column] } else { 0.0 });
                }
            }
        }
    }
}
