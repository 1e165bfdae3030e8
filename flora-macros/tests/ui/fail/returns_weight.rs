//! A return type that is no output.

#[flora_macros::layer]
fn linear(x: Tokens<D>, w0: Weight<D, K>) -> Weight<D, K> {
    x.matmul(w0)
}

fn main() {}
