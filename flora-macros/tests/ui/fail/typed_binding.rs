//! A binding with a type.

#[flora_macros::layer]
fn lora(x: Tokens<D>, w0: Weight<D, K>, b: Adapter<D, R>, a: Adapter<R, K>) -> Tokens<K> {
    let delta: Weight<D, K> = b.matmul(a);
    x.matmul(w0 + delta)
}

fn main() {}
