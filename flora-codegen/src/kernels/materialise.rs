//! W_i in global memory, for the `bmm` lowering: w0 ∘ Σ_v in_v out_vᵀ + Σ_q shrink_q expand_qᵀ, one dense `[d, k]` an adapter.
//!
//! MACs: (V + r + 1)·d·k an adapter. Bytes: w0 read and W_i written once.

use cubecl::prelude::*;

/// Words of one entry: first virtual row, one past the last, first shrink slot, first expand slot, rank.
pub(crate) const ENTRY_WORDS: u32 = 5;
/// Words of one virtual row: in-slot + 1 or 0, out-slot + 1 or 0.
pub(crate) const SCALE_WORDS: u32 = 2;

/// w0 `[d, k]`, in_pool `[slots, d]`, out_pool `[slots, k]`, entries `[s, 5]`, scales `[V, 2]`, weights `[s, d, k]`.
#[cube(launch_unchecked)]
pub(crate) fn materialise<NK: Size>(
    w0: &Array<Vector<f32, NK>>,
    in_pool: &Array<f32>,
    out_pool: &Array<Vector<f32, NK>>,
    entries: &Array<u32>,
    scales: &Array<u32>,
    weights: &mut Array<Vector<f32, NK>>,
    d: u32,
    k: u32,
) {
    let width_k = w0.vector_size();
    let k_vectors = k / comptime!(width_k as u32);
    let column = ABSOLUTE_POS_X;
    let depth = CUBE_POS_Y;
    let entry = CUBE_POS_Z * ENTRY_WORDS;
    if column < k_vectors {
        let mut factor = Vector::<f32, NK>::new(0.0);
        for v in entries[entry as usize]..entries[(entry + 1) as usize] {
            let in_slot = scales[(v * SCALE_WORDS) as usize];
            let out_slot = scales[(v * SCALE_WORDS + 1) as usize];
            let mut term = Vector::<f32, NK>::new(1.0);
            if in_slot > 0 {
                term = Vector::new(in_pool[((in_slot - 1) * d + depth) as usize]);
            }
            if out_slot > 0 {
                term *= out_pool[((out_slot - 1) * k_vectors + column) as usize];
            }
            factor += term;
        }
        let mut value = w0[(depth * k_vectors + column) as usize] * factor;
        let in_slot = entries[(entry + 2) as usize];
        let out_slot = entries[(entry + 3) as usize];
        for q in 0..entries[(entry + 4) as usize] {
            let shrink = Vector::<f32, NK>::new(in_pool[((in_slot + q) * d + depth) as usize]);
            value = fma(shrink, out_pool[((out_slot + q) * k_vectors + column) as usize], value);
        }
        weights[((CUBE_POS_Z * d + depth) * k_vectors + column) as usize] = value;
    }
}
