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

/// A strip of weight, `[depth, strip_columns]`.
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
    /// The scales of all rows.
    pub(crate) values: &'a [f32],
    /// Where each row's begin; [`NO_SCALES`] where it has none.
    pub(crate) places: &'a [usize],
}

/// The place of a row's scales that has none.
pub(crate) const NO_SCALES: usize = usize::MAX;

/// `sums[places[i]..] += scales[i] ∘ (x[i] @ weight)` for every row of a tile.
pub(crate) struct Multiply<'a> {
    /// Packed rows, [`X_PITCH`] apart.
    pub(crate) x: &'a [f32],
    /// At most [`SLICE`].
    pub(crate) depth: usize,
    /// `[depth, strip_columns]`
    pub(crate) weight: Strip<'a>,
    /// Where each row's sums begin; as many as the tile has rows, at most [`tile_rows`]. A place may come again.
    pub(crate) places: &'a [usize],
    /// `None`: ones.
    pub(crate) scales: Option<OutScales<'a>>,
    /// All sums.
    pub(crate) sums: &'a mut [f32],
}

/// Calls a function with the number of rows as a constant.
macro_rules! with_rows {
    ($rows:expr, $call:ident $(, $argument:expr)*) => {
        match $rows {
            1 => $call::<S, 1>($($argument),*),
            2 => $call::<S, 2>($($argument),*),
            3 => $call::<S, 3>($($argument),*),
            4 => $call::<S, 4>($($argument),*),
            5 => $call::<S, 5>($($argument),*),
            6 => $call::<S, 6>($($argument),*),
            7 => $call::<S, 7>($($argument),*),
            8 => $call::<S, 8>($($argument),*),
            9 => $call::<S, 9>($($argument),*),
            10 => $call::<S, 10>($($argument),*),
            11 => $call::<S, 11>($($argument),*),
            12 => $call::<S, 12>($($argument),*),
            13 => $call::<S, 13>($($argument),*),
            14 => $call::<S, 14>($($argument),*),
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
        let (rows, columns) = (self.places.len(), strip_columns::<S>());
        if rows == 0 || self.depth == 0 {
            return;
        }
        assert!(rows <= tile_rows::<S>() && self.depth <= X_PITCH);
        assert!(self.x.len() >= (rows - 1) * X_PITCH + self.depth);
        assert!(self.weight.values.len() >= (self.depth - 1) * self.weight.pitch + columns);
        assert!(self.places.iter().all(|place| place + columns <= self.sums.len()));
        assert!(self.scales.is_none_or(|scales| {
            let within = |place: &usize| *place == NO_SCALES || place + columns <= scales.values.len();
            scales.places.len() == rows && scales.places.iter().all(within)
        }));
        with_rows!(rows, multiply, simd, self)
    }
}

#[inline(always)]
fn multiply<S: Simd, const ROWS: usize>(simd: S, work: Multiply<'_>) {
    struct Work<'a, const ROWS: usize>(Multiply<'a>);
    impl<const ROWS: usize> WithSimd for Work<'_, ROWS> {
        type Output = ();
        #[inline(always)]
        fn with_simd<S: Simd>(self, simd: S) {
            let Multiply { x, depth, weight, places, scales, sums } = self.0;
            // SAFETY: `Multiply::run` has compared every extent with its slice.
            unsafe {
                let zero = [[simd.splat_f32s(0.0); 2]; ROWS];
                let weights = Operand { values: weight.values.as_ptr(), pitch: weight.pitch };
                let own = accumulate::<S, ROWS>(simd, zero, x.as_ptr(), X_PITCH, 1, weights, depth);
                for (row, own) in own.into_iter().enumerate() {
                    let scales = scales
                        .map(|scales| (scales.values.as_ptr(), *scales.places.get_unchecked(row)))
                        .filter(|(_, place)| *place != NO_SCALES);
                    for (half, own) in own.into_iter().enumerate() {
                        let place = sums.as_mut_ptr().add(*places.get_unchecked(row) + half * S::F32_LANES);
                        let sum = load::<S>(place);
                        let sum = match scales {
                            Some((values, place)) => {
                                let scale = load::<S>(values.add(place + half * S::F32_LANES));
                                simd.mul_add_e_f32s(own, scale, sum)
                            }
                            None => simd.add_f32s(sum, own),
                        };
                        store::<S>(place, sum);
                    }
                }
            }
        }
    }
    simd.vectorize(Work::<ROWS>(work));
}

/// Depths that [`Sweep`] adds while a sum is in a register.
const SWEPT_ROWS: usize = 8;

/// `products[row] = x[row] @ weight` for few rows of x, with a weight that is read where it lies, row
/// by row: long runs of memory, none of it packed or read twice. With [`add_scaled`] the same sums as
/// [`Multiply`]'s, to the bit.
pub(crate) struct Sweep<'a> {
    /// Packed rows, [`X_PITCH`] apart.
    pub(crate) x: &'a [f32],
    /// How many.
    pub(crate) rows: usize,
    /// At most [`SLICE`].
    pub(crate) depth: usize,
    /// `[depth, columns]`
    pub(crate) weight: Strip<'a>,
    /// A multiple of [`strip_columns`].
    pub(crate) columns: usize,
    /// For `[rows, columns]` products, [`products_pitch`] apart.
    pub(crate) products: &'a mut [f32],
}

