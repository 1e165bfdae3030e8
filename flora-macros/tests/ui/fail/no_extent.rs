//! An extent that is a Rust type.

#[flora_macros::layer]
fn linear(x: Tokens<D>, w0: Weight<D, Vec<K>>) -> Tokens<K> {
    x.matmul(w0)
}

fn main() {}
