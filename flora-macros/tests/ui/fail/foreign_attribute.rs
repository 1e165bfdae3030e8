//! An attribute that means nothing to an equation.

#[flora_macros::layer]
#[inline]
fn linear(x: Tokens<D>, w0: Weight<D, K>) -> Tokens<K> {
    x.matmul(w0)
}

fn main() {}
