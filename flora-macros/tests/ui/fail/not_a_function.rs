//! The attribute on something else than a function.

#[flora_macros::layer]
struct Linear;

fn main() {}
