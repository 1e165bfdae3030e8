//! Models that are cut into several GGUF files.

use crate::gguf_writer::{File, Value};
use flora_checkpoint::gguf::Gguf;
use flora_checkpoint::{Model, ModelError};
use std::path::{Path, PathBuf};

/// `whole` in `count` files as llama.cpp cuts it: tensors in turn, the model's metadata in the first.
pub(crate) fn split(whole: impl Fn() -> File, count: u16) -> Vec<File> {
    let tensors = whole().tensors.len() as u32;
    let one = |number: u16| {
        let mut file = whole();
        let mut at = 0;
        file.tensors.retain(|_| {
            at += 1;
            (at - 1) % count == number
        });
        if number > 0 {
            file.metadata.clear();
        }
        file.metadata.push(("split.no".into(), Value::raw(2, &number.to_le_bytes())));
        file.metadata.push(("split.count".into(), Value::raw(2, &count.to_le_bytes())));
        file.metadata.push(("split.tensors.count".into(), Value::raw(5, &tensors.to_le_bytes())));
        file
    };
    (0..count).map(one).collect()
}

pub(crate) fn name(number: usize, count: usize) -> String {
    format!("m-{number:05}-of-{count:05}.gguf")
}

fn written(files: &[File]) -> (tempfile::TempDir, Vec<PathBuf>) {
    let folder = tempfile::tempdir().expect("a temporary folder");
    let path = |(at, file): (usize, &File)| {
        let path = folder.path().join(name(at + 1, files.len()));
        std::fs::write(&path, file.bytes().0).expect("writing a file");
        path
    };
    let paths = files.iter().enumerate().map(path).collect();
    (folder, paths)
}

fn llama() -> File {
    let mut file = File::llama(2, 2, 1, 6, 5, 3);
    file.metadata.retain(|(key, _)| key != "general.name");
    file
}

fn refused(path: &Path, expected: &str) {
    let error = Model::open(path).expect_err(expected);
    assert!(matches!(error, ModelError::File(_)), "{error:?}");
    let error = error.to_string();
    assert!(error.contains(expected), "{error}");
}

#[test]
fn any_of_the_files_opens_the_model() {
    let (_folder, whole) = crate::file("m.gguf", &llama().bytes().0);
    let whole = Model::open(&whole).expect("a whole model");
    let (_folder, paths) = written(&split(llama, 3));
    for path in &paths {
        let model = Model::open(path).expect("a model");
        assert_eq!(model.name(), "m");
        assert_eq!(model.decoder().expect("a decoder"), whole.decoder().expect("a decoder"));
        for projection in whole.projections() {
            let of = |model: &Model| model.weight(&projection.path).expect("a weight");
            assert_eq!(of(&model), of(&whole));
        }
        assert!(model.parameters().eq(whole.parameters()));
        // Tokenizers are read of the metadata, which the first file has.
        assert!(Gguf::open(path).expect("a file").metadata().contains_key("tokenizer.ggml.tokens"));
    }
}

#[test]
fn a_missing_file_and_files_of_other_models_are_named() {
    let (_folder, paths) = written(&split(llama, 3));
    std::fs::remove_file(&paths[1]).expect("removing a file");
    refused(&paths[0], "`m-00002-of-00003.gguf` isn't beside it");
    refused(&paths[2], "`m-00002-of-00003.gguf` isn't beside it");

    let (folder, paths) = written(&split(llama, 2));
    let renamed = folder.path().join("first.gguf");
    std::fs::copy(&paths[0], &renamed).expect("copying a file");
    refused(&renamed, "its name has to end in `-00001-of-00002.gguf`");
    std::fs::copy(&paths[0], &paths[1]).expect("copying a file");
    refused(&paths[0], "by its name it is number 2 of 2");

    let changed = |change: &dyn Fn(&mut Vec<File>)| {
        let mut files = split(llama, 2);
        change(&mut files);
        written(&files)
    };
    let (_folder, paths) = changed(&|files| {
        let repeated = split(llama, 2).remove(0).tensors.remove(0);
        files[1].tensors.push(repeated);
    });
    refused(&paths[0], "is in another of the model's files too");
    let (_folder, paths) = changed(&|files| drop(files[1].tensors.pop()));
    refused(&paths[0], "tensors and say to have 20");
    let (_folder, paths) = changed(&|files| {
        files[0].metadata.retain(|(key, _)| key != "split.no");
        files[0].metadata.push(("split.no".into(), Value::raw(2, &9u16.to_le_bytes())));
    });
    refused(&paths[0], "number 9 of 2 files");
}
