//! Every mistake of the shapes is reported at once.

#[flora_macros::layer]
fn both(x: Tokens<D>, w0: Weight<D, K>, b: Adapter<D, R>, a: Adapter<Q, K>, l: Adapter<D>) -> Tokens<K> {
    l * x.matmul(w0) + x.matmul(b.matmul(a))
}

fn main() {}
