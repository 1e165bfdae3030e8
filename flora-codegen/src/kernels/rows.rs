//! Moving rows: packing ragged segments into the equal blocks that a batched matmul wants, and back; and the epilogue on its
//! own, for lowerings whose last kernel is not ours.

use cubecl::prelude::*;

use super::epilogue::{Epilogue, finish};

/// An entry of the row index that stands for a row of zeros (on gathering) or for no row (on scattering).
pub(crate) const NO_ROW: u32 = u32::MAX;

/// destination\[i\] = source\[index\[i\]\], or zeros. source `[_, width]`, destination `[n, width]`.
#[cube(launch_unchecked)]
pub(crate) fn gather_rows<N: Size>(
    source: &Array<Vector<f32, N>>,
    index: &Array<u32>,
    destination: &mut Array<Vector<f32, N>>,
    width: u32,
    count: u32,
) {
    let lanes = source.vector_size();
    let vectors = width / comptime!(lanes as u32);
    let at = ABSOLUTE_POS as u32;
    if at < count * vectors {
        let row = index[(at / vectors) as usize];
        let mut value = Vector::<f32, N>::new(0.0);
        if row != NO_ROW {
            value = source[(row * vectors + at % vectors) as usize];
        }
        destination[at as usize] = value;
    }
}

/// destination\[index\[i\]\] = or += source\[i\]. source `[n, width]`, destination `[_, width]`; an index occurs once.
#[cube(launch_unchecked)]
pub(crate) fn scatter_rows<N: Size>(
    source: &Array<Vector<f32, N>>,
    index: &Array<u32>,
    destination: &mut Array<Vector<f32, N>>,
    width: u32,
    count: u32,
    #[comptime] add: bool,
) {
    let lanes = source.vector_size();
    let vectors = width / comptime!(lanes as u32);
    let at = ABSOLUTE_POS as u32;
    if at < count * vectors {
        let row = index[(at / vectors) as usize];
        if row != NO_ROW {
            let to = (row * vectors + at % vectors) as usize;
            if comptime!(add) {
                destination[to] += source[at as usize];
            } else {
                destination[to] = source[at as usize];
            }
        }
    }
}

/// y = φ(y + bias) in place. y `[t, k]`.
#[cube(launch_unchecked)]
pub(crate) fn finish_rows(y: &mut Array<f32>, bias: &Array<f32>, k: u32, count: u32, #[comptime] epilogue: Epilogue) {
    let at = ABSOLUTE_POS as u32;
    if at < count {
        y[at as usize] = finish(y[at as usize], bias, at % k, epilogue);
    }
}
