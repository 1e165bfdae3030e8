//! A declared element type that isn't the output's.

#[flora_macros::layer]
fn linear(x: Tokens<D, f16>, w0: Weight<D, K, f16>) -> Tokens<K, bf16> {
    x.matmul(w0)
}

fn main() {}
