//! What each format promises.

use proptest::collection::vec;
use proptest::prelude::*;

use super::*;

const QUANTISED: [WeightFormat; 4] = [WeightFormat::Int8, WeightFormat::Q8_0, WeightFormat::Q4_0, WeightFormat::Q4_1];

/// A shape of whole blocks for `format`, and of odd sizes where it has none.
fn shape_of(format: WeightFormat, d: u32, k: u32) -> LayerShape {
    let block = format.quantisation().and_then(|quantisation| quantisation.block).unwrap_or(1);
    LayerShape { d: d.next_multiple_of(block), k }
}

fn random_values(len: usize, magnitude: f32, seed: u64) -> Vec<f32> {
    let mut random = fastrand::Rng::with_seed(seed);
    (0..len).map(|_| (random.f32() * 2.0 - 1.0) * magnitude).collect()
}

/// Half a step from every value between the least and the greatest number of its block; the nearer of the two from the others. The
/// ends lie beyond the values but for the rounding of the scale and the minimum to f16, and but for Q4_0, which has 7 scales on
/// one side and 8 on the other.
fn assert_half_a_step(format: WeightFormat, shape: LayerShape, values: &[f32]) {
    let quantisation = format.quantisation().unwrap();
    let packed = PackedWeight::from_f32(format, shape, values).unwrap();
    let k = shape.k as usize;
    for (position, value) in values.iter().enumerate() {
        let (input, output) = (position / k, position % k);
        let (scale, minimum) = packed.scale(input, output);
        let decoded = packed.value(input, output);
        assert!(decoded.is_finite(), "{format}: {decoded} for {value}");
        let (scale, minimum, value) = (f64::from(scale), f64::from(minimum), f64::from(*value));
        let number = |stored: u32| scale * (f64::from(stored) - f64::from(quantisation.zero)) + minimum;
        let least = number(u32::from(quantisation.bits == 8));
        let most = number((1 << quantisation.bits) - 1);
        let (least, most) = (least.min(most), least.max(most));
        let beyond = (least - value).max(value - most).max(0.0);
        // The rounding of an f16 that may be subnormal, times the numbers that a scale is multiplied by.
        let half_rounding = |value: f64| (value.abs() * 2f64.powi(-11)).max(2f64.powi(-25));
        let short = match format {
            // Scales are f32: one rounding of the quotient.
            WeightFormat::Int8 => 127.0 * scale * f64::from(f32::EPSILON),
            WeightFormat::Q8_0 => 127.0 * half_rounding(scale),
            WeightFormat::Q4_0 => scale.abs() + 8.0 * half_rounding(scale),
            _ => half_rounding(minimum) + 15.0 * (half_rounding(scale) + scale * f64::from(f32::EPSILON)),
        } * (1.0 + 1e-6);
        let is_zero = scale == 0.0 && minimum == 0.0;
        if is_zero && format == WeightFormat::Int8 {
            assert!(value.abs() < 127.0 * f64::from(f32::MIN_POSITIVE) && decoded == 0.0, "{value} became {decoded}");
            continue;
        }
        assert!(beyond <= short, "{format}: {value} is {beyond} beyond [{least}, {most}], more than {short}");
        // The roundings of f32: of the quotient, which is a stored number at most, and of what is decoded.
        let roundings = f64::from(f32::EPSILON) * (256.0 * scale.abs() + 2.0 * value.abs() + 2.0 * minimum.abs());
        let allowed = beyond.max(0.5 * scale.abs()) + roundings;
        let error = (f64::from(decoded) - value).abs();
        assert!(error <= allowed, "{format}: {decoded} for {value}, {error} > {allowed}, scale {scale}");
    }
}

