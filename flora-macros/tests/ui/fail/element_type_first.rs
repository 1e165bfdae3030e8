//! The element type before the extents.

#[flora_macros::layer]
fn linear(x: Tokens<D>, w0: Weight<f16, D, K>) -> Tokens<K> {
    x.matmul(w0)
}

fn main() {}
