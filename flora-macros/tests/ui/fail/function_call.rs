//! An operation called as a function.

#[flora_macros::layer]
fn linear(x: Tokens<D>, w0: Weight<D, K>) -> Tokens<K> {
    relu(x.matmul(w0))
}

fn main() {}
