//! Plain tensor files, and safetensors files that are damaged on purpose.

use crate::file;
use flora_checkpoint::{FileError, Matrix, Operand, SafetensorsProblem, TensorFile, read_matrices, write_matrices};
use std::collections::BTreeMap;

fn damaged(header: &str, data: usize) -> FileError {
    let mut bytes = (header.len() as u64).to_le_bytes().to_vec();
    bytes.extend(header.as_bytes());
    bytes.resize(bytes.len() + data, 0);
    let (_folder, path) = file("x.safetensors", &bytes);
    read_matrices(&path).expect_err(header)
}

#[test]
fn writing_and_reading_are_inverse_and_replace_the_file() {
    let (_folder, path) = file("x.safetensors", b"old");
    let matrix = Matrix { rows: 3, columns: 2, values: vec![0.0, -1.5, f32::MIN_POSITIVE, 3.25, f32::MAX, 1e-40] };
    let empty = Matrix { rows: 0, columns: 7, values: vec![] };
    let matrices: BTreeMap<_, _> = [("a.b".to_string(), matrix), ("c".to_string(), empty)].into();
    write_matrices(&path, &matrices).expect("writable matrices");
    assert_eq!(read_matrices(&path).expect("what was written"), matrices);

    let wrong = Matrix { rows: 3, columns: 2, values: vec![0.0; 5] };
    assert!(write_matrices(&path, &[("w".to_string(), wrong)].into()).is_err());
    assert_eq!(read_matrices(&path).expect("the old content"), matrices);
    assert!(write_matrices(&path.join("nowhere"), &matrices).is_err());
}

#[test]
fn a_file_cut_anywhere_is_an_error() {
    let (_folder, path) = file("x.safetensors", b"");
    let matrix = Matrix { rows: 3, columns: 5, values: vec![0.5; 15] };
    write_matrices(&path, &[("m".to_string(), matrix)].into()).expect("writable matrices");
    let bytes = std::fs::read(&path).expect("what was written");
    for length in 0..bytes.len() {
        std::fs::write(&path, &bytes[..length]).expect("writing a cut file");
        assert!(read_matrices(&path).is_err(), "cut at byte {length}");
    }
    let longer = [&bytes[..], b"x"].concat();
    std::fs::write(&path, longer).expect("writing a longer file");
    assert!(read_matrices(&path).is_err(), "bytes that belong to no tensor");
}

