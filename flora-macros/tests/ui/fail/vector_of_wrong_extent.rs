//! An output scale as long as the input.

#[flora_macros::layer]
fn ia3(x: Tokens<D>, w0: Weight<D, K>, l: Adapter<D>) -> Tokens<K> {
    l * x.matmul(w0)
}

fn main() {}
