//! A semicolon after the output.

#[flora_macros::layer]
fn linear(x: Tokens<D>, w0: Weight<D, K>) -> Tokens<K> {
    x.matmul(w0);
}

fn main() {}
