//! The innermost loops, once for every instruction set: a tile of rows times a strip of columns, with the sums in registers.
//!
//! Every output is a sum over the depth in rising order, one fused multiply-add after the other, whichever tile it lies in. So a
//! row has the same bits in a tile of one row as in a tile of fourteen.

use pulp::{Simd, WithSimd};

use crate::fetch::{Ahead, Pieces, fetch_near};
use crate::layout::{STRIP, X_PITCH};
use crate::matrix_unit::MatrixUnit;
use crate::partition::even_tiles;
use crate::products::{Floats, Pairs, Product};
use crate::rounded::Rounding;

/// The most rows of a tile on any instruction set.
pub(crate) const MOST_TILE_ROWS: usize = 14;

/// Rows of a tile: with two vectors a row, as many sums as leave room for the operands in the registers.
pub(crate) const fn tile_rows<S: Simd>() -> usize {
    if S::REGISTER_COUNT >= 32 { MOST_TILE_ROWS } else { 6 }
}

/// Columns of a tile: two vectors.
pub(crate) const fn tile_columns<S: Simd>() -> usize {
    2 * S::F32_LANES
}

/// Weights `[depth, columns]`.
#[derive(Clone, Copy)]
pub(crate) struct Columns<'a> {
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

/// What operands are made of.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum Form {
    /// f32.
    Floats,
    /// [`Pairs`] of bf16, in slices of floats of the same bits; depths count pairs, with the zeros after them. What multiplies them is
    /// the matrix unit, where there is one.
    Pairs(Option<MatrixUnit>),
    /// Stored numbers of the weight by x in 8 bits, in slices of floats of the same bits; depths count inputs. Tiles of them are
    /// [`crate::byte_tiles`]'.
    Bytes(Rounding),
}

/// The place of a row's scales that has none.
pub(crate) const NO_SCALES: usize = usize::MAX;

/// Depths between two of a tile's fetches.
pub(crate) const TURN: usize = 4;

/// Products of a part of a slice, which go on from the part before it.
pub(crate) struct Part<'a> {
    /// The sums of the parts before, `[rows, tile_columns]`.
    pub(crate) products: &'a mut [f32],
    pub(crate) is_first: bool,
    pub(crate) is_last: bool,
}

/// `sums[places[i] + column..] += scales[i] ∘ (x[i] @ weight)` for every row of a tile.
pub(crate) struct Multiply<'a> {
    /// Packed rows, [`X_PITCH`] apart.
    pub(crate) x: &'a [f32],
    /// What x and the weight are made of.
    pub(crate) form: Form,
    /// At most [`SLICE`](crate::layout::SLICE).
    pub(crate) depth: usize,
    /// `[depth, tile_columns]`
    pub(crate) weight: Columns<'a>,
    /// Where each row's sums begin; as many as the tile has rows, at most [`tile_rows`]. A place may come again.
    pub(crate) places: &'a [usize],
    /// `None`: ones.
    pub(crate) scales: Option<OutScales<'a>>,
    /// The tile's first column, counted from the places.
    pub(crate) column: usize,
    /// All sums.
    pub(crate) sums: &'a mut [f32],
    /// `None`: the depth is a whole slice.
    pub(crate) part: Option<Part<'a>>,
    /// What will be needed next.
    pub(crate) ahead: Pieces<'a>,
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
pub(crate) use with_rows;

impl Multiply<'_> {
    /// Runs it.
    ///
    /// # Panics
    /// Where a slice is shorter than its extents say, or the tile has too many rows.
    #[inline]
    pub(crate) fn run<S: Simd>(self, simd: S) {
        let (rows, columns) = (self.places.len(), tile_columns::<S>());
        if rows == 0 || self.depth == 0 {
            return;
        }
        assert!(rows <= tile_rows::<S>() && self.depth <= X_PITCH);
        assert!(self.x.len() >= (rows - 1) * X_PITCH + self.depth);
        assert!(self.weight.values.len() >= (self.depth - 1) * self.weight.pitch + columns);
        let end = self.column + columns;
        assert!(self.places.iter().all(|place| place + end <= self.sums.len()));
        assert!(self.scales.is_none_or(|scales| {
            let within = |place: &usize| *place == NO_SCALES || place + end <= scales.values.len();
            scales.places.len() == rows && scales.places.iter().all(within)
        }));
        assert!(self.part.as_ref().is_none_or(|part| part.products.len() >= rows * columns));
        match self.form {
            // Nobody gets here with bytes.
            Form::Floats | Form::Bytes(_) => with_rows!(rows, multiply_floats, simd, self),
            Form::Pairs(_) => {
                assert!(Pairs::are_multiplied::<S>());
                // SAFETY: the processor has the instructions.
                unsafe { with_rows!(rows, multiply_pairs, simd, self) }
            }
        }
    }
}

