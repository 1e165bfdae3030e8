//! What people give that is no model that can be read, but could be made one: said with the command that does it.

use std::path::Path;

/// Whether a file of that name holds weights in a format of a framework's own: pickles above all, which run whatever their author
/// put into them when they are read.
pub(super) fn is_weights(name: &str) -> bool {
    const BEGINNINGS: [&str; 4] = ["pytorch_model", "consolidated", "tf_model", "flax_model"];
    const ENDS: [&str; 7] = [".bin", ".pt", ".pth", ".ckpt", ".pkl", ".h5", ".msgpack"];
    BEGINNINGS.iter().any(|beginning| name.starts_with(beginning)) && ENDS.iter().any(|end| name.ends_with(end))
}

/// The name of a repository on a model hub, `OWNER/NAME`, if the path can be one and nothing else: its first part is no folder here.
pub(super) fn repository(path: &Path) -> Option<&str> {
    let text = path.to_str()?.trim_end_matches('/');
    let (owner, name) = text.split_once('/')?;
    let is_name = |part: &str| {
        let is_part = |letter: char| letter.is_ascii_alphanumeric() || "-_.".contains(letter);
        part.starts_with(|letter: char| letter.is_ascii_alphanumeric()) && part.len() <= 96 && part.chars().all(is_part)
    };
    let is_file = [".gguf", ".safetensors", ".bin"].iter().any(|end| name.ends_with(end));
    (is_name(owner) && is_name(name) && !is_file && !Path::new(owner).exists()).then_some(text)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn repositories_are_told_from_paths() {
        for id in ["meta-llama/Llama-3.2-1B", "Qwen/Qwen2.5-0.5B", "a/b", "a/b/"] {
            assert_eq!(repository(Path::new(id)), Some(id.trim_end_matches('/')));
        }
        // `src` is a folder of the crate, where its tests run.
        for path in ["src/none", "/a/b", "./a/b", "../a", "a", "a/b/c", "a/", "models/m.gguf", "a b/c", "~/a"] {
            assert_eq!(repository(Path::new(path)), None, "{path}");
        }
    }

    #[test]
    fn weights_of_frameworks_are_known_by_their_names() {
        for name in ["pytorch_model.bin", "pytorch_model-00001-of-00002.bin", "consolidated.00.pth", "tf_model.h5"] {
            assert!(is_weights(name), "{name}");
        }
        for name in ["model.safetensors", "pytorch_model.bin.index.json", "training_args.bin", "tokenizer.model"] {
            assert!(!is_weights(name), "{name}");
        }
    }
}
