//! The item that takes the function's place raises no lint, keeps visibility and documentation, and hides no name.
#![deny(warnings, missing_docs, unreachable_pub, clippy::all)]

mod layers {
    /// A linear layer.
    #[flora_macros::layer]
    pub(crate) fn linear(x: Tokens<D>, w0: Weight<D, K>) -> Tokens<K> {
        x.matmul(w0)
    }

    /// A layer that nobody should use, and that nobody does.
    #[flora_macros::layer]
    #[deprecated]
    #[allow(dead_code)]
    fn old(x: Tokens<D>, w0: Weight<D, K>) -> Tokens<K> {
        x.matmul(w0)
    }

    /// A layer that is configured away.
    #[flora_macros::layer]
    #[cfg(any())]
    pub(super) fn absent(x: Tokens<D>, w0: Weight<D, K>) -> Tokens<K> {
        x.matmul(w0)
    }
}

fn main() {
    /// A layer of a function's own, named by a keyword.
    #[flora_macros::layer]
    fn r#type(r#in: Tokens<576>, w0: Weight<576, 1536>) -> Tokens<1536> {
        r#in.matmul(w0)
    }

    let linear = layers::linear::layer();
    let r#type = r#type::layer();
    drop((linear, r#type));
}
