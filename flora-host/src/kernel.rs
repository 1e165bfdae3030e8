//! The innermost loops, once for every instruction set: a tile of rows times a strip of columns, with the sums in registers.
//!
//! Every output is a sum over the depth in rising order, one fused multiply-add after the other, whichever tile it lies in. So a
//! row has the same bits in a tile of one row as in a tile of fourteen.

use pulp::{Simd, WithSimd};

/// The depth that is summed in registers before the outputs are touched. Fixed, because a row's bits depend on it.
/// 256 × 32 floats of weight are as large as the first-level cache and 256 × 14 of x fit beside what is in use of them.
pub(crate) const SLICE: usize = 256;

/// Floats from one row of packed x to the next: not a multiple of the cache's period, so that rows don't evict one another.
pub(crate) const X_PITCH: usize = SLICE + 16;

/// The most rows of a tile on any instruction set.
pub(crate) const MOST_TILE_ROWS: usize = 14;

/// Rows of a tile: with two vectors a row, as many sums as leave room for the operands in the registers.
pub(crate) const fn tile_rows<S: Simd>() -> usize {
    if S::REGISTER_COUNT >= 32 { MOST_TILE_ROWS } else { 6 }
}

/// Columns of a strip: two vectors.
pub(crate) const fn strip_columns<S: Simd>() -> usize {
    2 * S::F32_LANES
}

/// A strip of weight.
#[derive(Clone, Copy)]
pub(crate) struct Strip<'a> {
    /// From its first number.
    pub(crate) values: &'a [f32],
    /// Floats from one depth to the next.
    pub(crate) pitch: usize,
}

/// The factors of a tile's outputs.
#[derive(Clone, Copy)]
pub(crate) struct OutScales<'a> {
    /// From the first column of the strip in the first row.
    pub(crate) values: &'a [f32],
    /// Floats from one row to the next.
    pub(crate) pitch: usize,
}

/// `sums[places[i]..] += scales[i] ∘ (x[i] @ weight)` for every row of a tile.
pub(crate) struct Multiply<'a> {
    /// Packed rows, [`X_PITCH`] apart.
    pub(crate) x: &'a [f32],
    /// At most [`SLICE`].
    pub(crate) depth: usize,
    /// `[depth, vectors]`
    pub(crate) weight: Strip<'a>,
    /// 2, or [`vectors_at_once`].
    pub(crate) vectors: usize,
    /// Where each row's sums begin; as many as the tile has rows, at most [`tile_rows`]. A place may come again.
    pub(crate) places: &'a [usize],
    /// `None`: ones.
    pub(crate) scales: Option<OutScales<'a>>,
    /// All sums.
    pub(crate) sums: &'a mut [f32],
}

/// Vectors of columns that a tile of so many rows takes at once from a weight without gaps between strips: the fewer the rows,
/// the more columns it takes to keep the multipliers busy, and the longer are the runs that are read from memory.
pub(crate) const fn vectors_at_once<S: Simd>(rows: usize) -> usize {
    match (S::REGISTER_COUNT >= 32, rows) {
        (true, 0..=3) => 8,
        (true, 4..=6) | (false, 1) => 4,
        _ => 2,
    }
}

/// Calls [`multiply`] with the numbers of rows and of vectors as constants.
macro_rules! multiply_constants {
    ($simd:expr, $work:expr, $([$vectors:literal: $($rows:literal)*])*) => {
        match ($work.places.len(), $work.vectors) {
            $($(($rows, $vectors) => multiply::<S, $rows, $vectors>($simd, $work),)*)*
            _ => {}
        }
    };
}

