//! The factors of two adapters of different ranks.

#[flora_macros::layer]
fn two(x: Tokens<D>, w0: Weight<D, K>, b: Adapter<D, R>, a: Adapter<R, K>, c: Adapter<Q, K>) -> Tokens<K> {
    x.matmul(w0 + b.matmul(a) + b.matmul(c))
}

fn main() {}
