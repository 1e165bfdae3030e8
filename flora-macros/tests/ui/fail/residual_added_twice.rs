//! One residual, added twice.

#[flora_macros::layer]
fn residual(x: Tokens<D>, w0: Weight<D, K>, r: Residual<K>) -> Tokens<K> {
    r + x.matmul(w0) + r
}

fn main() {}
