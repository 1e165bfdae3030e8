//! A residual that is added before the activation.

#[flora_macros::layer]
fn residual(x: Tokens<D>, w0: Weight<D, K>, r: Residual<K>) -> Tokens<K> {
    (x.matmul(w0) + r).relu()
}

fn main() {}
