//! A layer written by another macro, whose fragments arrive in invisible groups.

macro_rules! scaled {
    ($name:ident, $input:ty, $factor:expr) => {
        #[flora_macros::layer]
        fn $name(x: $input, w0: Weight<D, K>) -> Tokens<K> {
            $factor * x.matmul(w0)
        }
    };
}

scaled!(half, Tokens<D>, 0.25 + 0.25);

fn main() {
    half::layer();
}
