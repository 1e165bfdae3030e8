//! Blocks of every quantised encoding in one form, whatever the order of their bits: what makes numbers of them and what packs them
//! for kernels go by it. Layouts are those of ggml's `block_*` structures.

use super::Encoding;
use half::f16;

/// The most elements of a block.
pub const MOST_ELEMENTS: usize = 256;

/// The most groups of a block.
pub const MOST_GROUPS: usize = 16;

/// Consecutive elements of a row. Element i, of group g = i / (elements / groups), is
/// scale · scales\[g\] · level(stored\[i\]) + minimum · minima\[g\]; the [`Levels`] are the encoding's.
#[derive(Clone, Debug)]
pub struct QuantisedBlock {
    /// What all scales of groups are multiplied by.
    pub scale: f32,
    /// What all minima of groups are multiplied by; 0 where the encoding has none.
    pub minimum: f32,
    scales: [i16; MOST_GROUPS],
    minima: [u8; MOST_GROUPS],
    stored: [u8; MOST_ELEMENTS],
    groups: usize,
    elements: usize,
    bytes: usize,
    fill: fn(&mut Self, &[u8]),
}

/// What stored numbers stand for, in scales.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Levels {
    /// stored − zero
    Linear {
        /// What stands for 0.
        zero: u8,
    },
    /// One of 16.
    Codebook(&'static [i8; 16]),
}

impl Levels {
    /// The level of a stored number.
    pub fn level(self, stored: u8) -> f32 {
        match self {
            Levels::Linear { zero } => f32::from(i16::from(stored) - i16::from(zero)),
            Levels::Codebook(levels) => f32::from(levels[usize::from(stored & 15)]),
        }
    }
}

/// Of IQ4_NL and IQ4_XS.
const NON_LINEAR: [i8; 16] = [-127, -104, -83, -65, -49, -35, -22, -10, 1, 13, 25, 38, 53, 69, 89, 113];

/// The halves that E2M1 has, of MXFP4; its −0 is 0.
const E2M1: [i8; 16] = [0, 1, 2, 3, 4, 6, 8, 12, 0, -1, -2, -3, -4, -6, -8, -12];

impl Encoding {
    /// What its stored numbers stand for; `None` for plain types.
    pub fn levels(self) -> Option<Levels> {
        let zero = match self {
            Encoding::F32 | Encoding::F16 | Encoding::BF16 => return None,
            Encoding::IQ4_NL | Encoding::IQ4_XS => return Some(Levels::Codebook(&NON_LINEAR)),
            Encoding::MXFP4 => return Some(Levels::Codebook(&E2M1)),
            Encoding::Q4_1 | Encoding::Q5_1 | Encoding::Q2_K | Encoding::Q4_K | Encoding::Q5_K => 0,
            Encoding::Q3_K => 4,
            Encoding::Q4_0 => 8,
            Encoding::Q5_0 => 16,
            Encoding::Q6_K => 32,
            Encoding::Q8_0 => 128,
        };
        Some(Levels::Linear { zero })
    }

    /// Whether groups have a minimum.
    pub fn has_minima(self) -> bool {
        matches!(self, Encoding::Q4_1 | Encoding::Q5_1 | Encoding::Q2_K | Encoding::Q4_K | Encoding::Q5_K)
    }
}

impl QuantisedBlock {
    /// Room for a block of `encoding`, which all blocks of a tensor are read into; `None` of a plain type.
    pub fn empty(encoding: Encoding) -> Option<Self> {
        let fill: fn(&mut QuantisedBlock, &[u8]) = match encoding {
            Encoding::F32 | Encoding::F16 | Encoding::BF16 => return None,
            Encoding::Q4_0 | Encoding::IQ4_NL => |block, bytes| block.small(half_at(bytes, 0), 0.0, None, &bytes[2..]),
            Encoding::Q4_1 => |block, bytes| block.small(half_at(bytes, 0), half_at(bytes, 2), None, &bytes[4..]),
            Encoding::Q5_0 => |block, bytes| block.small(half_at(bytes, 0), 0.0, Some(word_at(bytes, 2)), &bytes[6..]),
            Encoding::Q5_1 => |block, bytes| {
                block.small(half_at(bytes, 0), half_at(bytes, 2), Some(word_at(bytes, 4)), &bytes[8..]);
            },
            Encoding::MXFP4 => |block, bytes| block.small(half_of_power(bytes[0]), 0.0, None, &bytes[1..]),
            Encoding::Q8_0 => |block, bytes| {
                block.scale = half_at(bytes, 0);
                // Signed in the file.
                block.store(|element| bytes[2 + element] ^ 128);
            },
            Encoding::Q2_K => |block, bytes| {
                (block.scale, block.minimum) = (half_at(bytes, 80), -half_at(bytes, 82));
                block.group(|group| (i16::from(bytes[group] & 15), bytes[group] >> 4));
                block.store(|element| two_bits(&bytes[16..80], element));
            },
            Encoding::Q3_K => |block, bytes| {
                block.scale = half_at(bytes, 108);
                block.group(|group| (six_bits(&bytes[96..108], group) - 32, 0));
                block.store(|element| {
                    let third = bytes[element % 32] >> (element / 32) & 1;
                    two_bits(&bytes[32..96], element) | third << 2
                });
            },
            Encoding::Q4_K => |block, bytes| {
                block.scales_and_minima(bytes);
                block.store(|element| four_bits(&bytes[16..144], element));
            },
            Encoding::Q5_K => |block, bytes| {
                block.scales_and_minima(bytes);
                block.store(|element| {
                    let fifth = bytes[16 + element % 32] >> (element / 32) & 1;
                    four_bits(&bytes[48..176], element) | fifth << 4
                });
            },
            Encoding::Q6_K => |block, bytes| {
                block.scale = half_at(bytes, 208);
                block.group(|group| (i16::from(bytes[192 + group] as i8), 0));
                block.store(|element| {
                    // Two halves of 128 elements, each four runs of 32.
                    let (half, run, at) = (element / 128, element % 128 / 32, element % 32);
                    let four = bytes[half * 64 + run % 2 * 32 + at] >> (4 * (run / 2)) & 15;
                    four | (bytes[128 + half * 32 + at] >> (2 * run) & 3) << 4
                });
            },
            Encoding::IQ4_XS => |block, bytes| {
                block.scale = half_at(bytes, 0);
                let upper = u16::from_le_bytes([bytes[2], bytes[3]]);
                block.group(|group| {
                    let four = i16::from(bytes[4 + group / 2] >> (4 * (group % 2)) & 15);
                    let two = (upper >> (2 * group) & 3) as i16;
                    ((four | two << 4) - 32, 0)
                });
                // As in small blocks, one after the other.
                block.store(|element| bytes[8 + element / 32 * 16 + element % 16] >> (4 * (element / 16 % 2)) & 15);
            },
        };
        let (elements, groups) = (encoding.block_elements(), encoding.groups());
        Some(Self {
            scale: 0.0,
            minimum: 0.0,
            scales: [1; MOST_GROUPS],
            minima: [1; MOST_GROUPS],
            stored: [0; MOST_ELEMENTS],
            groups,
            elements,
            bytes: encoding.block_bytes(),
            fill,
        })
    }