#[test]
fn hostile_headers_are_refused() {
    let tensor = |name: &str, shape: &str, start: u64, end: u64| {
        format!(r#""{name}": {{"dtype": "F32", "shape": {shape}, "data_offsets": [{start}, {end}]}}"#)
    };
    let cases = [
        (format!("{{{}, {}}}", tensor("a", "[1, 2]", 0, 8), tensor("b", "[1, 2]", 4, 12)), 12, "invalid offset"),
        (format!("{{{}, {}}}", tensor("a", "[1, 2]", 0, 8), tensor("b", "[1, 2]", 12, 20)), 20, "invalid offset"),
        (format!("{{{}, {}}}", tensor("a", "[1, 2]", 0, 8), tensor("a", "[2, 1]", 0, 8)), 8, "there twice"),
        (format!("{{{}}}", tensor("a", "[1, 2]", 0, 16)), 8, "past the end"),
        (format!("{{{}}}", tensor("a", "[1, 2]", 8, 0)), 8, "offset"),
        (format!("{{{}}}", tensor("a", "[1, 3]", 0, 8)), 8, "shape"),
        (format!("{{{}}}", tensor("a", "[4294967296, 4294967296]", 0, 0)), 0, "overflow"),
        (format!("{{{}}}", tensor("a", "[-1, 2]", 0, 8)), 8, "whole safetensors"),
        (format!("{{{}}}", tensor("a", "[1, 2]", 0, u64::MAX)), 8, "past the end"),
        ("[]".to_string(), 0, "whole safetensors"),
        ("{".to_string(), 0, "x.safetensors"),
        (r#"{"a": 1}"#.to_string(), 0, "whole safetensors"),
        (r#"{"a": {"dtype": "F31", "shape": [1], "data_offsets": [0, 4]}}"#.to_string(), 4, "whole safetensors"),
    ];
    for (header, data, expected) in cases {
        let message = damaged(&header, data).to_string();
        assert!(message.contains(expected), "{header}: {message}");
    }
}

/// Eight tensors of 2⁶¹ bytes end at 2⁶⁴: a sum that the safetensors crate does not check for overflow.
#[test]
fn offsets_whose_sum_overflows_are_refused() {
    let eighth = 1u64 << 61;
    let tensors: Vec<String> = (0..8)
        .map(|i| {
            let (start, end) = (i * eighth, (i + 1).saturating_mul(eighth));
            let bytes = end - start;
            format!(r#""{i}": {{"dtype": "U8", "shape": [{bytes}], "data_offsets": [{start}, {end}]}}"#)
        })
        .collect();
    let error = damaged(&format!("{{{}}}", tensors.join(", ")), 0);
    assert!(matches!(error, FileError::Safetensors { problem: SafetensorsProblem::OutsideFile { .. }, .. }), "{error}");
}

#[test]
fn a_header_longer_than_the_file_is_not_allocated() {
    for claimed in [100, 1 << 25, 1 << 40, u64::MAX] {
        let (_folder, path) = file("x.safetensors", &u64::to_le_bytes(claimed));
        assert!(matches!(read_matrices(&path), Err(FileError::Safetensors { .. })), "{claimed}");
    }
}

#[test]
fn only_finite_matrices_are_read() {
    let header = r#"{"v": {"dtype": "F32", "shape": [2], "data_offsets": [0, 8]}}"#;
    assert!(damaged(header, 8).to_string().contains("tensor `v` has the shape [2] where a matrix is needed"));
    let header = r#"{"v": {"dtype": "I64", "shape": [1, 1], "data_offsets": [0, 8]}}"#;
    assert!(damaged(header, 8).to_string().contains("element type I64"));
}

#[test]
fn state_is_read_back_bit_for_bit_with_its_notes() {
    let (_folder, path) = file("x.safetensors", b"old");
    let tensor = |shape: &[usize], values: &[f32]| Operand { shape: shape.to_vec(), values: values.to_vec() };
    let nan = f32::from_bits(0x7fc1_2345);
    let tensors = [
        ("s".to_owned(), tensor(&[], &[-0.0])),
        ("v".to_owned(), tensor(&[3], &[nan, f32::NEG_INFINITY, 1e-42])),
        ("m".to_owned(), tensor(&[2, 1], &[1.0, 2.0])),
    ];
    let notes = [("state".to_owned(), r#"{"step": 3, "name": "ö"}"#.to_owned())];
    let written = TensorFile { tensors: tensors.into(), notes: notes.into() };
    written.write(&path).expect("a writable file");
    let again = TensorFile::read(&path).expect("what was written");
    assert_eq!(again.notes, written.notes);
    for (name, tensor) in &written.tensors {
        let bits = |tensor: &Operand| tensor.values.iter().map(|value| value.to_bits()).collect::<Vec<_>>();
        assert_eq!((&again.tensors[name].shape, bits(&again.tensors[name])), (&tensor.shape, bits(tensor)), "{name}");
    }
    let wrong = TensorFile { tensors: [("w".to_owned(), tensor(&[2], &[1.0]))].into(), ..TensorFile::default() };
    assert!(wrong.write(&path).is_err());
    assert!(TensorFile::read(&path).is_ok(), "the old content");
    let bytes = std::fs::read(&path).expect("what was written");
    for length in 0..bytes.len() {
        std::fs::write(&path, &bytes[..length]).expect("writing a cut file");
        assert!(TensorFile::read(&path).is_err(), "cut at byte {length}");
    }
}
