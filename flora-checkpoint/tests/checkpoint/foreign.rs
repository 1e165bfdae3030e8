//! What people give that is no model: the error says what it is, and what to do.

use crate::decoder::LLAMA_CONFIG;
use crate::model::folder;
use flora_checkpoint::{FileError, Model, ModelError};
use std::path::Path;

const POINTER: &[u8] = b"version https://git-lfs.github.com/spec/v1\noid sha256:4d7a\nsize 12345\n";

#[test]
fn a_folder_of_pickles_says_how_to_convert() {
    for name in ["pytorch_model.bin", "pytorch_model-00001-of-00002.bin", "consolidated.00.pth"] {
        let folder = folder(LLAMA_CONFIG, &[(name, b"PK".to_vec()), ("training_args.bin", b"PK".to_vec())]);
        for path in [folder.path().to_owned(), folder.path().join(name)] {
            let error = Model::open(&path).expect_err("a pickle");
            assert!(matches!(&error, ModelError::ForeignWeights { path } if path.ends_with(name)), "{error:?}");
            let error = error.to_string();
            assert!(error.contains(name) && error.contains("save_pretrained"), "{error}");
        }
    }
}

#[test]
fn a_pointer_of_git_lfs_is_named_whatever_the_file() {
    let pointer = |name: &str| {
        let config = if name == "config.json" { std::str::from_utf8(POINTER).expect("text") } else { LLAMA_CONFIG };
        let folder = folder(config, &[]);
        std::fs::write(folder.path().join(name), POINTER).expect("writing a pointer");
        let path = if name.ends_with(".gguf") { folder.path().join(name) } else { folder.path().to_owned() };
        let error = Model::open(&path).expect_err("a pointer");
        let ModelError::File(FileError::LfsPointer { path }) = &error else { panic!("{name}: {error:?}") };
        assert!(path.ends_with(name) && error.to_string().contains("git lfs pull"), "{error}");
    };
    ["model.safetensors", "config.json", "model.safetensors.index.json", "m.gguf"].into_iter().for_each(pointer);
}

#[test]
fn a_repository_s_name_is_no_path() {
    let error = Model::open(Path::new("meta-llama/Llama-3.2-1B")).expect_err("no such folder");
    assert!(matches!(&error, ModelError::Repository { id } if id == "meta-llama/Llama-3.2-1B"), "{error:?}");
    let error = error.to_string();
    assert!(error.contains("hf download meta-llama/Llama-3.2-1B"), "{error}");
    let error = Model::open(Path::new("/none/there")).expect_err("no such folder");
    assert!(matches!(error, ModelError::File(FileError::Io { .. })), "{error:?}");
}

#[test]
fn a_folder_with_a_gguf_file_alone_says_so() {
    let folder = tempfile::tempdir().expect("a temporary folder");
    std::fs::write(folder.path().join("m.gguf"), b"GGUF").expect("writing a file");
    let error = Model::open(folder.path()).expect_err("no config").to_string();
    assert!(error.contains("m.gguf, which can be given itself"), "{error}");
}

#[test]
fn an_adapter_is_no_model() {
    let folder = tempfile::tempdir().expect("a temporary folder");
    std::fs::write(folder.path().join("adapter_config.json"), "{}").expect("writing a file");
    let error = Model::open(folder.path()).expect_err("an adapter").to_string();
    assert!(error.contains("it holds an adapter"), "{error}");
}
