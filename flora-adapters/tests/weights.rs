//! Weights in the form that a file has them: what is packed is, bit for bit, what ggml's blocks mean.

use flora_adapters::BaseForm;
use flora_checkpoint::{Encoding, SharedBytes, StoredTensor};
use flora_plan::layer::WeightFormat;

/// Random blocks whose scales are finite: where the halves of an encoding lie, in bytes.
fn blocks(encoding: Encoding, count: usize, random: &mut fastrand::Rng) -> Vec<u8> {
    let halves: &[usize] = match encoding {
        Encoding::Q4_1 | Encoding::Q5_1 | Encoding::Q4_K | Encoding::Q5_K => &[0, 2],
        Encoding::Q2_K => &[80, 82],
        Encoding::Q3_K => &[108],
        Encoding::Q6_K => &[208],
        Encoding::MXFP4 => &[],
        _ => &[0],
    };
    let mut bytes: Vec<u8> = (0..count * encoding.block_bytes()).map(|_| random.u8(..)).collect();
    for block in bytes.chunks_exact_mut(encoding.block_bytes()) {
        // Any sign, mantissa and exponent but the greatest.
        halves.iter().for_each(|at| block[at + 1] &= !0x40);
        if encoding == Encoding::MXFP4 {
            block[0] %= 250;
        }
    }
    bytes
}

#[test]
fn every_encoding_is_kept_bit_for_bit() {
    let device = flora_host::device();
    let mut random = fastrand::Rng::with_seed(5);
    for encoding in Encoding::all().filter(|encoding| encoding.is_quantised()) {
        let (k, d) = (5, 3 * encoding.block_elements());
        let bytes = blocks(encoding, 3 * k, &mut random);
        let tensor = StoredTensor::new(vec![k, d], encoding, SharedBytes::from(bytes)).expect("whole blocks");
        let packed = BaseForm::Stored.pack_rows("w", &tensor, &device).expect("finite numbers");
        assert_eq!(packed.format().name(), encoding.name().to_lowercase());
        let values = tensor.to_f32();
        for (position, value) in values.iter().enumerate() {
            let found = packed.value(position % d, position / d);
            // Where there is no minimum, 0 is added, and −0 becomes 0.
            let expected = if encoding.has_minima() { *value } else { value + 0.0 };
            assert_eq!(found.to_bits(), expected.to_bits(), "{encoding} [{position}]: {found} is not {value}");
        }
        let dequantised = BaseForm::F32.pack_rows("w", &tensor, &device).expect("finite numbers");
        assert_eq!(dequantised.format(), WeightFormat::default());
        assert!(dequantised.to_f32().iter().zip(packed.to_f32()).all(|(one, other)| *one == other), "{encoding}");
    }
}