    /// Reads a block; `None` where `bytes` are not as many as a block has.
    pub fn read(&mut self, bytes: &[u8]) -> Option<&Self> {
        (bytes.len() == self.bytes).then(|| (self.fill)(self, bytes))?;
        Some(self)
    }

    /// The scale of each group, in units of `scale`.
    pub fn scales(&self) -> &[i16] {
        &self.scales[..self.groups]
    }

    /// The minimum of each group, in units of `minimum`.
    pub fn minima(&self) -> &[u8] {
        &self.minima[..self.groups]
    }

    /// The stored number of each element.
    pub fn stored(&self) -> &[u8] {
        &self.stored[..self.elements]
    }

    fn store(&mut self, stored: impl Fn(usize) -> u8) {
        self.stored[..self.elements].iter_mut().enumerate().for_each(|(element, out)| *out = stored(element));
    }

    fn group(&mut self, scale_and_minimum: impl Fn(usize) -> (i16, u8)) {
        for group in 0..self.groups {
            (self.scales[group], self.minima[group]) = scale_and_minimum(group);
        }
    }

    /// 32 elements of one group: the low halves of 16 bytes, then the high halves; bit i of `fifth` is element i's fifth bit.
    fn small(&mut self, scale: f32, minimum: f32, fifth: Option<u32>, packed: &[u8]) {
        (self.scale, self.minimum) = (scale, minimum);
        let fifth = fifth.unwrap_or(0);
        self.store(|element| {
            let four = packed[element % 16] >> (4 * (element / 16)) & 15;
            four | ((fifth >> element & 1) as u8) << 4
        });
    }

    /// The scales and minima of Q4_K and Q5_K, of 6 bits each.
    fn scales_and_minima(&mut self, bytes: &[u8]) {
        (self.scale, self.minimum) = (half_at(bytes, 0), -half_at(bytes, 2));
        let six = &bytes[4..16];
        self.group(|group| {
            if group < 4 {
                return (i16::from(six[group] & 63), six[group + 4] & 63);
            }
            let (low, scale, minimum) = (six[group + 4], six[group - 4] >> 6, six[group] >> 6);
            (i16::from(low & 15 | scale << 4), low >> 4 | minimum << 4)
        });
    }
}

fn half_at(block: &[u8], at: usize) -> f32 {
    f16::from_le_bytes([block[at], block[at + 1]]).to_f32()
}

fn word_at(block: &[u8], at: usize) -> u32 {
    u32::from_le_bytes([block[at], block[at + 1], block[at + 2], block[at + 3]])
}

/// Half of 2^(exponent − 127), because levels are counted in halves.
fn half_of_power(exponent: u8) -> f32 {
    match exponent {
        // Too small to have an implicit leading bit.
        0 | 1 => f32::from_bits(0x0020_0000 << exponent),
        _ => f32::from_bits((u32::from(exponent) - 1) << 23),
    }
}

/// Of Q2_K and Q3_K: two halves of 128 elements, each four runs of 32 that share 32 bytes.
fn two_bits(packed: &[u8], element: usize) -> u8 {
    packed[element / 128 * 32 + element % 32] >> (2 * (element / 32 % 4)) & 3
}

/// Of Q4_K and Q5_K: two runs of 32 elements share 32 bytes.
fn four_bits(packed: &[u8], element: usize) -> u8 {
    packed[element / 64 * 32 + element % 32] >> (4 * (element / 32 % 2)) & 15
}

/// A scale of Q3_K: four bits in the first eight bytes, two in the last four.
fn six_bits(packed: &[u8], group: usize) -> i16 {
    let (four, two) = (packed[group % 8] >> (4 * (group / 8)) & 15, packed[8 + group % 4] >> (2 * (group / 4)) & 3);
    i16::from(four | two << 4)
}
