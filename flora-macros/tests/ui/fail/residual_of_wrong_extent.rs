//! A residual of the input's extent.

#[flora_macros::layer]
fn residual(x: Tokens<D>, w0: Weight<D, K>, r: Residual<D>) -> Tokens<K> {
    x.matmul(w0) + r
}

fn main() {}
