//! Sixteen numbers as a vector's table. Instruction sets have permutations for it that the vectors' library doesn't offer for all
//! of them at once.

use pulp::Simd;

/// `table[i]` with i the lowest four bits of every number of `indices`.
#[inline(always)]
pub(crate) fn looked_up<S: Simd>(simd: S, table: [f32; 16], indices: S::u32s) -> S::f32s {
    #[cfg(target_arch = "x86_64")]
    if let Some(found) = permuted(simd, table, indices) {
        return found;
    }
    let mut found = simd.splat_f32s(0.0);
    let numbers: &mut [f32] = bytemuck::cast_slice_mut(std::slice::from_mut(&mut found));
    let indices: &[u32] = bytemuck::cast_slice(std::slice::from_ref(&indices));
    for (number, index) in numbers.iter_mut().zip(indices) {
        *number = table[*index as usize % table.len()];
    }
    found
}

#[cfg(target_arch = "x86_64")]
#[inline(always)]
fn permuted<S: Simd>(simd: S, table: [f32; 16], indices: S::u32s) -> Option<S::f32s> {
    use std::any::Any;
    use std::mem::transmute_copy;

    use pulp::x86::{V3, V4};

    let simd: &dyn Any = &simd;
    if let Some(simd) = simd.downcast_ref::<V4>() {
        // SAFETY: the vectors of this instruction set are sixteen numbers, as its registers are.
        return Some(unsafe {
            transmute_copy(&simd.avx512f._mm512_permutexvar_ps(transmute_copy(&indices), transmute_copy(&table)))
        });
    }
    let simd = simd.downcast_ref::<V3>()?;
    let [low, high]: [[f32; 8]; 2] = bytemuck::cast(table);
    // SAFETY: the vectors of this instruction set are eight numbers, as its registers are.
    unsafe {
        let indices = transmute_copy(&indices);
        let low = simd.avx2._mm256_permutevar8x32_ps(transmute_copy(&low), indices);
        let high = simd.avx2._mm256_permutevar8x32_ps(transmute_copy(&high), indices);
        // The fourth bit of an index becomes the sign, by which halves are chosen.
        let chosen = simd.avx._mm256_castsi256_ps(simd.avx2._mm256_slli_epi32::<28>(indices));
        Some(transmute_copy(&simd.avx._mm256_blendv_ps(low, high, chosen)))
    }
}

/// The same of every byte, whose upper bits are 0.
#[inline(always)]
pub(crate) fn looked_up_bytes<S: Simd>(simd: S, table: [u8; 16], indices: S::u32s) -> S::u32s {
    #[cfg(target_arch = "x86_64")]
    if let Some(found) = shuffled(simd, table, indices) {
        return found;
    }
    let mut found = simd.splat_u32s(0);
    let numbers: &mut [u8] = bytemuck::cast_slice_mut(std::slice::from_mut(&mut found));
    let indices: &[u8] = bytemuck::cast_slice(std::slice::from_ref(&indices));
    for (number, index) in numbers.iter_mut().zip(indices) {
        *number = table[*index as usize % table.len()];
    }
    found
}

#[cfg(target_arch = "x86_64")]
#[inline(always)]
fn shuffled<S: Simd>(simd: S, table: [u8; 16], indices: S::u32s) -> Option<S::u32s> {
    use std::any::Any;
    use std::mem::transmute_copy;

    use pulp::x86::{V3, V4};

    let simd: &dyn Any = &simd;
    if let Some(simd) = simd.downcast_ref::<V4>() {
        let tables = [table; 4];
        // SAFETY: the vectors of this instruction set are 64 bytes, as its registers are.
        return Some(unsafe {
            transmute_copy(&simd.avx512bw._mm512_shuffle_epi8(transmute_copy(&tables), transmute_copy(&indices)))
        });
    }
    let simd = simd.downcast_ref::<V3>()?;
    let tables = [table; 2];
    // SAFETY: the vectors of this instruction set are 32 bytes, as its registers are.
    Some(unsafe { transmute_copy(&simd.avx2._mm256_shuffle_epi8(transmute_copy(&tables), transmute_copy(&indices))) })
}
