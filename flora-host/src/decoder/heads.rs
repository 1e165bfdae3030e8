//! How a model's attention is cut.

/// Heads of a model's attention.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Heads {
    /// Query heads, a multiple of the key-value heads.
    pub queries: usize,
    /// Key-value heads.
    pub keys: usize,
    /// Numbers of a head.
    pub size: usize,
}
