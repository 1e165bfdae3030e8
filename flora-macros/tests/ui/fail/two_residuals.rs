//! Two residuals.

#[flora_macros::layer]
fn residual(x: Tokens<D>, w0: Weight<D, K>, one: Residual<K>, other: Residual<K>) -> Tokens<K> {
    x.matmul(w0) + one + other
}

fn main() {}
