//! Base weights run in the form that a model's file has them.

use std::collections::BTreeMap;

use flora_checkpoint::{Encoding, read_matrices};
use serde_json::Value;

use super::command::{answer, flora, stderr};
use super::gguf_writer::File;
use super::world::World;

/// Tensors of the model's one layer, and how they are stored; those that aren't here are f32.
const ENCODINGS: [(&str, Encoding); 5] = [
    ("attn_q", Encoding::Q4_1),
    ("attn_k", Encoding::Q8_0),
    ("attn_v", Encoding::Q5_0),
    ("ffn_gate", Encoding::Q4_0),
    ("ffn_up", Encoding::F16),
];

/// Random blocks: scales (and what follows them, a minimum or the first numbers) of f16, small and finite.
fn blocks(encoding: Encoding, elements: u64, random: &mut fastrand::Rng) -> Vec<u8> {
    let blocks = elements as usize / encoding.block_elements();
    let mut bytes: Vec<u8> = (0..blocks * encoding.block_bytes()).map(|_| random.u8(..)).collect();
    // 0x16.. is 1.5e-3 to 2e-3; of f16 itself, every number is its own block.
    let small = |bytes: &mut [u8]| bytes[1] = 0x16 | bytes[1] & 0x80;
    for block in bytes.chunks_exact_mut(encoding.block_bytes()) {
        small(block);
        if encoding == Encoding::Q4_1 {
            small(&mut block[2..]);
        }
    }
    bytes
}

fn model() -> File {
    let mut file = File::llama(1, 2, 1, 6, 64, 32);
    let mut random = fastrand::Rng::with_seed(3);
    for tensor in &mut file.tensors {
        let elements = tensor.shape.iter().product();
        let found = ENCODINGS.iter().find(|(name, _)| tensor.name == format!("blk.0.{name}.weight"));
        (tensor.ggml_type, tensor.bytes) = match found {
            Some((_, encoding)) => (encoding.ggml_id(), blocks(*encoding, elements, &mut random)),
            None => {
                let values = (0..elements).flat_map(|_| (0.1 * (random.f32() - 0.5)).to_le_bytes());
                (Encoding::F32.ggml_id(), values.collect())
            }
        };
    }
    file
}

#[test]
fn quantised_weights_run_as_they_are_stored() {
    let world = World::new();
    let path = world.path("tiny.gguf");
    std::fs::write(&path, model().bytes().0).expect("a writable folder");
    let run = |base: &str| {
        let y = world.path(&format!("{base}.safetensors"));
        let text = |path: &std::path::Path| path.to_string_lossy().into_owned();
        let (model, outputs) = (text(&path), text(&y));
        let fixed =
            ["run", "--device", "host", "--model", &model, "--repetitions", "1", "--outputs", &outputs, "--json"];
        (answer(fixed.into_iter().chain(["--base", base])), read_matrices(&y).expect("a safetensors file"))
    };
    let (stored, y) = run("stored");
    let forms = |report: &Value| {
        let forms = report["base"].as_array().expect("an array").iter();
        let form = |form: &Value| {
            let text = |key: &str| form[key].as_str().expect("text").to_owned();
            (text("stored"), (text("weight"), form["layers"].as_u64(), form["bytes"].as_u64()))
        };
        forms.map(form).collect::<BTreeMap<_, _>>()
    };
    let form =
        |stored: &str, weight: &str, layers, bytes| (stored.to_owned(), (weight.to_owned(), Some(layers), Some(bytes)));
    let expected = [
        // [64, 12] and [64, 6] in blocks of 20 and 34 bytes; q4_0 and q8_0 keep pairs of scales in a word, as there is an even
        // number of them here.
        form("Q4_1", "q4_1", 1, 2 * 12 * 20),
        form("Q8_0", "q8_0", 1, 2 * 6 * 34),
        form("Q5_0", "q5_0", 1, 2 * 6 * 22),
        form("Q4_0", "q4_0", 1, 2 * 32 * 18),
        form("F16", "f16", 1, 2 * 64 * 32),
        form("F32", "f32", 2, 4 * 64 * (12 + 32)),
    ];
    assert_eq!(forms(&stored), BTreeMap::from(expected));
    let (dequantised, same) = run("f32");
    assert!(forms(&dequantised).values().all(|(weight, ..)| weight == "f32"), "{dequantised}");
    // Weights below 0.3 by inputs below 1.8, 64 of them, a few times over: sums below 100, in f32 right to about 5e-5.
    for (module, y) in &y {
        let worst =
            y.values.iter().zip(&same[module].values).map(|(one, other)| (one - other).abs()).fold(0.0, f32::max);
        assert!(worst < 1e-4, "{module} differs by {worst}");
    }
    assert_eq!(y.len(), 7);
}

#[test]
fn a_damaged_block_is_told_with_its_place() {
    let world = World::new();
    let mut file = model();
    let query = file.tensors.iter_mut().find(|tensor| tensor.name == "blk.0.attn_q.weight").expect("a query weight");
    // The scale of the last block.
    let last = query.bytes.len() - 20;
    query.bytes[last..last + 2].copy_from_slice(&[0xff, 0x7f]);
    let path = world.path("tiny.gguf");
    std::fs::write(&path, file.bytes().0).expect("a writable folder");
    for base in ["stored", "f32"] {
        let output = flora(["run", "--device", "host", "--model", &path.to_string_lossy(), "--base", base]);
        assert_eq!(output.status.code(), Some(1));
        let message = stderr(&output);
        assert!(message.contains("NaN") && (message.contains("q_proj") || message.contains("attn_q")), "{message}");
    }
}

#[test]
fn half_types_are_right_but_for_their_rounding() {
    let world = World::new();
    for (dtype, coarse) in [("f32", 0.0), ("f16", 1e-5), ("bf16", 1e-4)] {
        let report = answer(world.run(&["--dtype", dtype, "--repetitions", "1", "--json"]));
        assert_eq!((&report["dtype"], &report["right"]), (&dtype.into(), &true.into()));
        assert!(report["max_relative_error"].as_f64() > Some(coarse), "{dtype}: {report}");
    }
    let output = flora(world.run(&["--dtype", "f64"]));
    assert_eq!(output.status.code(), Some(2), "{}", stderr(&output));
}
