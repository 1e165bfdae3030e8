//! A residual that nothing adds.

#[flora_macros::layer]
fn residual(x: Tokens<D>, w0: Weight<D, K>, r: Residual<K>) -> Tokens<K> {
    x.matmul(w0)
}

fn main() {}
