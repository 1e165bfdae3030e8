//! `flora export`: a folder that says all of a batch's launches.

use flora_codegen::target::Target;
use flora_plan::lowering::{Part, lowerings_of};
use serde_json::Value;

use super::command::{answer, flora, stderr};

fn array(value: &Value) -> &[Value] {
    value.as_array().expect("an array")
}

fn number(value: &Value) -> u64 {
    value.as_u64().unwrap_or_else(|| panic!("{value} is no number"))
}

/// The manifest of a folder that was just written.
fn exported(arguments: &[&str]) -> (tempfile::TempDir, Value) {
    let folder = tempfile::tempdir().expect("a folder");
    let out = folder.path().join("kernels");
    let output = flora(arguments.iter().map(AsRef::as_ref).chain(["--out".as_ref(), out.as_os_str()]));
    assert!(output.status.success(), "{}", stderr(&output));
    let text = std::fs::read_to_string(out.join("manifest.json")).expect("a manifest");
    (folder, serde_json::from_str(&text).expect("JSON"))
}

#[test]
fn a_folder_says_all_of_the_launches() {
    let cards = Target::ALL.iter().filter(|(_, target)| matches!(target, Target::Cuda(_)));
    for (target, _) in cards {
        for (layer, part) in [("hira", Part::Multiplicative), ("lora", Part::Additive)] {
            for row in lowerings_of(part) {
                let lowering = ["--target", target, "--lowering", row.lowering().name()];
                let own = ["--dtype", "bf16", "--weight", "q4_0", "--segments", "1"];
                let arguments = [&[layer][..], &lowering, &own].concat();
                let (folder, manifest) = exported(&[&["export"], &arguments[..]].concat());
                let file = |name: &Value| {
                    let path = folder.path().join("kernels").join(name.as_str().expect("a file's name"));
                    std::fs::read(&path).unwrap_or_else(|error| panic!("{}: {error}", path.display()))
                };
                // The kernels are those that `inspect` prints.
                let inspected = answer([&["inspect", "--json"], &arguments[..]].concat());
                let sources: Vec<_> = array(&manifest["kernels"]).iter().map(|kernel| file(&kernel["file"])).collect();
                assert_eq!(array(&inspected).len(), array(&manifest["launches"]).len());
                for (printed, launch) in array(&inspected).iter().zip(array(&manifest["launches"])) {
                    let kernel = number(&launch["kernel"]) as usize;
                    assert_eq!(printed["source"].as_str().map(str::as_bytes), Some(&sources[kernel][..]));
                    assert_eq!(printed["cube_count"], launch["grid"]);
                    assert_eq!(printed["cube_dim"], manifest["kernels"][kernel]["block"]);
                }
                // Every pointer lies in a buffer whose contents are said.
                let buffers = array(&manifest["buffers"]);
                for argument in array(&manifest["launches"]).iter().flat_map(|launch| array(&launch["arguments"])) {
                    let buffer = &buffers[number(&argument["buffer"]) as usize];
                    assert!(number(&argument["offset"]) + number(&argument["bytes"]) <= number(&buffer["bytes"]));
                }
                for buffer in buffers {
                    match buffer["contents"].as_str().expect("a word") {
                        "table" | "state" => assert!(!file(&buffer["file"]).is_empty()),
                        "operand" => assert!(buffer["operand"].is_string()),
                        other => assert_eq!(other, "scratch"),
                    }
                }
                let written = buffers.iter().filter(|buffer| buffer["operand"] == "y").count();
                assert_eq!(written, 1, "{layer} by {lowering:?}");
            }
        }
    }
}

#[test]
fn shaders_are_not_exported() {
    let output = flora(["export", "lora", "--target", "wgsl", "--out", "/dev/null/nowhere"]);
    assert!(!output.status.success());
    assert!(stderr(&output).contains("use --target cuda:sm_80"), "{}", stderr(&output));
}
