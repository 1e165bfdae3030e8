//! One row times a strip of a quantised weight: numbers are multiplied in the registers that they are decoded to. Through memory they
//! would be written and read again for a single use, and products would wait for one another: here each waits while the next
//! number is decoded. The sums are those of [`crate::kernel`], to the bit. For more rows, more would be compiled than is gained.

use std::ops::Range;

use pulp::Simd;

use crate::block_scales::BlockScales;
use crate::decode::{Decoded, GROUP, Groups, Stored, Words, group_half, write_part};
use crate::layout::STRIP;
use crate::tiles::Tiles;

impl Tiles<'_> {
    /// Adds the products of the first row with all inputs `slice` of a strip to its sums; `column` is the strip's first one, counted
    /// from the row's place.
    ///
    /// # Panics
    /// Where there is no row, or a slice is shorter than its extents say.
    pub(crate) fn multiply_one<S: Simd>(
        self,
        simd: S,
        words: Words<'_>,
        (slice, column): (Range<usize>, usize),
        scales: &mut BlockScales,
        sums: &mut [f32],
    ) {
        let mut products = [0.0; STRIP];
        for inputs in words.pieces(slice.clone()) {
            let x = &self.x[inputs.start - slice.start..inputs.end - slice.start];
            words.each(simd, inputs, scales, Multiplied { x, products: &mut products });
        }
        self.add(simd, &[products], column, sums);
    }
}

/// Numbers that are multiplied by those of x.
struct Multiplied<'a> {
    /// One an input.
    x: &'a [f32],
    /// The sums of the products so far.
    products: &'a mut [f32; STRIP],
}

impl<S: Simd> Decoded<S> for Multiplied<'_> {
    #[inline(always)]
    fn take<const BITS: u32>(
        self,
        simd: S,
        groups: Groups<'_>,
        number: impl Fn(Stored<S, BITS>, S::f32s, S::f32s) -> S::f32s + Copy,
    ) {
        let Self { x, products } = self;
        let products = S::as_mut_simd_f32s(products).0;
        let (whole, rest) = x.as_chunks::<GROUP>();
        for at in (0..products.len()).step_by(2) {
            let mut sums = [products[at], products[at + 1]];
            for (group, x) in whole.iter().enumerate() {
                let (words, halves) = groups.group::<BITS>(group);
                for (half, scales) in halves.into_iter().enumerate() {
                    group_half::<S, BITS, 2>(
                        simd,
                        words,
                        scales,
                        (half, at),
                        number,
                        #[inline(always)]
                        |input, values| {
                            let x = simd.splat_f32s(x[input]);
                            sums[0] = simd.mul_add_e_f32s(x, values[0], sums[0]);
                            sums[1] = simd.mul_add_e_f32s(x, values[1], sums[1]);
                        },
                    );
                }
            }
            if !rest.is_empty() {
                let mut numbers = [0.0; GROUP * STRIP];
                let (words, halves) = groups.group::<BITS>(whole.len());
                write_part(simd, words, halves, &mut numbers, number);
                for (x, numbers) in rest.iter().zip(numbers.chunks_exact(STRIP)) {
                    let (x, numbers) = (simd.splat_f32s(*x), S::as_simd_f32s(numbers).0);
                    sums[0] = simd.mul_add_e_f32s(x, numbers[at], sums[0]);
                    sums[1] = simd.mul_add_e_f32s(x, numbers[at + 1], sums[1]);
                }
            }
            [products[at], products[at + 1]] = sums;
        }
    }
}