/// Floats from one row of products to the next: not a multiple of the cache's period.
pub(crate) const fn products_pitch(columns: usize) -> usize {
    columns + 16
}

impl Sweep<'_> {
    /// Writes the products.
    ///
    /// # Panics
    /// Where a slice is shorter than its extents say.
    #[inline]
    pub(crate) fn run<S: Simd>(self, simd: S) {
        if self.rows == 0 || self.depth == 0 || self.columns == 0 {
            return self.products.fill(0.0);
        }
        assert!(self.depth <= X_PITCH && self.x.len() >= (self.rows - 1) * X_PITCH + self.depth);
        assert!(self.columns.is_multiple_of(strip_columns::<S>()));
        assert!(self.weight.values.len() >= (self.depth - 1) * self.weight.pitch + self.columns);
        assert!(self.products.len() == self.rows * products_pitch(self.columns));
        simd.vectorize(self);
    }
}

impl WithSimd for Sweep<'_> {
    type Output = ();
    #[inline(always)]
    fn with_simd<S: Simd>(mut self, simd: S) {
        self.products.fill(0.0);
        let whole = self.depth / SWEPT_ROWS * SWEPT_ROWS;
        for first in (0..whole).step_by(SWEPT_ROWS) {
            sweep::<S, SWEPT_ROWS>(simd, &mut self, first);
        }
        for first in whole..self.depth {
            sweep::<S, 1>(simd, &mut self, first);
        }
    }
}

#[inline(always)]
fn sweep<S: Simd, const DEPTHS: usize>(simd: S, work: &mut Sweep<'_>, first: usize) {
    let Sweep { x, rows, weight, columns, products, .. } = work;
    for column in (0..*columns).step_by(strip_columns::<S>()) {
        // SAFETY: `Sweep::run` has compared every extent with its slice, and `first + DEPTHS` is within the depth.
        unsafe {
            let weights: [[S::f32s; 2]; DEPTHS] = std::array::from_fn(|depth| {
                let at = weight.values.as_ptr().add((first + depth) * weight.pitch + column);
                [load::<S>(at), load::<S>(at.add(S::F32_LANES))]
            });
            for row in 0..*rows {
                let x = x.as_ptr().add(row * X_PITCH + first);
                let place = products.as_mut_ptr().add(row * products_pitch(*columns) + column);
                let mut sums = [load::<S>(place), load::<S>(place.add(S::F32_LANES))];
                for (depth, weights) in weights.into_iter().enumerate() {
                    let x = simd.splat_f32s(*x.add(depth));
                    sums[0] = simd.mul_add_e_f32s(x, weights[0], sums[0]);
                    sums[1] = simd.mul_add_e_f32s(x, weights[1], sums[1]);
                }
                store::<S>(place, sums[0]);
                store::<S>(place.add(S::F32_LANES), sums[1]);
            }
        }
    }
}

/// `sums += scales ∘ products`, as [`Multiply`] adds them.
pub(crate) fn add_scaled<S: Simd>(simd: S, products: &[f32], scales: Option<&[f32]>, sums: &mut [f32]) {
    struct Work<'a> {
        products: &'a [f32],
        scales: Option<&'a [f32]>,
        sums: &'a mut [f32],
    }
    impl WithSimd for Work<'_> {
        type Output = ();
        #[inline(always)]
        fn with_simd<S: Simd>(self, simd: S) {
            let (products, _) = S::as_simd_f32s(self.products);
            let (sums, _) = S::as_mut_simd_f32s(self.sums);
            match self.scales {
                None => sums.iter_mut().zip(products).for_each(|(sum, own)| *sum = simd.add_f32s(*sum, *own)),
                Some(scales) => {
                    let (scales, _) = S::as_simd_f32s(scales);
                    for ((sum, own), scale) in sums.iter_mut().zip(products).zip(scales) {
                        *sum = simd.mul_add_e_f32s(*own, *scale, *sum);
                    }
                }
            }
        }
    }
    let whole = products.len() / S::F32_LANES * S::F32_LANES;
    assert!(products.len() == whole && sums.len() == whole && scales.is_none_or(|scales| scales.len() == whole));
    simd.vectorize(Work { products, scales, sums });
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
        let sums = accumulate::<S, ROWS>(simd, offset, inner, 1, X_PITCH, outer, work.terms);
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
/// `left` holds ROWS × `steps` numbers at those pitches, `right` `steps` pairs of vectors.
#[inline(always)]
unsafe fn accumulate<S: Simd, const ROWS: usize>(
    simd: S,
    mut sums: [[S::f32s; 2]; ROWS],
    left: *const f32,
    row_pitch: usize,
    step_pitch: usize,
    right: Operand,
    steps: usize,
) -> [[S::f32s; 2]; ROWS] {
    for step in 0..steps {
        // SAFETY: by the caller's promise.
        unsafe {
            let right = right.values.add(step * right.pitch);
            let (one, two) = (load::<S>(right), load::<S>(right.add(S::F32_LANES)));
            for (row, sums) in sums.iter_mut().enumerate() {
                let left = simd.splat_f32s(*left.add(row * row_pitch + step * step_pitch));
                sums[0] = simd.mul_add_e_f32s(left, one, sums[0]);
                sums[1] = simd.mul_add_e_f32s(left, two, sums[1]);
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
