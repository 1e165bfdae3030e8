//! Control flow.

#[flora_macros::layer]
fn gated(x: Tokens<D>, w0: Weight<D, K>, s: Scale) -> Tokens<K> {
    if s { x.matmul(w0) } else { x.matmul(w0).relu() }
}

fn main() {}
