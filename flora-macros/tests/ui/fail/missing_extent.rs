//! A matrix with one extent.

#[flora_macros::layer]
fn linear(x: Tokens<D>, w0: Weight<D>) -> Tokens<K> {
    x.matmul(w0)
}

fn main() {}
