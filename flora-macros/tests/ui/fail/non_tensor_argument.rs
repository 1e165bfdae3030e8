//! An argument that is no tensor.

#[flora_macros::layer]
fn scaled(x: Tokens<D>, w0: Weight<D, K>, rank: usize) -> Tokens<K> {
    rank * x.matmul(w0)
}

fn main() {}
