//! What multiplies bytes: an instruction where there is one, exact floats elsewhere. Both make the same integers.

use pulp::Simd;

/// How an integer sum goes on by four inputs of every lane's column. Sums lie in vectors of floats, whatever they are made of.
///
/// # Safety
/// All functions: the caller is compiled for the instructions that they take.
pub(crate) trait ByteProduct {
    /// A sum that begins with an integer.
    unsafe fn start<S: Simd>(simd: S, value: i32) -> S::f32s;

    /// `sum + Σ left · right` of four signed bytes and a lane's four unsigned ones.
    unsafe fn add<S: Simd>(simd: S, left: u32, right: S::f32s, sum: S::f32s) -> S::f32s;

    /// The sum as floats. Exact: a block's sum is below 2^24.
    unsafe fn float<S: Simd>(simd: S, sum: S::f32s) -> S::f32s;
}

/// Sums in floats, which are exact as long as they are below 2^24.
pub(crate) struct ExactFloats;

/// A float in whose lowest bits a byte is the byte more.
const ABOVE: f32 = 8_388_608.0;

impl ByteProduct for ExactFloats {
    #[inline(always)]
    unsafe fn start<S: Simd>(simd: S, value: i32) -> S::f32s {
        simd.splat_f32s(value as f32)
    }

    #[inline(always)]
    unsafe fn add<S: Simd>(simd: S, left: u32, right: S::f32s, mut sum: S::f32s) -> S::f32s {
        let right = simd.transmute_u32s_f32s(right);
        for (place, left) in left.to_le_bytes().into_iter().enumerate() {
            let byte = simd.wrapping_dyn_shr_u32s(right, simd.splat_u32s(8 * place as u32));
            let byte = simd.and_u32s(byte, simd.splat_u32s(0xff));
            let byte = simd.transmute_f32s_u32s(simd.or_u32s(byte, simd.splat_u32s(ABOVE.to_bits())));
            let number = simd.sub_f32s(byte, simd.splat_f32s(ABOVE));
            sum = simd.mul_add_e_f32s(simd.splat_f32s(f32::from(left as i8)), number, sum);
        }
        sum
    }

    #[inline(always)]
    unsafe fn float<S: Simd>(_: S, sum: S::f32s) -> S::f32s {
        sum
    }
}

/// Sums of integers, by an instruction for four bytes a lane.
pub(crate) struct Dots;

impl Dots {
    /// Whether this processor has it for vectors of this kind.
    pub(crate) fn are_there<S: Simd>() -> bool {
        #[cfg(target_arch = "x86_64")]
        return S::F32_LANES == 16 && std::arch::is_x86_feature_detected!("avx512vnni");
        #[cfg(not(target_arch = "x86_64"))]
        false
    }
}

#[cfg(target_arch = "x86_64")]
impl ByteProduct for Dots {
    #[inline(always)]
    unsafe fn start<S: Simd>(simd: S, value: i32) -> S::f32s {
        simd.transmute_f32s_u32s(simd.splat_u32s(value as u32))
    }

    #[inline(always)]
    unsafe fn add<S: Simd>(_: S, left: u32, right: S::f32s, sum: S::f32s) -> S::f32s {
        use std::arch::x86_64::{_mm512_dpbusd_epi32, _mm512_set1_epi32};
        assert!(size_of::<S::f32s>() == 64);
        // SAFETY: the caller's function is compiled for these instructions, and vectors of 16 floats are as large as those of 16
        // integers. All of them are plain numbers.
        unsafe {
            let left = _mm512_set1_epi32(left as i32);
            let sum = _mm512_dpbusd_epi32(std::mem::transmute_copy(&sum), std::mem::transmute_copy(&right), left);
            std::mem::transmute_copy(&sum)
        }
    }

    #[inline(always)]
    unsafe fn float<S: Simd>(_: S, sum: S::f32s) -> S::f32s {
        use std::arch::x86_64::_mm512_cvtepi32_ps;
        assert!(size_of::<S::f32s>() == 64);
        // SAFETY: as above.
        unsafe { std::mem::transmute_copy(&_mm512_cvtepi32_ps(std::mem::transmute_copy(&sum))) }
    }
}

#[cfg(not(target_arch = "x86_64"))]
impl ByteProduct for Dots {
    // Nobody gets here: no processor of this kind has the instruction.
    #[inline(always)]
    unsafe fn start<S: Simd>(simd: S, _: i32) -> S::f32s {
        simd.splat_f32s(0.0)
    }

    #[inline(always)]
    unsafe fn add<S: Simd>(_: S, _: u32, _: S::f32s, sum: S::f32s) -> S::f32s {
        sum
    }

    #[inline(always)]
    unsafe fn float<S: Simd>(_: S, sum: S::f32s) -> S::f32s {
        sum
    }
}
