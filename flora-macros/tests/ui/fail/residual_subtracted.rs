//! A residual that is subtracted, which is a product with -1.

#[flora_macros::layer]
fn residual(x: Tokens<D>, w0: Weight<D, K>, r: Residual<K>) -> Tokens<K> {
    x.matmul(w0) - r
}

fn main() {}
