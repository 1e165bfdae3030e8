//! No equation.

#[flora_macros::layer]
fn linear(x: Tokens<D>, w0: Weight<D, K>) -> Tokens<K> {}

fn main() {}