proptest! {
    #![proptest_config(ProptestConfig { failure_persistence: None, ..ProptestConfig::default() })]

    #[test]
    fn values_come_back_within_half_a_step(
        d in 1u32..131,
        k in 1u32..12,
        exponent in -44i32..5,
        seed in any::<u64>(),
    ) {
        for format in QUANTISED {
            let shape = shape_of(format, d, k);
            let values = random_values((shape.d * k) as usize, 10f64.powi(exponent) as f32, seed);
            assert_half_a_step(format, shape, &values);
        }
    }

    /// Packing what was decoded gives the same words, and the same scales but for a rounding of Int8's f32. Where f16 scales are
    /// subnormal they round too far for that.
    #[test]
    fn what_was_decoded_packs_to_itself(d in 1u32..131, k in 1u32..12, exponent in -1i32..4, seed in any::<u64>()) {
        for format in QUANTISED {
            let shape = shape_of(format, d, k);
            let values = random_values((shape.d * k) as usize, 10f32.powi(exponent), seed);
            let packed = PackedWeight::from_f32(format, shape, &values).unwrap();
            let again = PackedWeight::from_f32(format, shape, &packed.to_f32()).unwrap();
            prop_assert_eq!(again.values(), packed.values(), "{}", format);
            if format == WeightFormat::Int8 {
                for (scale, first) in again.scales().iter().zip(packed.scales()) {
                    prop_assert!(scale.abs_diff(*first) <= 1, "{} ulp", scale.abs_diff(*first));
                }
            } else {
                prop_assert_eq!(again.scales(), packed.scales(), "{}", format);
            }
        }
    }

    #[test]
    fn floats_come_back_rounded_once(d in 1u32..50, k in 1u32..12, exponent in -10i32..4, seed in any::<u64>()) {
        let shape = LayerShape { d, k };
        let values = random_values((d * k) as usize, 10f32.powi(exponent), seed);
        for element in Element::ALL {
            let packed = PackedWeight::from_f32(WeightFormat::Float(element), shape, &values).unwrap();
            let rounded: Vec<f32> = values.iter().map(|value| element.round(*value)).collect();
            prop_assert_eq!(packed.to_f32(), rounded);
        }
    }

    /// Bit for bit what the blocks of a file say, in the arithmetic of their format; where it has no minimum, 0 is added, and −0
    /// is 0.
    #[test]
    fn blocks_decode_to_their_bits(blocks in 1u32..5, k in 1u32..8, seed in any::<u64>()) {
        let mut random = fastrand::Rng::with_seed(seed);
        let shape = LayerShape { d: 32 * blocks, k };
        for (format, header, body) in [(WeightFormat::Q8_0, 2, 32), (WeightFormat::Q4_0, 2, 16), (WeightFormat::Q4_1, 4, 16)] {
            let mut bytes = Vec::new();
            for _ in 0..blocks * k {
                bytes.extend((0..header / 2).flat_map(|_| f16::from_f32(random.f32() * 4.0 - 2.0).to_le_bytes()));
                bytes.extend((0..body).map(|_| random.u8(..)));
            }
            let packed = PackedWeight::from_blocks(format, shape, &bytes).unwrap();
            for (output, row) in bytes.chunks(blocks as usize * (header + body)).enumerate() {
                for (at, block) in row.chunks(header + body).enumerate() {
                    let half = |first: usize| f16::from_le_bytes([block[first], block[first + 1]]).to_f32();
                    for input in 0..32 {
                        let nibble = (block[header + input % 16 % body] >> (if input < 16 { 0 } else { 4 })) & 15;
                        let expected = match format {
                            WeightFormat::Q8_0 => half(0) * f32::from(block[header + input] as i8) + 0.0,
                            WeightFormat::Q4_0 => half(0) * (f32::from(nibble) - 8.0) + 0.0,
                            _ => half(0) * f32::from(nibble) + half(2),
                        };
                        let decoded = packed.value(at * 32 + input, output);
                        prop_assert_eq!(decoded.to_bits(), expected.to_bits(), "{}: {} not {}", format, decoded, expected);
                    }
                }
            }
        }
    }

    #[test]
    fn no_value_makes_a_number_that_is_not_finite(
        bits in vec(any::<u32>(), 32),
        (_, format) in prop::sample::select(WeightFormat::ALL.to_vec()),
    ) {
        let values: Vec<f32> = bits.into_iter().map(f32::from_bits).collect();
        match PackedWeight::from_f32(format, LayerShape { d: 32, k: 1 }, &values) {
            Ok(packed) => prop_assert!(packed.to_f32().iter().all(|value| value.is_finite())),
            Err(WeightError::NotFinite { value, input, .. }) => {
                prop_assert!(!value.is_finite() && value.to_bits() == values[input].to_bits());
            }
            Err(WeightError::TooLarge { value, input, .. }) => {
                prop_assert!(value.is_finite() && value == values[input]);
            }
            Err(error) => prop_assert!(false, "{}", error),
        }
    }
}

