//! An operand that the equation doesn't use.

#[flora_macros::layer]
fn lora(x: Tokens<D>, w0: Weight<D, K>, b: Adapter<D, R>, a: Adapter<R, K>, s: Scale) -> Tokens<K> {
    x.matmul(w0 + b.matmul(a))
}

fn main() {}
