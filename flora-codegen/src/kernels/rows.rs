//! Moving rows: packing ragged segments into the equal blocks that a batched matmul wants, and back; and the epilogue on its
//! own, for lowerings that add to the output after the last product.

use cubecl::prelude::*;
use flora_plan::layer::Epilogue;
use flora_plan::schedule::NO_ROW;

use super::epilogue::finish;

/// destination\[i\] = source\[index\[i\]\], or zeros. source `[_, width]`, destination `[n, width]`.
#[cube(launch_unchecked)]
pub(crate) fn gather_rows<X: Float, Y: Float, N: Size>(
    source: &Array<Vector<X, N>>,
    index: &Array<u32>,
    destination: &mut Array<Vector<Y, N>>,
    width: u32,
    count: u32,
    #[define(X, Y)] _types: [StorageType; 2],
) {
    let lanes = source.vector_size();
    let vectors = width / comptime!(lanes as u32);
    let at = ABSOLUTE_POS as u32;
    if at < count * vectors {
        let row = index[(at / vectors) as usize];
        let mut value = Vector::<Y, N>::new(Y::new(0.0));
        if row != NO_ROW {
            value = Vector::cast_from(source[(row * vectors + at % vectors) as usize]);
        }
        destination[at as usize] = value;
    }
}

/// The same, each block of `block` rows transposed: destination `[n / block, width, block]`.
#[cube(launch_unchecked)]
pub(crate) fn gather_columns<X: Float, Y: Float>(
    source: &Array<X>,
    index: &Array<u32>,
    destination: &mut Array<Y>,
    width: u32,
    block: u32,
    count: u32,
    #[define(X, Y)] _types: [StorageType; 2],
) {
    let at = ABSOLUTE_POS as u32;
    if at < count * width {
        let matrix = at / (width * block);
        let column = at / block % width;
        let row = index[(matrix * block + at % block) as usize];
        let mut value = Y::new(0.0);
        if row != NO_ROW {
            value = Y::cast_from(source[(row * width + column) as usize]);
        }
        destination[at as usize] = value;
    }
}

/// destination\[index\[i\]\] += source\[i\]. source `[n, width]`, destination `[_, width]`; an index occurs once.
#[cube(launch_unchecked)]
pub(crate) fn add_rows<X: Float, Y: Float, N: Size>(
    source: &Array<Vector<X, N>>,
    index: &Array<u32>,
    destination: &mut Array<Vector<Y, N>>,
    width: u32,
    count: u32,
    #[define(X, Y)] _types: [StorageType; 2],
) {
    let lanes = source.vector_size();
    let vectors = width / comptime!(lanes as u32);
    let at = ABSOLUTE_POS as u32;
    if at < count * vectors {
        let row = index[(at / vectors) as usize];
        if row != NO_ROW {
            let to = (row * vectors + at % vectors) as usize;
            let sum = Vector::<f32, N>::cast_from(destination[to]) + Vector::cast_from(source[at as usize]);
            destination[to] = Vector::cast_from(sum);
        }
    }
}

/// destination\[first + i\] = source\[i\] for the first `count`.
#[cube(launch_unchecked)]
pub(crate) fn copy_numbers<X: Float>(
    source: &Array<X>,
    destination: &mut Array<X>,
    first: u32,
    count: u32,
    #[define(X)] _type: StorageType,
) {
    let at = ABSOLUTE_POS as u32;
    if at < count {
        destination[(first + at) as usize] = source[at as usize];
    }
}

/// The epilogue in place. y `[t, k]`.
#[cube(launch_unchecked)]
pub(crate) fn finish_rows<Y: Float, N: Size>(
    y: &mut Array<Vector<Y, N>>,
    bias: &Array<Vector<f32, N>>,
    residual: &Array<Vector<Y, N>>,
    k: u32,
    count: u32,
    #[comptime] epilogue: Epilogue,
    #[define(Y)] _output: StorageType,
) {
    let lanes = y.vector_size();
    let vectors = k / comptime!(lanes as u32);
    let at = ABSOLUTE_POS as u32;
    if at < count * vectors {
        let value = Vector::<f32, N>::cast_from(y[at as usize]);
        y[at as usize] = finish::<Y, N>(value, bias, residual, at % vectors, at, epilogue);
    }
}
