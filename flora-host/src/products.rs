//! What a kernel does at each step of a sum.

use pulp::Simd;

/// How a sum goes on by a step.
pub(crate) trait Product: Copy {
    /// `sum + left · right`
    ///
    /// # Safety
    /// The caller is compiled for the instructions that it takes.
    unsafe fn add<S: Simd>(simd: S, left: f32, right: S::f32s, sum: S::f32s) -> S::f32s;
}

/// Fused multiply-adds.
#[derive(Clone, Copy)]
pub(crate) struct Floats;

impl Product for Floats {
    #[inline(always)]
    unsafe fn add<S: Simd>(simd: S, left: f32, right: S::f32s, sum: S::f32s) -> S::f32s {
        simd.mul_add_e_f32s(simd.splat_f32s(left), right, sum)
    }
}

/// `sum + first · first + second · second` of a pair in every lane.
#[derive(Clone, Copy)]
pub(crate) struct Pairs;

impl Pairs {
    /// Whether this processor multiplies pairs in vectors of this kind.
    pub(crate) fn are_multiplied<S: Simd>() -> bool {
        #[cfg(target_arch = "x86_64")]
        return S::F32_LANES == 16 && std::arch::is_x86_feature_detected!("avx512bf16");
        #[cfg(not(target_arch = "x86_64"))]
        false
    }

    /// How many pairs so many inputs are; an odd one is beside a 0.
    pub(crate) fn of(inputs: usize) -> usize {
        inputs.div_ceil(2)
    }

    /// The same with the zeros after them, up to whole steps of the matrix unit.
    pub(crate) fn padded(inputs: usize) -> usize {
        Self::of(inputs).next_multiple_of(Self::STEP)
    }

    /// Pairs that the matrix unit multiplies together.
    pub(crate) const STEP: usize = 16;
}

#[cfg(target_arch = "x86_64")]
impl Product for Pairs {
    #[inline(always)]
    unsafe fn add<S: Simd>(_: S, left: f32, right: S::f32s, sum: S::f32s) -> S::f32s {
        use std::arch::x86_64::{__m512bh, _mm512_dpbf16_ps, _mm512_set1_epi32};
        const { assert!(size_of::<__m512bh>() == 64) };
        assert!(size_of::<S::f32s>() == 64);
        // SAFETY: the caller's function is compiled for these instructions, vectors of 16 floats are as large as those of 32 halves,
        // and all of them are plain numbers.
        unsafe {
            let left: __m512bh = std::mem::transmute(_mm512_set1_epi32(left.to_bits() as i32));
            let sum = _mm512_dpbf16_ps(std::mem::transmute_copy(&sum), left, std::mem::transmute_copy(&right));
            std::mem::transmute_copy(&sum)
        }
    }
}

#[cfg(not(target_arch = "x86_64"))]
impl Product for Pairs {
    #[inline(always)]
    unsafe fn add<S: Simd>(_: S, _: f32, _: S::f32s, sum: S::f32s) -> S::f32s {
        // Nobody gets here: no processor of this kind multiplies pairs.
        sum
    }
}
