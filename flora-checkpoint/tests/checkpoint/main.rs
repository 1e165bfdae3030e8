//! Files through the public interface: what is read is right, and what is wrong is refused.

mod blocks;
mod decoder;
mod families;
mod foreign;
mod fuzz;
mod gguf;
mod gguf_writer;
mod golden;
mod kinds;
mod model;
mod mutation;
mod peft;
mod rotary;
mod settings;
mod split;
mod tensors;

use std::path::PathBuf;

/// Writes `bytes` as `name` into a folder that lives as long as the returned guard.
fn file(name: &str, bytes: &[u8]) -> (tempfile::TempDir, PathBuf) {
    let folder = tempfile::tempdir().expect("a temporary folder");
    let path = folder.path().join(name);
    std::fs::write(&path, bytes).expect("writing a temporary file");
    (folder, path)
}
