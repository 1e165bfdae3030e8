//! Two inputs.

#[flora_macros::layer]
fn sum(x: Tokens<D>, y: Tokens<D>, w0: Weight<D, K>) -> Tokens<K> {
    (x + y).matmul(w0)
}

fn main() {}
