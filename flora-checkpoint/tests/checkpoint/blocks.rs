//! Every encoding against the numbers that llama.cpp's own Python package reads (`tests/golden/make_blocks.py`).

use flora_checkpoint::{Encoding, SharedBytes, StoredTensor};

fn bytes(hexadecimal: &str) -> Vec<u8> {
    let digits = hexadecimal.as_bytes().chunks_exact(2);
    digits.map(|pair| u8::from_str_radix(std::str::from_utf8(pair).expect("digits"), 16).expect("digits")).collect()
}

#[test]
fn every_encoding_gives_ggml_s_numbers() {
    let golden: serde_json::Value =
        serde_json::from_str(include_str!("../../../tests/golden/blocks.json")).expect("the golden file");
    for encoding in Encoding::all().filter(|encoding| *encoding != Encoding::F32) {
        let text = |key: &str| golden[encoding.name()][key].as_str().unwrap_or_else(|| panic!("no {encoding}"));
        let expected: Vec<f32> = bytes(text("values"))
            .chunks_exact(4)
            .map(|value| f32::from_le_bytes(value.try_into().expect("four bytes")))
            .collect();
        let blocks = bytes(text("blocks"));
        let shape = vec![2, blocks.len() / 2 / encoding.block_bytes() * encoding.block_elements()];
        let tensor = StoredTensor::new(shape, encoding, SharedBytes::from(blocks)).expect("two rows of one block");
        assert_eq!(tensor.element_count(), expected.len());
        let found = tensor.to_f32();
        for (index, (found, expected)) in found.iter().zip(&expected).enumerate() {
            assert_eq!(found.to_bits(), expected.to_bits(), "{encoding} [{index}]: {found} is not {expected}");
        }
    }
}
