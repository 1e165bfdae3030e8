//! An operator that equations don't have.

#[flora_macros::layer]
fn scaled(x: Tokens<D>, w0: Weight<D, K>, s: Scale) -> Tokens<K> {
    x.matmul(w0) % s
}

fn main() {}
