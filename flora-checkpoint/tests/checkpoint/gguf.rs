//! The GGUF reader on small files: what they hold, and one error per mistake.

use crate::gguf_writer::{File, Tensor, Value};
use flora_checkpoint::gguf::{Gguf, GgufProblem, MetadataValue, PlacementProblem};
use flora_checkpoint::{FileError, SharedBytes, TensorProblem};
use std::path::Path;

fn parse(file: &File) -> Result<Gguf, FileError> {
    Gguf::parse(Path::new("x.gguf"), file.bytes().0.into())
}

fn problem(file: &File) -> GgufProblem {
    match parse(file) {
        Err(FileError::Gguf { problem, .. }) => problem,
        other => panic!("expected a GGUF problem, got {other:?}"),
    }
}

fn one_tensor() -> File {
    File { version: 3, metadata: vec![], tensors: vec![Tensor::f32("t", &[3, 5], &[0.5; 15])] }
}

#[test]
fn metadata_and_tensors_are_read() {
    let gguf = parse(&File::llama(2, 2, 1, 6, 37, 29)).expect("a whole file");
    assert_eq!(gguf.metadata()["llama.block_count"].as_u64(), Some(2));
    let MetadataValue::Array(tokens) = &gguf.metadata()["tokenizer.ggml.tokens"] else { panic!("no array") };
    let tokens: Vec<_> = tokens.iter().map(|token| token.as_str().map(str::to_string)).collect();
    assert_eq!(tokens, [Some("a".to_string()), Some("bc".to_string()), Some(String::new())]);
    let weight = gguf.tensors().get("blk.1.ffn_down.weight").expect("a tensor");
    assert_eq!(weight.shape(), [37, 29]);
    assert_eq!(weight.to_f32()[30], 13_000.0 + 30.0);
}

#[test]
fn version_2_is_read_and_others_are_refused() {
    for (version, is_read) in [(1, false), (2, true), (3, true), (4, false), (3 << 24, false)] {
        let file = File { version, ..one_tensor() };
        assert_eq!(parse(&file).is_ok(), is_read, "version {version}");
    }
}

#[test]
fn a_file_cut_anywhere_is_an_error() {
    let (bytes, end) = File::llama(1, 2, 1, 2, 5, 3).bytes();
    for length in 0..end {
        let cut: SharedBytes = bytes[..length].to_vec().into();
        assert!(Gguf::parse(Path::new("x.gguf"), cut).is_err(), "cut at byte {length} of {end}");
    }
    assert!(Gguf::parse(Path::new("x.gguf"), bytes[..end].to_vec().into()).is_ok(), "only padding is missing");
}

#[test]
fn claimed_lengths_are_not_believed() {
    let huge = u64::MAX.to_le_bytes();
    let mut array = 4u32.to_le_bytes().to_vec();
    array.extend(huge);
    let mut strings = 8u32.to_le_bytes().to_vec();
    strings.extend(huge);
    for value in [Value::raw(9, &array), Value::raw(9, &strings), Value::raw(8, &huge)] {
        let file = File { metadata: vec![("k".into(), value)], ..one_tensor() };
        assert!(matches!(problem(&file), GgufProblem::Truncated { .. }));
    }
    let mut bytes = one_tensor().bytes().0;
    bytes[8..16].copy_from_slice(&huge);
    assert!(Gguf::parse(Path::new("x.gguf"), bytes.into()).is_err());
}

#[test]
fn wrong_metadata_is_refused() {
    let with = |key: &str, value| File { metadata: vec![(key.into(), value)], ..one_tensor() };
    assert!(matches!(problem(&with("k", Value::raw(13, &[]))), GgufProblem::UnknownValueType { found: 13, .. }));
    let nested = [9u32.to_le_bytes().as_slice(), &1u64.to_le_bytes()].concat();
    assert!(matches!(problem(&with("k", Value::raw(9, &nested))), GgufProblem::NestedArray { .. }));
    for alignment in [0, 7, 12] {
        let found = problem(&with("general.alignment", Value::u32(alignment)));
        assert_eq!(found, GgufProblem::Alignment { found: alignment });
    }
    let twice = vec![("k".into(), Value::u32(1)), ("k".into(), Value::u32(1))];
    assert_eq!(problem(&File { metadata: twice, ..one_tensor() }), GgufProblem::Repeated { name: "k".into() });
    let mut bytes = one_tensor().bytes().0;
    bytes[32] = 0xff; // the first byte of the tensor's name
    let parsed = Gguf::parse(Path::new("x.gguf"), bytes.into());
    assert!(matches!(parsed, Err(FileError::Gguf { problem: GgufProblem::NotUtf8 { .. }, .. })), "{parsed:?}");
}

#[test]
fn wrong_tensors_are_refused() {
    let placed = |offset| {
        let mut file = one_tensor();
        file.tensors[0].offset = Some(offset);
        match problem(&file) {
            GgufProblem::Placement { problem, .. } => problem,
            other => panic!("expected a misplaced tensor, got {other:?}"),
        }
    };
    assert_eq!(placed(8), PlacementProblem::Unaligned);
    assert_eq!(placed(64), PlacementProblem::OutsideFile);
    assert_eq!(placed(u64::MAX - 31), PlacementProblem::OutsideFile);

    let mut file = one_tensor();
    file.tensors.push(Tensor { offset: Some(32), ..Tensor::f32("u", &[3, 5], &[0.5; 15]) });
    assert!(matches!(problem(&file), GgufProblem::Placement { problem: PlacementProblem::Overlap, .. }));
    file.tensors[1] = Tensor::f32("t", &[1], &[0.5]);
    assert_eq!(problem(&file), GgufProblem::Repeated { name: "t".into() });

    let mut file = one_tensor();
    file.tensors[0].shape = vec![1, 1, 1, 3, 5];
    assert!(matches!(problem(&file), GgufProblem::TooManyExtents { found: 5, .. }));
    file.tensors[0].shape = vec![u64::MAX, 3];
    assert!(matches!(parse(&file), Err(FileError::Tensor { problem: TensorProblem::TooLarge { .. }, .. })));
}

#[test]
fn an_unknown_tensor_type_is_an_error_to_whoever_asks_for_it() {
    let mut file = one_tensor();
    file.tensors[0].ggml_type = 16;
    let gguf = parse(&file).expect("other tensors may still be read");
    let error = gguf.tensors().get("t").expect_err("no decoder").to_string();
    assert!(error.contains("IQ2_XXS") && error.contains("`t`"), "{error}");
    let error = gguf.tensors().get("tt").expect_err("no tensor").to_string();
    assert!(error.contains("closest name in the file is `t`"), "{error}");
}
