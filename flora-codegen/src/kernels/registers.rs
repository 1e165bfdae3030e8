//! What tensor cores multiply, where each unit knows which numbers its registers hold: four matrices of 8×8 a load, 16×8×16 a
//! product.
//!
//! Places are signed, because a signed sum can't wrap around: so CUDA's compiler takes constants out of it, and an address is a
//! register and a constant. cubecl's own functions would ask for unsigned ones. A place is below 2³¹ vectors.
//!
//! A lane is 4g + t. Of A, 16×16, register r holds row g + 8·(r % 2), depths 2t and 2t + 1, plus 8·(r / 2). Of B, 16×8, register r
//! holds depths 2t and 2t + 1, plus 8r, of column g. Of a sum, 16×8, vector h holds columns 2t and 2t + 1 of row g + 8h.

use cubecl::ir::{CoopMma, IndexAssignOperator, IndexOperator, Instruction, Operator};
use cubecl::prelude::*;

/// Two numbers of a unit, which are a register of halves.
pub(crate) type Pair<T> = Vector<T, Const<2>>;

/// Four matrices of 8×8 numbers, each lane's line of one at its own place, counted in vectors: lanes 8i to 8i + 7 name the lines of
/// matrix i. Register i holds two numbers of matrix i.
#[cube]
#[allow(unused_variables, reason = "what is written is made of them")]
pub(crate) fn matrices<S: Float, V: Size>(
    shared: &SharedMemory<Vector<S, V>>,
    at: i32,
    #[comptime] transpose: bool,
) -> Array<Pair<S>> {
    intrinsic!(|scope| {
        let out: NativeExpand<Array<Pair<S>>> = Array::__expand_new(scope, 4);
        scope.register(Instruction::new(
            CoopMma::LoadMatrix { buffer: *shared.expand, offset: *at.expand, vector_size: None, factor: 4, transpose },
            *out.expand,
        ));
        out
    })
}

/// The vector at a signed place.
#[cube]
#[allow(unused_variables, reason = "what is written is made of them")]
pub(crate) fn read<T: Numeric, V: Size>(from: &Array<Vector<T, V>>, at: i32) -> Vector<T, V> {
    intrinsic!(|scope| {
        let out: NativeExpand<Vector<T, V>> = scope.create_local(Vector::<T, V>::as_type(scope)).into();
        let index = IndexOperator { list: *from.expand, index: *at.expand, vector_size: 0, unroll_factor: 1 };
        scope.register(Instruction::new(Operator::UncheckedIndex(index), *out.expand));
        out
    })
}

/// Puts a vector to a signed place, counted in such vectors, of an array whose own may be longer.
#[cube]
#[allow(unused_variables, reason = "what is written is made of them")]
pub(crate) fn put<T: Numeric, V: Size>(to: &mut SharedMemory<Vector<T, V>>, at: i32, value: Vector<T, V>) {
    intrinsic!(|scope| {
        let width = value.expand.ty.vector_size();
        let vector_size = if to.expand.ty.vector_size() == width { 0 } else { width };
        let index = IndexAssignOperator { index: *at.expand, value: *value.expand, vector_size, unroll_factor: 1 };
        scope.register(Instruction::new(Operator::UncheckedIndexAssign(index), *to.expand));
    })
}

/// Two registers of four.
#[cube]
pub(crate) fn pair<S: Float>(
    from: &Array<Pair<S>>,
    #[comptime] first: usize,
    #[comptime] second: usize,
) -> Array<Pair<S>> {
    let mut out = Array::<Pair<S>>::new(2usize);
    out[0usize] = from[first];
    out[1usize] = from[second];
    out
}

/// A sum of 16×8 that starts at `value`.
#[cube]
pub(crate) fn sum_of<T: Float>(value: T) -> Array<Pair<T>> {
    let mut sum = Array::<Pair<T>>::new(2usize);
    sum[0usize] = Vector::new(value);
    sum[1usize] = Vector::new(value);
    sum
}

/// Another sum that starts at the same numbers.
#[cube]
pub(crate) fn copied<T: Float>(sum: &Array<Pair<T>>) -> Array<Pair<T>> {
    let mut copy = Array::<Pair<T>>::new(2usize);
    copy[0usize] = sum[0usize];
    copy[1usize] = sum[1usize];
    copy
}
