//! An adapter factor that is transposed.

#[flora_macros::layer]
fn query(x: Tokens<D>, w0: Weight<D, K>, b: Adapter<D, R>, a: Adapter<K, R>) -> Tokens<K> {
    x.matmul(w0 * b.matmul(a))
}

fn main() {}
