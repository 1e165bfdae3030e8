//! The `flora` command.
fn main() {}
