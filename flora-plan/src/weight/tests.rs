//! What each format promises.

use proptest::collection::vec;
use proptest::prelude::*;

use super::*;
use crate::layer::{Element, Levels, Nested, Quantisation};

fn quantised() -> impl Iterator<Item = (WeightFormat, Quantisation)> {
    WeightFormat::ALL.into_iter().filter_map(|(_, format)| Some((format, format.quantisation()?)))
}

fn has_codebook(quantisation: Quantisation) -> bool {
    matches!(quantisation.levels, Levels::Codebook(_))
}

/// A shape of whole blocks for `format`, and of odd sizes where it has none.
fn shape_of(format: WeightFormat, d: u32, k: u32) -> LayerShape {
    LayerShape { d: format.whole(d), k }
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
        let number = |stored: u32| scale * f64::from(quantisation.level(stored)) + minimum;
        let least = number(u32::from(quantisation.bits == 8));
        let most = number((1 << quantisation.bits) - 1);
        let (least, most) = (least.min(most), least.max(most));
        let beyond = (least - value).max(value - most).max(0.0);
        // The rounding of an f16 that may be subnormal, times the numbers that a scale is multiplied by.
        let half_rounding = |value: f64| (value.abs() * 2f64.powi(-11)).max(2f64.powi(-25));
        let largest = f64::from((1u32 << quantisation.bits) - 1);
        let short = match format {
            // Scales are f32: one rounding of the quotient.
            WeightFormat::Int8 => 127.0 * scale * f64::from(f32::EPSILON),
            WeightFormat::Q8_0 => 127.0 * half_rounding(scale),
            WeightFormat::Q4_0 => scale.abs() + 8.0 * half_rounding(scale),
            _ if matches!(quantisation.scales, Scales::Nested(_)) => nested_short(quantisation, scale, minimum),
            _ if !quantisation.minimum() => scale.abs() + f64::from(1 << quantisation.bits) * half_rounding(scale),
            _ => half_rounding(minimum) + largest * (half_rounding(scale) + scale * f64::from(f32::EPSILON)),
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

/// How far beyond its block's numbers a value may lie where scales are integers times an f16: that f16's rounding times the integer
/// and the numbers, and a scale where there is one number more on one side of 0 than on the other.
fn nested_short(quantisation: Quantisation, scale: f64, minimum: f64) -> f64 {
    let Scales::Nested(Nested { bits, .. }) = quantisation.scales else { return 0.0 };
    let rounding = |value: f64| (value.abs() * 2f64.powi(-11)).max(f64::from(1u32 << bits) * 2f64.powi(-25));
    let one_sided = if quantisation.minimum() { 0.0 } else { scale.abs() };
    one_sided + 2.0 * (rounding(minimum) + f64::from(1u32 << quantisation.bits) * rounding(scale))
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
        for (format, _) in quantised().filter(|(_, quantisation)| !has_codebook(*quantisation)) {
            let shape = shape_of(format, d, k);
            let values = random_values((shape.d * k) as usize, 10f64.powi(exponent) as f32, seed);
            assert_half_a_step(format, shape, &values);
        }
    }

    /// Levels that aren't evenly spaced: no other level of the block is nearer, but for roundings, and the largest value is
    /// reached. Smaller values would make scales of few bits.
    #[test]
    fn codebooks_give_the_nearest_level(d in 1u32..131, k in 1u32..12, exponent in 0i32..4, seed in any::<u64>()) {
        for (format, quantisation) in quantised().filter(|(_, quantisation)| has_codebook(*quantisation)) {
            let shape = shape_of(format, d, k);
            let values = random_values((shape.d * k) as usize, 10f32.powi(exponent), seed);
            let packed = PackedWeight::from_f32(format, shape, &values).unwrap();
            for (position, value) in values.iter().enumerate() {
                let (input, output) = (position / k as usize, position % k as usize);
                let (scale, decoded) = (packed.scale(input, output).0, packed.value(input, output));
                let error = (decoded - value).abs();
                let nearest = (0..16).map(|stored| (scale * quantisation.level(stored) - value).abs()).fold(f32::MAX, f32::min);
                prop_assert!(error <= nearest + value.abs() * 1e-6, "{}: {} for {}, {}", format, decoded, value, scale);
                // Half the widest step between levels, or the step by which one end is short of the other.
                let allowed = scale.abs() * if format == WeightFormat::MXFP4 { 2.0 } else { 14.5 };
                prop_assert!(error <= allowed * 1.01, "{}: {} for {}, {}", format, decoded, value, scale);
            }
        }
    }

    /// Packing what was decoded gives the same words, and the same scales but for a rounding of Int8's f32. Where f16 scales are
    /// subnormal they round too far for that.
    #[test]
    fn what_was_decoded_packs_to_itself(d in 1u32..131, k in 1u32..12, exponent in -1i32..4, seed in any::<u64>()) {
        // Of nested scales and of powers of two, another choice may suit what was rounded.
        let of_f16 = |scales| match scales {
            Scales::Nested(_) | Scales::Blocks { kind: ScaleKind::PowerOfTwo, .. } => false,
            Scales::Blocks { .. } | Scales::Outputs => true,
        };
        let one_level = quantised().filter(|(_, quantisation)| of_f16(quantisation.scales));
        for (format, _) in one_level {
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

    /// Bit for bit what blocks say, in the arithmetic of their format; where it has no minimum, 0 is added, and −0 is 0.
    #[test]
    fn blocks_decode_to_their_bits(units in 1u32..5, k in 1u32..8, seed in any::<u64>()) {
        let mut random = fastrand::Rng::with_seed(seed);
        for (format, quantisation) in quantised() {
            let (Some(unit), Some(group)) = (quantisation.unit(), quantisation.block()) else { continue };
            let shape = LayerShape { d: unit * units, k };
            let blocks: Vec<_> = (0..units * k).map(|_| random_block(quantisation, &mut random)).collect();
            let packed = packed(format, shape, &blocks).unwrap();
            for (at, block) in blocks.iter().enumerate() {
                let (output, first) = (at / units as usize, at % units as usize * unit as usize);
                for (input, stored) in block.stored.iter().enumerate() {
                    let of_group = input / group as usize;
                    let (mut scale, mut minimum) = (block.scale, block.minimum);
                    if matches!(quantisation.scales, Scales::Nested(_)) {
                        scale *= f32::from(block.scales[of_group]);
                        minimum *= f32::from(block.minima[of_group]);
                    }
                    let expected = scale * quantisation.level(u32::from(*stored)) + minimum;
                    let decoded = packed.value(first + input, output);
                    prop_assert_eq!(decoded.to_bits(), expected.to_bits(), "{}: {} not {}", format, decoded, expected);
                }
            }
        }
    }

    #[test]
    fn no_value_makes_a_number_that_is_not_finite(
        bits in vec(any::<u32>(), 256),
        (_, format) in prop::sample::select(WeightFormat::ALL.to_vec()),
    ) {
        let values: Vec<f32> = bits.into_iter().map(f32::from_bits).collect();
        match PackedWeight::from_f32(format, LayerShape { d: 256, k: 1 }, &values) {
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

/// A block's parts, each of any value that the format has room for.
struct Parts {
    scale: f32,
    minimum: f32,
    scales: Vec<i16>,
    minima: Vec<u8>,
    stored: Vec<u8>,
}

fn random_block(quantisation: Quantisation, random: &mut fastrand::Rng) -> Parts {
    let mut half = || f16::from_f32(random.f32() * 4.0 - 2.0).to_f32();
    let (scale, minimum) = match quantisation.scales {
        Scales::Blocks { kind: ScaleKind::PowerOfTwo, .. } => (2f32.powi(random.i32(-128..120)), 0.0),
        _ => (half(), if quantisation.minimum() { half() } else { 0.0 }),
    };
    let (mut scales, mut minima) = (Vec::new(), Vec::new());
    if let Scales::Nested(nested) = quantisation.scales {
        let (zero, all) = (nested.zero as i16, 1i16 << nested.bits);
        scales.extend((0..nested.blocks).map(|_| random.i16(-zero..all - zero)));
        minima.extend((0..nested.blocks).map(|_| if nested.minimum { random.u8(..) & (all - 1) as u8 } else { 0 }));
    }
    let stored = (0..quantisation.unit().unwrap_or(0)).map(|_| random.u8(..) & ((1u32 << quantisation.bits) - 1) as u8);
    Parts { scale, minimum, scales, minima, stored: stored.collect() }
}

fn packed(format: WeightFormat, shape: LayerShape, blocks: &[Parts]) -> Result<PackedWeight, WeightError> {
    let mut packer = BlockPacker::new(format, shape, blocks.len() as u64)?;
    for Parts { scale, minimum, scales, minima, stored } in blocks {
        packer.push(Block { scale: *scale, minimum: *minimum, scales, minima, stored })?;
    }
    packer.finish()
}

/// What a weight takes is what a file's blocks take, and what 6-bit scales are widened by.
#[test]
fn weights_take_little_more_than_blocks_of_a_file() {
    let shape = LayerShape { d: 1024, k: 24 };
    let of_file = [
        (WeightFormat::Q8_0, 34, 32),
        (WeightFormat::Q4_0, 18, 32),
        (WeightFormat::Q4_1, 20, 32),
        (WeightFormat::Q5_0, 22, 32),
        (WeightFormat::Q5_1, 24, 32),
        (WeightFormat::Q2_K, 84, 256),
        (WeightFormat::Q3_K, 110, 256),
        (WeightFormat::Q4_K, 144, 256),
        (WeightFormat::Q5_K, 176, 256),
        (WeightFormat::Q6_K, 210, 256),
        (WeightFormat::IQ4_NL, 18, 32),
        (WeightFormat::IQ4_XS, 136, 256),
        (WeightFormat::MXFP4, 17, 32),
    ];
    for (format, bytes, inputs) in of_file {
        let of_file = f64::from(shape.d / inputs * bytes * shape.k);
        let ratio = format.bytes(shape) as f64 / of_file;
        assert!((1.0..1.06).contains(&ratio), "{format}: {ratio}");
        let packed = PackedWeight::from_f32(format, shape, &vec![0.5; 1024 * 24]).unwrap();
        let WeightValues::Words(words) = packed.values() else { panic!("words") };
        assert_eq!(4 * (words.len() + packed.scales().len()) as u64, format.bytes(shape), "{format}");
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
        for (format, _) in quantised().filter(|(_, quantisation)| quantisation.unit().is_some()) {
            assert_eq!(packed(format, shape, &[]), Err(WeightError::NoExtent { d, k }), "{format}");
        }
    }
}

/// The bytes are counted before memory is taken for what the shape promises.
#[test]
fn a_shape_without_bytes_takes_no_memory() {
    let shape = LayerShape { d: u32::MAX / 32 * 32, k: u32::MAX };
    let refused = BlockPacker::new(WeightFormat::Q8_0, shape, 1);
    assert!(matches!(refused, Err(WeightError::WrongSize { found: 1, .. })), "{refused:?}");
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
    assert_eq!(packed(WeightFormat::Int8, shape, &[]), Err(WeightError::NoBlocks(WeightFormat::Int8)));
    let shape = LayerShape { d: 512, k: 1 };
    let block = |change: fn(&mut Parts)| {
        let quantisation = WeightFormat::Q4_K.quantisation().unwrap();
        let mut random = fastrand::Rng::with_seed(1);
        let mut blocks = [random_block(quantisation, &mut random), random_block(quantisation, &mut random)];
        change(&mut blocks[1]);
        packed(WeightFormat::Q4_K, shape, &blocks)
    };
    assert!(block(|_| ()).is_ok());
    for damage in [|block: &mut Parts| block.scale = f32::NAN, |block: &mut Parts| block.minimum = f32::INFINITY] {
        assert!(matches!(block(damage), Err(WeightError::NotFinite { input: 256, output: 0, .. })));
    }
    let damages: [fn(&mut Parts); 5] = [
        |block| block.stored[7] = 16,
        |block| block.stored.truncate(255),
        |block| block.scales[3] = -1,
        |block| block.scales[3] = 256,
        |block| block.minima.truncate(7),
    ];
    for damage in damages {
        let other = WeightError::OtherBlock { format: WeightFormat::Q4_K, input: 256, output: 0 };
        assert_eq!(block(damage), Err(other));
    }
    let mut packer = BlockPacker::new(WeightFormat::Q8_0, LayerShape { d: 32, k: 1 }, 1).unwrap();
    let block = Block { scale: 1.0, minimum: 0.0, scales: &[1], minima: &[1], stored: &[0; 32] };
    packer.push(block).unwrap();
    assert!(matches!(packer.push(block), Err(WeightError::OtherBlock { .. })));
}
