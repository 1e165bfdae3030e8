//! Blocks to numbers, as ggml's reference code (`ggml-quants.c`) defines them: every product is taken in f32, in ggml's
//! order, so the values are bit for bit those that llama.cpp computes without fused multiply-add.

use super::Encoding;
use half::{bf16, f16};

/// All values of `bytes`, which are a whole number of blocks of `encoding`.
pub(super) fn to_f32(encoding: Encoding, bytes: &[u8]) -> Vec<f32> {
    let blocks = bytes.chunks_exact(encoding.block_bytes());
    let mut values = Vec::with_capacity(blocks.len() * encoding.block_elements());
    let decode: fn(&[u8], &mut Vec<f32>) = match encoding {
        Encoding::F32 => |block, values| values.push(f32::from_le_bytes([block[0], block[1], block[2], block[3]])),
        Encoding::F16 => |block, values| values.push(half_at(block, 0)),
        Encoding::BF16 => |block, values| values.push(bf16::from_le_bytes([block[0], block[1]]).to_f32()),
        Encoding::Q4_0 => |block, values| {
            let scale = half_at(block, 0);
            nibbles(&block[2..18], None, values, |quantum| (i32::from(quantum) - 8) as f32 * scale);
        },
        Encoding::Q4_1 => |block, values| {
            let (scale, minimum) = (half_at(block, 0), half_at(block, 2));
            nibbles(&block[4..20], None, values, |quantum| f32::from(quantum) * scale + minimum);
        },
        Encoding::Q5_0 => |block, values| {
            let scale = half_at(block, 0);
            nibbles(&block[6..22], Some(word_at(block, 2)), values, |q| (i32::from(q) - 16) as f32 * scale);
        },
        Encoding::Q5_1 => |block, values| {
            let (scale, minimum) = (half_at(block, 0), half_at(block, 2));
            nibbles(&block[8..24], Some(word_at(block, 4)), values, |q| f32::from(q) * scale + minimum);
        },
        Encoding::Q8_0 => |block, values| {
            let scale = half_at(block, 0);
            values.extend(block[2..34].iter().map(|quantum| f32::from(*quantum as i8) * scale));
        },
        Encoding::Q4_K => |block, values| super_block(block, None, &block[16..144], values),
        Encoding::Q5_K => |block, values| super_block(block, Some(&block[16..48]), &block[48..176], values),
        Encoding::Q6_K => six_bits,
    };
    for block in blocks {
        decode(block, &mut values);
    }
    values
}

fn half_at(block: &[u8], at: usize) -> f32 {
    f16::from_le_bytes([block[at], block[at + 1]]).to_f32()
}

fn word_at(block: &[u8], at: usize) -> u32 {
    u32::from_le_bytes([block[at], block[at + 1], block[at + 2], block[at + 3]])
}

/// The 32 elements of a small block: the low halves of 16 bytes, then the high halves; bit i of `fifth` is element i's fifth bit.
fn nibbles(packed: &[u8], fifth: Option<u32>, values: &mut Vec<f32>, value: impl Fn(u8) -> f32) {
    let fifth = |element: usize| fifth.map_or(0, |bits| ((bits >> element) & 1) as u8) << 4;
    values.extend(packed.iter().enumerate().map(|(i, byte)| value((byte & 15) | fifth(i))));
    values.extend(packed.iter().enumerate().map(|(i, byte)| value((byte >> 4) | fifth(i + 16))));
}

/// Q4_K and Q5_K: eight groups of 32, each with a 6-bit scale and minimum; bit g of `fifth[i]` is the fifth bit of element i
/// of group g.
fn super_block(block: &[u8], fifth: Option<&[u8]>, packed: &[u8], values: &mut Vec<f32>) {
    let (scale, minimum) = (half_at(block, 0), half_at(block, 2));
    let six = &block[4..16];
    for group in 0..8 {
        let (group_scale, group_minimum) = if group < 4 {
            (six[group] & 63, six[group + 4] & 63)
        } else {
            let (low, high) = (six[group + 4], [six[group - 4], six[group]]);
            ((low & 15) | ((high[0] >> 6) << 4), (low >> 4) | ((high[1] >> 6) << 4))
        };
        let (scale, minimum) = (scale * f32::from(group_scale), minimum * f32::from(group_minimum));
        let bytes = &packed[group / 2 * 32..][..32];
        values.extend(bytes.iter().enumerate().map(|(i, byte)| {
            let low = if group % 2 == 0 { byte & 15 } else { byte >> 4 };
            let high = fifth.map_or(0, |bits| (bits[i] >> group) & 1) << 4;
            scale * f32::from(low | high) - minimum
        }));
    }
}

/// Q6_K: two halves of 128 elements, each four runs of 32 whose upper two bits share a byte; a scale per 16 elements.
fn six_bits(block: &[u8], values: &mut Vec<f32>) {
    let (low, high, scales, scale) = (&block[..128], &block[128..192], &block[192..208], half_at(block, 208));
    for half in 0..2 {
        for run in 0..4 {
            values.extend((0..32).map(|i| {
                let byte = low[half * 64 + run % 2 * 32 + i];
                let four = if run < 2 { byte & 15 } else { byte >> 4 };
                let two = (high[half * 32 + i] >> (2 * run)) & 3;
                let group_scale = scales[half * 8 + run * 2 + i / 16] as i8;
                scale * f32::from(group_scale) * (i32::from(four | (two << 4)) - 32) as f32
            }));
        }
    }
}
