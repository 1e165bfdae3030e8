//! Two operands of one name.

#[flora_macros::layer]
fn ia3(x: Tokens<D>, w0: Weight<D, K>, l: Adapter<K>, l: Adapter<K>) -> Tokens<K> {
    l * x.matmul(w0)
}

fn main() {}
