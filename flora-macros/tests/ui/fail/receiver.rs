//! A method instead of a function.

struct Model;

impl Model {
    #[flora_macros::layer]
    fn linear(self, x: Tokens<D>, w0: Weight<D, K>) -> Tokens<K> {
        x.matmul(w0)
    }
}

fn main() {}