impl Multiply<'_> {
    /// Runs it.
    ///
    /// # Panics
    /// Where a slice is shorter than its extents say, or the tile has too many rows.
    #[inline]
    pub(crate) fn run<S: Simd>(self, simd: S) {
        let (rows, columns) = (self.places.len(), self.vectors * S::F32_LANES);
        assert!(self.vectors == 2 || self.vectors <= vectors_at_once::<S>(rows));
        if rows == 0 || self.depth == 0 {
            return;
        }
        assert!(rows <= tile_rows::<S>() && self.depth <= X_PITCH);
        assert!(self.x.len() >= (rows - 1) * X_PITCH + self.depth);
        assert!(self.weight.values.len() >= (self.depth - 1) * self.weight.pitch + columns);
        assert!(self.places.iter().all(|place| place + columns <= self.sums.len()));
        assert!(self.scales.is_none_or(|scales| scales.values.len() >= (rows - 1) * scales.pitch + columns));
        multiply_constants!(
            simd, self,
            [2: 1 2 3 4 5 6 7 8 9 10 11 12 13 14] [4: 1 2 3 4 5 6] [8: 1 2 3]
        );
    }
}

#[inline(always)]
fn multiply<S: Simd, const ROWS: usize, const VECTORS: usize>(simd: S, work: Multiply<'_>) {
    struct Work<'a, const ROWS: usize, const VECTORS: usize>(Multiply<'a>);
    impl<const ROWS: usize, const VECTORS: usize> WithSimd for Work<'_, ROWS, VECTORS> {
        type Output = ();
        #[inline(always)]
        fn with_simd<S: Simd>(self, simd: S) {
            let Multiply { x, depth, weight, places, scales, sums, .. } = self.0;
            // SAFETY: `Multiply::run` has compared every extent with its slice.
            unsafe {
                let zero = [[simd.splat_f32s(0.0); VECTORS]; ROWS];
                let weights = Operand { values: weight.values.as_ptr(), pitch: weight.pitch };
                let own = accumulate(simd, zero, x.as_ptr(), X_PITCH, 1, weights, depth);
                for (row, own) in own.into_iter().enumerate() {
                    for (half, own) in own.into_iter().enumerate() {
                        let place = sums.as_mut_ptr().add(*places.get_unchecked(row) + half * S::F32_LANES);
                        let sum = load::<S>(place);
                        let sum = match scales {
                            Some(scales) => {
                                let at = scales.values.as_ptr().add(row * scales.pitch + half * S::F32_LANES);
                                simd.mul_add_e_f32s(own, load::<S>(at), sum)
                            }
                            None => simd.add_f32s(sum, own),
                        };
                        store::<S>(place, sum);
                    }
                }
            }
        }
    }
    simd.vectorize(Work::<ROWS, VECTORS>(work));
}

/// A strip of W0 ∘ (offset + Σ_v in_v out_vᵀ), in the form that [`Multiply`] reads; without W0, the sum is added to what is there.
pub(crate) struct Compose<'a> {
    /// in_v along the depth, [`X_PITCH`] apart.
    pub(crate) inner: &'a [f32],
    /// out_v, `[terms, strip_columns]`.
    pub(crate) outer: &'a [f32],
    /// How many v.
    pub(crate) terms: usize,
    /// The number of terms that are all ones.
    pub(crate) offset: f32,
    /// The strip of W0, without gaps; as large as `out`.
    pub(crate) weight: Option<&'a [f32]>,
    /// `[depth, strip_columns]`
    pub(crate) out: &'a mut [f32],
}

impl Compose<'_> {
    /// Runs it.
    ///
    /// # Panics
    /// Where a slice is shorter than its extents say.
    #[inline]
    pub(crate) fn run<S: Simd>(self, simd: S) {
        let columns = strip_columns::<S>();
        let depth = self.out.len() / columns;
        assert!(self.out.len() == depth * columns && self.weight.is_none_or(|weight| weight.len() == self.out.len()));
        assert!(self.outer.len() >= self.terms * columns);
        assert!(depth <= X_PITCH && self.inner.len() >= self.terms * X_PITCH);
        simd.vectorize(self);
    }
}

impl WithSimd for Compose<'_> {
    type Output = ();
    #[inline(always)]
    fn with_simd<S: Simd>(mut self, simd: S) {
        let depth = self.out.len() / strip_columns::<S>();
        if tile_rows::<S>() == MOST_TILE_ROWS {
            compose::<S, MOST_TILE_ROWS>(simd, &mut self, depth);
        } else {
            compose::<S, 6>(simd, &mut self, depth);
        }
    }
}

