//! A return type that isn't the output's.

#[flora_macros::layer]
fn linear(x: Tokens<D>, w0: Weight<D, K>) -> Tokens<D> {
    x.matmul(w0)
}

fn main() {}
