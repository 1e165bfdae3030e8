//! A modifier that an equation has no use for.

#[flora_macros::layer]
unsafe fn linear(x: Tokens<D>, w0: Weight<D, K>) -> Tokens<K> {
    x.matmul(w0)
}

fn main() {}
