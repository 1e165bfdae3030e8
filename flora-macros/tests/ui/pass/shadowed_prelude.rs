//! The expansion names nothing that the author's scope could hide.
#![no_implicit_prelude]

#[allow(dead_code)]
struct String;
#[allow(dead_code)]
struct Option;

#[::flora_macros::layer]
fn linear(x: Tokens<D>, w0: Weight<D, K>, bias: Bias<K>) -> Tokens<K> {
    (x.matmul(w0) + bias).relu()
}

fn main() {
    linear::layer();
}
