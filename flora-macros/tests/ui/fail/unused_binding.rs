//! A binding that the output doesn't depend on.

#[flora_macros::layer]
fn lora(x: Tokens<D>, w0: Weight<D, K>, b: Adapter<D, R>, a: Adapter<R, K>) -> Tokens<K> {
    let half = 0.5 * b;
    x.matmul(w0 + b.matmul(a))
}

fn main() {}
