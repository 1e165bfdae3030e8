//! Blocks to numbers, as ggml's reference code (`ggml-quants.c`) defines them: every product is taken in f32, in ggml's
//! order, so the values are bit for bit those that llama.cpp computes without fused multiply-add.

use super::{Encoding, QuantisedBlock};
use half::{bf16, f16};

/// All values of `bytes`, which are a whole number of blocks of `encoding`.
pub(super) fn to_f32(encoding: Encoding, bytes: &[u8]) -> Vec<f32> {
    let blocks = bytes.chunks_exact(encoding.block_bytes());
    let mut values = Vec::with_capacity(blocks.len() * encoding.block_elements());
    match encoding {
        Encoding::F32 => {
            values.extend(blocks.map(|block| f32::from_le_bytes([block[0], block[1], block[2], block[3]])))
        }
        Encoding::F16 => values.extend(blocks.map(|block| f16::from_le_bytes([block[0], block[1]]).to_f32())),
        Encoding::BF16 => values.extend(blocks.map(|block| bf16::from_le_bytes([block[0], block[1]]).to_f32())),
        _ => quantised(encoding, blocks, &mut values),
    }
    values
}

fn quantised<'a>(encoding: Encoding, blocks: impl Iterator<Item = &'a [u8]>, values: &mut Vec<f32>) {
    let (Some(levels), Some(mut block)) = (encoding.levels(), QuantisedBlock::empty(encoding)) else { return };
    for bytes in blocks {
        let Some(block) = block.read(bytes) else { return };
        let group = block.stored().len() / block.scales().len();
        for ((stored, scale), minimum) in block.stored().chunks_exact(group).zip(block.scales()).zip(block.minima()) {
            let (scale, minimum) = (block.scale * f32::from(*scale), block.minimum * f32::from(*minimum));
            let products = stored.iter().map(|stored| scale * levels.level(*stored));
            // Adding 0 to −0 would change it.
            match encoding.has_minima() {
                true => values.extend(products.map(|product| product + minimum)),
                false => values.extend(products),
            }
        }
    }
}
