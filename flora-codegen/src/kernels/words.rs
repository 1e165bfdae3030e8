//! Vectors of any type as words of 32 bits, which is how a unit keeps what it has fetched: halves would each take a register of
//! CUDA's, and be packed again with an instruction for two.

use cubecl::prelude::*;

/// Words of a vector of `width` elements of `bytes` bytes; a half that has no neighbour is widened.
pub(crate) fn word_count(width: usize, bytes: usize) -> usize {
    (width * bytes).div_ceil(4)
}

#[cube]
pub(crate) fn to_words<T: Numeric, V: Size, P: Size>(value: Vector<T, V>) -> Vector<u32, P> {
    let width = V::value();
    let bytes = T::type_size();
    if comptime!((width * bytes).is_multiple_of(4)) {
        Vector::<u32, P>::reinterpret(value)
    } else {
        Vector::<u32, P>::reinterpret(Vector::<f32, V>::cast_from(value))
    }
}

/// 1 in every element: from a variable, because CUDA's text has no bits of a number that is written out.
#[cube]
pub(crate) fn ones<T: Float, V: Size, P: Size>() -> Vector<u32, P> {
    let one = RuntimeCell::<Vector<T, V>>::new(Vector::new(T::new(1.0)));
    to_words::<T, V, P>(one.read())
}

#[cube]
pub(crate) fn from_words<T: Numeric, V: Size, P: Size>(words: Vector<u32, P>) -> Vector<T, V> {
    let width = V::value();
    let bytes = T::type_size();
    if comptime!((width * bytes).is_multiple_of(4)) {
        Vector::<T, V>::reinterpret(words)
    } else {
        Vector::<T, V>::cast_from(Vector::<f32, V>::reinterpret(words))
    }
}