#[test]
fn blocks_of_a_file_are_read_bit_by_bit() {
    let shape = LayerShape { d: 64, k: 2 };
    let mut q8 = Vec::new();
    let mut q4 = Vec::new();
    for block in 0..4u8 {
        let scale = f16::from_f32(f32::from(block) + 0.5);
        q8.extend(scale.to_le_bytes());
        q8.extend((0..32u8).map(|position| (position as i8 - 16) as u8));
        q4.extend(scale.to_le_bytes());
        q4.extend(f16::from_f32(-1.0).to_le_bytes());
        q4.extend((0..16u8).map(|position| position | (15 - position) << 4));
    }
    let q8 = PackedWeight::from_blocks(WeightFormat::Q8_0, shape, &q8).unwrap();
    let q4 = PackedWeight::from_blocks(WeightFormat::Q4_1, shape, &q4).unwrap();
    for output in 0..2 {
        for input in 0..64 {
            let scale = (output * 2 + input / 32) as f32 + 0.5;
            let position = input % 32;
            assert_eq!(q8.value(input, output), scale * (position as f32 - 16.0));
            let nibble = if position < 16 { position } else { 15 - (position - 16) };
            assert_eq!(q4.value(input, output), scale * nibble as f32 - 1.0);
        }
    }
}

#[test]
fn small_columns_of_int8_stay_finite() {
    let largest = [3.7e-37, 3.6e-37, 1e-37, 1e-38, 1e-40, 1e-44, f32::from_bits(1), 1.5e-36, 2e-36, 0.0];
    let shape = LayerShape { d: 3, k: largest.len() as u32 };
    let values: Vec<f32> = [1.0, -0.5, 0.1].iter().flat_map(|part| largest.map(|value| part * value)).collect();
    assert_half_a_step(WeightFormat::Int8, shape, &values);
}

#[test]
fn extents_of_zero_are_refused() {
    for (d, k) in [(0, 0), (0, 3), (32, 0)] {
        let shape = LayerShape { d, k };
        for (_, format) in WeightFormat::ALL {
            assert_eq!(PackedWeight::from_f32(format, shape, &[]), Err(WeightError::NoExtent { d, k }), "{format}");
        }
        for format in [WeightFormat::Q8_0, WeightFormat::Q4_0, WeightFormat::Q4_1] {
            assert_eq!(PackedWeight::from_blocks(format, shape, &[]), Err(WeightError::NoExtent { d, k }), "{format}");
        }
    }
}

/// The bytes are counted before memory is taken for what the shape promises.
#[test]
fn a_shape_without_bytes_takes_no_memory() {
    let shape = LayerShape { d: u32::MAX / 32 * 32, k: u32::MAX };
    let refused = PackedWeight::from_blocks(WeightFormat::Q8_0, shape, &[0; 34]);
    assert!(matches!(refused, Err(WeightError::WrongSize { found: 34, .. })), "{refused:?}");
}

#[test]
fn what_cant_be_packed_is_refused() {
    let shape = LayerShape { d: 3, k: 2 };
    assert!(matches!(
        PackedWeight::from_f32(WeightFormat::Q4_0, shape, &[0.0; 6]),
        Err(WeightError::PartialBlock { block: 32, d: 3, .. })
    ));
    assert!(matches!(
        PackedWeight::from_f32(WeightFormat::Int8, shape, &[0.0; 5]),
        Err(WeightError::WrongSize { expected: 6, found: 5, .. })
    ));
    assert!(matches!(
        PackedWeight::from_f32(WeightFormat::Int8, shape, &[f32::NAN; 6]),
        Err(WeightError::NotFinite { .. })
    ));
    let half = WeightFormat::Float(Element::F16);
    let too_large = WeightError::TooLarge { format: half, value: 1e6, input: 0, output: 0 };
    assert_eq!(PackedWeight::from_f32(half, shape, &[1e6; 6]), Err(too_large));
    assert_eq!(
        PackedWeight::from_blocks(WeightFormat::Int8, shape, &[0; 6]),
        Err(WeightError::NoBlocks(WeightFormat::Int8))
    );
    assert!(matches!(
        PackedWeight::from_blocks(WeightFormat::Q8_0, LayerShape { d: 32, k: 1 }, &[0xff; 34]),
        Err(WeightError::NotFinite { input: 0, output: 0, .. })
    ));
}
