//! No base weight.

#[flora_macros::layer]
fn low_rank(x: Tokens<D>, b: Adapter<D, R>, a: Adapter<R, K>) -> Tokens<K> {
    x.matmul(b).matmul(a)
}

fn main() {}
