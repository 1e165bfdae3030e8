//! A binding taken apart by a pattern.

#[flora_macros::layer]
fn lora(x: Tokens<D>, w0: Weight<D, K>, b: Adapter<D, R>, a: Adapter<R, K>) -> Tokens<K> {
    let [left, right] = b;
    x.matmul(w0 + left.matmul(right) + a)
}

fn main() {}
