//! A name that is not declared.

#[flora_macros::layer]
fn lora(x: Tokens<D>, weight: Weight<D, K>, b: Adapter<D, R>, a: Adapter<R, K>) -> Tokens<K> {
    x.matmul(wieght + b.matmul(a))
}

fn main() {}
