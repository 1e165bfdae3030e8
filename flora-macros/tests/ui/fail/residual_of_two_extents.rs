//! A residual with its rows written out.

#[flora_macros::layer]
fn residual(x: Tokens<D>, w0: Weight<D, K>, r: Residual<T, K>) -> Tokens<K> {
    x.matmul(w0) + r
}

fn main() {}
