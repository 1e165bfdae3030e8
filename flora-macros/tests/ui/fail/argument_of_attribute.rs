//! The attribute takes no arguments.

#[flora_macros::layer(rank = 4)]
fn linear(x: Tokens<D>, w0: Weight<D, K>) -> Tokens<K> {
    x.matmul(w0)
}

fn main() {}
