//! A tensor type with a slip in its name.

#[flora_macros::layer]
fn ia3(x: Tokens<D>, w0: Weight<D, K>, l: Adaptor<K>) -> Tokens<K> {
    l * x.matmul(w0)
}

fn main() {}
