//! A residual as the output.

#[flora_macros::layer]
fn residual(x: Tokens<D>, w0: Weight<D, K>, r: Residual<K>) -> Residual<K> {
    x.matmul(w0) + r
}

fn main() {}
