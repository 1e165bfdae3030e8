//! An output that isn't linear in the input.

#[flora_macros::layer]
fn gated(x: Tokens<D>, w0: Weight<D, D>) -> Tokens<D> {
    x * x.matmul(w0)
}

fn main() {}