#[inline(always)]
fn compose<S: Simd, const ROWS: usize>(simd: S, work: &mut Compose<'_>, depth: usize) {
    let whole = depth / ROWS * ROWS;
    for first in (0..whole).step_by(ROWS) {
        compose_rows::<S, ROWS>(simd, work, first);
    }
    for first in whole..depth {
        compose_rows::<S, 1>(simd, work, first);
    }
}

#[inline(always)]
fn compose_rows<S: Simd, const ROWS: usize>(simd: S, work: &mut Compose<'_>, first: usize) {
    let columns = strip_columns::<S>();
    // SAFETY: `Compose::run` has compared every extent with its slice, and `first + ROWS` is within the depth.
    unsafe {
        let offset = [[simd.splat_f32s(work.offset); 2]; ROWS];
        let outer = Operand { values: work.outer.as_ptr(), pitch: columns };
        let inner = work.inner.as_ptr().add(first);
        let sums = accumulate(simd, offset, inner, 1, X_PITCH, outer, work.terms);
        for (row, sums) in sums.into_iter().enumerate() {
            for (half, sum) in sums.into_iter().enumerate() {
                let at = (first + row) * columns + half * S::F32_LANES;
                let out = work.out.as_mut_ptr().add(at);
                let value = match work.weight {
                    Some(weight) => simd.mul_f32s(sum, load::<S>(weight.as_ptr().add(at))),
                    None => simd.add_f32s(sum, load::<S>(out)),
                };
                store::<S>(out, value);
            }
        }
    }
}

#[derive(Clone, Copy)]
struct Operand {
    values: *const f32,
    pitch: usize,
}

/// `sums[i] += Σ_step left[i · row_pitch + step · step_pitch] · right[step]`, in rising order of the steps.
///
/// # Safety
/// `left` holds ROWS × `steps` numbers at those pitches, `right` `steps` runs of VECTORS vectors.
#[inline(always)]
unsafe fn accumulate<S: Simd, const ROWS: usize, const VECTORS: usize>(
    simd: S,
    mut sums: [[S::f32s; VECTORS]; ROWS],
    left: *const f32,
    row_pitch: usize,
    step_pitch: usize,
    right: Operand,
    steps: usize,
) -> [[S::f32s; VECTORS]; ROWS] {
    for step in 0..steps {
        // SAFETY: by the caller's promise.
        unsafe {
            let right = right.values.add(step * right.pitch);
            let right = |at: usize| load::<S>(right.add(at * S::F32_LANES));
            let left = |row: usize| simd.splat_f32s(*left.add(row * row_pitch + step * step_pitch));
            // What there is less of stays in registers.
            if ROWS < VECTORS {
                let lefts: [S::f32s; ROWS] = std::array::from_fn(left);
                for at in 0..VECTORS {
                    let right = right(at);
                    for row in 0..ROWS {
                        sums[row][at] = simd.mul_add_e_f32s(lefts[row], right, sums[row][at]);
                    }
                }
            } else {
                let rights: [S::f32s; VECTORS] = std::array::from_fn(right);
                for (row, sums) in sums.iter_mut().enumerate() {
                    let left = left(row);
                    for (sum, right) in sums.iter_mut().zip(rights) {
                        *sum = simd.mul_add_e_f32s(left, right, *sum);
                    }
                }
            }
        }
    }
    sums
}

/// # Safety
/// `at` points to a vector of floats.
#[inline(always)]
unsafe fn load<S: Simd>(at: *const f32) -> S::f32s {
    // SAFETY: by the caller's promise; a vector is a plain array of floats.
    unsafe { at.cast::<S::f32s>().read_unaligned() }
}

/// # Safety
/// `at` points to a vector of floats that nothing else refers to.
#[inline(always)]
unsafe fn store<S: Simd>(at: *mut f32, value: S::f32s) {
    // SAFETY: by the caller's promise; a vector is a plain array of floats.
    unsafe { at.cast::<S::f32s>().write_unaligned(value) }
}
