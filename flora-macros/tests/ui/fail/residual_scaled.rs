//! A residual that an adapter scales.

#[flora_macros::layer]
fn residual(x: Tokens<D>, w0: Weight<D, K>, r: Residual<K>, l: Adapter<K>) -> Tokens<K> {
    x.matmul(w0) + l * r
}

fn main() {}
