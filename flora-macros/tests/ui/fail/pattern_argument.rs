//! An operand taken apart by a pattern.

#[flora_macros::layer]
fn lora(x: Tokens<D>, w0: Weight<D, K>, (b, a): Adapter<D, K>) -> Tokens<K> {
    x.matmul(w0 + b.matmul(a))
}

fn main() {}
