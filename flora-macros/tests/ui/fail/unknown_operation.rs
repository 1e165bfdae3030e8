//! An operation with a slip in its name.

#[flora_macros::layer]
fn linear(x: Tokens<D>, w0: Weight<D, K>) -> Tokens<K> {
    x.matmull(w0)
}

fn main() {}
