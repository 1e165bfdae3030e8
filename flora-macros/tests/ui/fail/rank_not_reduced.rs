//! The terms of Eq. 5 without their sum.

#[flora_macros::layer]
fn query(x: Tokens<D>, w0: Weight<D, K>, b: Adapter<D, R>, a: Adapter<R, K>) -> Tokens<K> {
    (x * b.columns()).matmul(w0) * a.rows()
}

fn main() {}