#[inline(always)]
fn multiply_floats<S: Simd, const ROWS: usize>(simd: S, work: Multiply<'_>) {
    struct Work<'a, const ROWS: usize>(Multiply<'a>);
    impl<const ROWS: usize> WithSimd for Work<'_, ROWS> {
        type Output = ();
        #[inline(always)]
        fn with_simd<S: Simd>(self, simd: S) {
            // SAFETY: any processor has the instructions.
            unsafe { multiply::<S, Floats, ROWS>(simd, self.0) }
        }
    }
    simd.vectorize(Work::<ROWS>(work));
}

/// # Safety
/// The processor has the instructions: see [`Pairs::are_multiplied`].
#[cfg_attr(
    target_arch = "x86_64",
    target_feature(
        enable = "avx512f,avx512bw,avx512cd,avx512dq,avx512vl,avx512bf16,avx2,fma,bmi1,bmi2,f16c,lzcnt,popcnt"
    )
)]
unsafe fn multiply_pairs<S: Simd, const ROWS: usize>(simd: S, work: Multiply<'_>) {
    // SAFETY: by the caller's promise.
    unsafe { multiply::<S, Pairs, ROWS>(simd, work) }
}

/// # Safety
/// The caller is compiled for the instructions of `P`.
#[inline(always)]
unsafe fn multiply<S: Simd, P: Product, const ROWS: usize>(simd: S, work: Multiply<'_>) {
    let Multiply { x, form: _, depth, weight, places, scales, column, sums, part, ahead } = work;
    // SAFETY: `Multiply::run` has compared every extent with its slice.
    unsafe {
        let mut products = [[simd.splat_f32s(0.0); 2]; ROWS];
        if let Some(part) = part.as_ref().filter(|part| !part.is_first) {
            for (at, product) in products.as_flattened_mut().iter_mut().enumerate() {
                *product = load::<S>(part.products.as_ptr().add(at * S::F32_LANES));
            }
        }
        let mut ahead = Ahead::new(ahead, depth / TURN);
        let mut first = 0;
        while first < depth {
            ahead.fetch();
            let steps = TURN.min(depth - first);
            let weights = Operand { values: weight.values.as_ptr().add(first * weight.pitch), pitch: weight.pitch };
            let x = x.as_ptr().add(first);
            products = accumulate::<S, P, ROWS, true>(simd, products, x, X_PITCH, 1, weights, steps);
            first += steps;
        }
        if let Some(part) = part.filter(|part| !part.is_last) {
            for (at, product) in products.as_flattened().iter().enumerate() {
                store::<S>(part.products.as_mut_ptr().add(at * S::F32_LANES), *product);
            }
            return;
        }
        add_products(simd, products, (places, scales), column, sums);
    }
}

/// Adds the products of a slice to the sums, each by its scale where its row has some.
///
/// # Safety
/// There are places for every row; from each of them, and from each of the scales' that is one, `column` and two vectors more are
/// within the sums and the scales.
#[inline(always)]
pub(crate) unsafe fn add_products<S: Simd, const ROWS: usize>(
    simd: S,
    products: [[S::f32s; 2]; ROWS],
    (places, scales): (&[usize], Option<OutScales<'_>>),
    column: usize,
    sums: &mut [f32],
) {
    // SAFETY: by the caller's promise.
    unsafe {
        for (row, products) in products.into_iter().enumerate() {
            let scales = scales
                .map(|scales| (scales.values.as_ptr(), *scales.places.get_unchecked(row)))
                .filter(|(_, place)| *place != NO_SCALES);
            for (half, product) in products.into_iter().enumerate() {
                let column = column + half * S::F32_LANES;
                let place = sums.as_mut_ptr().add(*places.get_unchecked(row) + column);
                let sum = load::<S>(place);
                let sum = match scales {
                    Some((values, place)) => simd.mul_add_e_f32s(product, load::<S>(values.add(place + column)), sum),
                    None => simd.add_f32s(sum, product),
                };
                store::<S>(place, sum);
            }
        }
    }
}

/// A strip of W0 ∘ (offset + Σ_v in_v out_vᵀ); without W0, the sum is added to what is there.
pub(crate) struct Compose<'a> {
    /// in_v along the depth.
    pub(crate) inner: &'a [f32],
    /// Floats from one in_v to the next.
    pub(crate) pitch: usize,
    /// out_v, `[terms, STRIP]`.
    pub(crate) outer: &'a [f32],
    /// How many v.
    pub(crate) terms: usize,
    /// The number of terms that are all ones.
    pub(crate) offset: f32,
    /// `[depth, STRIP]`; as large as `out`.
    pub(crate) weight: Option<&'a [f32]>,
    /// `[depth, STRIP]`
    pub(crate) out: &'a mut [f32],
}

