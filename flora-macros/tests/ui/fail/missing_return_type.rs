//! No return type.

#[flora_macros::layer]
fn linear(x: Tokens<D>, w0: Weight<D, K>) {
    x.matmul(w0)
}

fn main() {}
