//! A number with a Rust type.

#[flora_macros::layer]
fn scaled(x: Tokens<D>, w0: Weight<D, K>) -> Tokens<K> {
    0.5f32 * x.matmul(w0)
}

fn main() {}
