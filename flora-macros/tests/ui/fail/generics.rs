//! Extents declared as generics.

#[flora_macros::layer]
fn linear<D, K>(x: Tokens<D>, w0: Weight<D, K>) -> Tokens<K> {
    x.matmul(w0)
}

fn main() {}
