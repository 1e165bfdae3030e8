//! Tuning files that someone has tampered with: every one is refused with the file's name, what is wrong and how to mend it, or it
//! says exactly what was written.

use std::path::Path;

use flora_plan::cost::{CoefficientsError, DeviceCoefficients};
use proptest::prelude::*;
use serde_json::{Value, json};

use crate::coefficients::device;

fn read(text: &[u8]) -> Result<DeviceCoefficients, CoefficientsError> {
    let folder = tempfile::tempdir().expect("a temporary folder");
    let path = folder.path().join("tuning.json");
    std::fs::write(&path, text).expect("a writable folder");
    let read = DeviceCoefficients::read_for(&path, "device 1", "0.1.0");
    if let Err(error) = &read {
        let said = error.to_string();
        assert!(said.contains("tuning.json") && said.contains("run `flora tune`"), "{said}");
    }
    read
}

fn good() -> Value {
    serde_json::to_value(device(1, false)).expect("it is plain data")
}

fn text(value: &Value) -> Vec<u8> {
    serde_json::to_vec(value).expect("JSON")
}

#[test]
fn what_was_written_is_read() {
    assert!(read(&text(&good())).expect("it is whole") == device(1, false), "another came back");
}

#[test]
fn a_missing_file_is_told_from_a_wrong_one() {
    let error = DeviceCoefficients::read(Path::new("/nowhere/tuning.json")).expect_err("there is none");
    assert!(error.is_missing());
    assert!(!read(b"").expect_err("it is empty").is_missing());
}

#[test]
fn another_device_version_or_schema_is_foreign() {
    for (key, value) in
        [("device", json!("device 2")), ("flora", json!("9.9.9")), ("schema", json!(2)), ("schema", json!(4_000_000))]
    {
        let mut changed = good();
        changed[key] = value;
        let error = read(&text(&changed)).expect_err("it is someone else's");
        assert!(matches!(error, CoefficientsError::Foreign { .. }), "{key}: {error}");
    }
}

#[test]
fn wrong_numbers_and_wrong_types_are_damage() {
    let surface = "/formats/f32~1f32~1f32/seconds_per_mac/on_chip";
    let wrong = [
        ("/seconds_per_launch".to_owned(), vec![json!(-1.0), json!("1"), json!(null), json!([])]),
        ("/seconds_per_byte".to_owned(), vec![json!(-1e-9), json!({})]),
        ("/formats".to_owned(), vec![json!({}), json!([]), json!(null)]),
        ("/schema".to_owned(), vec![json!("4"), json!(null), json!(3.5), json!(-3)]),
        (format!("{surface}/seconds_per_mac/0"), vec![json!(0.0), json!(-1e-12), json!(null), json!("fast")]),
        (format!("{surface}/spread/0"), vec![json!(-0.5), json!(null)]),
        (format!("{surface}/measured/0"), vec![json!(1), json!(null)]),
        (format!("{surface}/rows"), vec![json!([1, 8]), json!([8, 1, 64]), json!([]), json!([-1, 8, 64])]),
        (format!("{surface}/extents"), vec![json!((1..1000).collect::<Vec<_>>())]),
        (surface.to_owned(), vec![json!(null), json!({})]),
        ("/formats/f32~1f32~1f32/error/median".to_owned(), vec![json!(-1.0), json!("small")]),
    ];
    for (place, values) in wrong {
        for value in values {
            let mut changed = good();
            *changed.pointer_mut(&place).unwrap_or_else(|| panic!("{place} is there")) = value.clone();
            let error = read(&text(&changed)).expect_err(&format!("{place} is {value}"));
            assert!(matches!(error, CoefficientsError::Damaged { .. }), "{place} is {value}: {error}");
        }
    }
    // A number that JSON can write and a float can't hold.
    let huge = String::from_utf8(text(&good())).expect("JSON").replacen("\"spread\":[", "\"spread\":[1e999,", 1);
    assert!(matches!(read(huge.as_bytes()), Err(CoefficientsError::Damaged { .. })));
    // NaN is no JSON.
    let nan = String::from_utf8(text(&good())).expect("JSON").replacen("\"spread\":[", "\"spread\":[NaN,", 1);
    assert!(matches!(read(nan.as_bytes()), Err(CoefficientsError::Damaged { .. })));
    let mut unknown = good();
    unknown["colour"] = json!("blue");
    assert!(matches!(read(&text(&unknown)), Err(CoefficientsError::Damaged { .. })));
}

proptest! {
    #![proptest_config(ProptestConfig { failure_persistence: None, ..ProptestConfig::with_cases(400) })]

    #[test]
    fn a_file_that_is_cut_is_refused(share in 0.0..1.0) {
        let whole = text(&good());
        let length = (whole.len() as f64 * share) as usize;
        prop_assert!(read(&whole[..length]).is_err());
    }

    /// A byte that is another: refused, or a set that passes every check.
    #[test]
    fn no_byte_makes_it_panic(share in 0.0..1.0, byte: u8) {
        let mut changed = text(&good());
        let at = (changed.len() as f64 * share) as usize;
        changed[at] = byte;
        if let Ok(read) = read(&changed) {
            prop_assert_eq!(read.check(), Ok(()));
        }
    }
}