impl Compose<'_> {
    /// Runs it.
    ///
    /// # Panics
    /// Where a slice is shorter than its extents say.
    #[inline]
    pub(crate) fn run<S: Simd>(self, simd: S) {
        let depth = self.out.len() / STRIP;
        assert!(self.out.len() == depth * STRIP && self.weight.is_none_or(|weight| weight.len() == self.out.len()));
        assert!(self.outer.len() >= self.terms * STRIP);
        assert!(self.terms == 0 || self.inner.len() >= (self.terms - 1) * self.pitch + depth);
        simd.vectorize(self);
    }
}

impl WithSimd for Compose<'_> {
    type Output = ();
    #[inline(always)]
    fn with_simd<S: Simd>(self, simd: S) {
        let Self { inner, pitch, outer, terms, offset, weight, out } = self;
        let strip = ComposedStrip {
            inner: inner.as_ptr(),
            pitch,
            outer: outer.as_ptr(),
            terms,
            offset: simd.splat_f32s(offset),
            // What is there is what is added to, or multiplied.
            source: weight.map_or(out.as_ptr(), <[f32]>::as_ptr),
            out: out.as_mut_ptr(),
            is_weighted: weight.is_some(),
        };
        let depth = out.len() / STRIP;
        for column in (0..STRIP).step_by(tile_columns::<S>()) {
            for rows in even_tiles(depth, tile_rows::<S>()) {
                with_rows!(rows.len(), compose_rows, simd, strip, rows.start, column);
            }
        }
    }
}

/// A [`Compose`] as values: behind a reference they would be read again for every tile.
#[derive(Clone, Copy)]
struct ComposedStrip<S: Simd> {
    inner: *const f32,
    pitch: usize,
    outer: *const f32,
    terms: usize,
    offset: S::f32s,
    source: *const f32,
    out: *mut f32,
    /// Whether the source is multiplied, not added.
    is_weighted: bool,
}

#[inline(always)]
fn compose_rows<S: Simd, const ROWS: usize>(simd: S, strip: ComposedStrip<S>, first: usize, column: usize) {
    let ComposedStrip { inner, pitch, outer, terms, offset, source, out, is_weighted } = strip;
    // SAFETY: `Compose::run` has compared every extent with its slice, and `first + ROWS` is within the depth.
    unsafe {
        let outer = Operand { values: outer.add(column), pitch: STRIP };
        let sums =
            accumulate::<S, Floats, ROWS, false>(simd, [[offset; 2]; ROWS], inner.add(first), 1, pitch, outer, terms);
        for (row, sums) in sums.into_iter().enumerate() {
            for (half, sum) in sums.into_iter().enumerate() {
                let at = (first + row) * STRIP + column + half * S::F32_LANES;
                let there = load::<S>(source.add(at));
                let value = if is_weighted { simd.mul_f32s(sum, there) } else { simd.add_f32s(sum, there) };
                store::<S>(out.add(at), value);
            }
        }
    }
}

/// Vectors of a product's right side, `pitch` floats apart.
#[derive(Clone, Copy)]
pub(crate) struct Operand {
    pub(crate) values: *const f32,
    pub(crate) pitch: usize,
}

/// Steps between a vector's fetch and its use.
pub(crate) const NEAR: usize = 8;

/// `sums[i] += Σ_step left[i · row_pitch + step · step_pitch] · right[step]`, in rising order of the steps.
///
/// # Safety
/// `left` holds ROWS × `steps` numbers at those pitches, `right` `steps` times two vectors, and the caller is compiled for the
/// instructions of `P`.
#[inline(always)]
pub(crate) unsafe fn accumulate<S: Simd, P: Product, const ROWS: usize, const FETCH: bool>(
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
            let pitch = right.pitch;
            let right = right.values.add(step * pitch);
            if FETCH {
                fetch_near(right.wrapping_add(NEAR * pitch));
                fetch_near(right.wrapping_add(NEAR * pitch + S::F32_LANES));
            }
            let (first, second) = (load::<S>(right), load::<S>(right.add(S::F32_LANES)));
            for (row, sums) in sums.iter_mut().enumerate() {
                let left = *left.add(row * row_pitch + step * step_pitch);
                sums[0] = P::add(simd, left, first, sums[0]);
                sums[1] = P::add(simd, left, second, sums[1]);
            }
        }
    }
    sums
}

/// # Safety
/// `at` points to a vector of floats.
#[inline(always)]
pub(crate) unsafe fn load<S: Simd>(at: *const f32) -> S::f32s {
    // SAFETY: by the caller's promise; a vector is a plain array of floats.
    unsafe { at.cast::<S::f32s>().read_unaligned() }
}

/// # Safety
/// `at` points to a vector of floats that nothing else refers to.
#[inline(always)]
pub(crate) unsafe fn store<S: Simd>(at: *mut f32, value: S::f32s) {
    // SAFETY: by the caller's promise; a vector is a plain array of floats.
    unsafe { at.cast::<S::f32s>().write_unaligned(value) }
}
