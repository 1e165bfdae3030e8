//! An activation before the output is complete, which no kernel computes.

#[flora_macros::layer]
fn early(x: Tokens<D>, w0: Weight<D, K>) -> Tokens<K> {
    x.relu().matmul(w0)
}

fn main() {}
