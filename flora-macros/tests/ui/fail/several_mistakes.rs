//! Every mistake is reported at once, and a layer with mistakes can still be named.

#[flora_macros::layer]
fn query(x: Tokens<D>, w0: Matrix<D, K>, b: Adapter<D, R>, &a: Adapter<R, K>) -> Tokens<K> {
    let delta = b.matmul(c);
    x.matmull(w0 * delta).swish()
}

fn main() {
    let _layer = query::layer();
}
