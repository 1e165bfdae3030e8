//! An operand that can change.

#[flora_macros::layer]
fn linear(mut x: Tokens<D>, w0: Weight<D, K>) -> Tokens<K> {
    x.matmul(w0)
}

fn main() {}
