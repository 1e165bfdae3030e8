//! Keys and values of one sequence in one layer, as attention reads them. They are kept in blocks of [`KEYS`] tokens that never
//! move, so that a sequence grows without a copy: for every head its keys, whose products with a query are vectors of neighbouring
//! keys, and its values, strip by strip. Several sequences that begin alike may have the same blocks.

use std::ops::Range;
use std::sync::Arc;

use flora_plan::layer::Element;
use half::f16;
use half::slice::HalfFloatSliceExt;
use pulp::Simd;
use rayon::prelude::*;

use crate::layout::STRIP;
use crate::pairs::{put, widen_pairs};
use crate::products::Pairs;
use crate::vectorise::vectorised;
use crate::widen::round_bf16;
use flora_runtime::decoding::Heads;

/// Tokens of a block. Fixed, because a row's bits depend on it.
pub(super) const KEYS: usize = 32;

/// The cache of one sequence in one layer.
#[derive(Clone, Debug)]
pub struct KeyValueCache {
    layout: Layout,
    tokens: usize,
    blocks: Vec<Arc<Block>>,
}

/// Keys and values of a block of tokens in one layer, which several caches may have. They never change.
#[derive(Clone, Debug)]
pub struct KeyValueBlock(Arc<Block>);

/// The numbers of a block, head by head: its keys `[size, KEYS]`, and its values `[strips, KEYS, STRIP]`.
#[derive(Clone, Debug)]
enum Block {
    F32(Vec<f32>),
    F16(Vec<f16>),
    /// In [`Pairs`] of a key's neighbouring numbers `[Pairs::padded(size), KEYS]`, and of two tokens' values
    /// `[strips, KEYS / 2, STRIP]`.
    Bf16(Vec<u32>),
}

/// Where numbers lie in a block.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) struct Layout {
    pub(super) heads: usize,
    pub(super) size: usize,
    pub(super) element: Element,
}

impl Layout {
    /// The size of a value in whole strips, because the kernel multiplies those. What is beyond a value is 0.
    pub(super) fn pitch(self) -> usize {
        self.size.next_multiple_of(STRIP)
    }

    /// Numbers, or pairs, of one head's keys.
    pub(super) fn keys(self) -> usize {
        match self.element {
            Element::F32 | Element::F16 => self.size * KEYS,
            Element::Bf16 => Pairs::padded(self.size) * KEYS,
        }
    }

    /// Numbers, or pairs, of one head's keys and values.
    fn head(self) -> usize {
        let values = match self.element {
            Element::F32 | Element::F16 => self.pitch() * KEYS,
            Element::Bf16 => self.pitch() * KEYS / 2,
        };
        self.keys() + values
    }

    /// Numbers of one head's keys and values as floats.
    pub(super) fn floats(self) -> usize {
        (self.size + self.pitch()) * KEYS
    }

    fn zeros(self) -> Block {
        let count = self.heads * self.head();
        match self.element {
            Element::F32 => Block::F32(vec![0.0; count]),
            Element::F16 => Block::F16(vec![f16::ZERO; count]),
            Element::Bf16 => Block::Bf16(vec![0; count]),
        }
    }

    /// Writes the keys and values `[heads, size]` of the block's token `at`, rounded to the block's type.
    fn write(self, block: &mut Block, at: usize, keys: &[f32], values: &[f32]) {
        match block {
            Block::F32(block) => self.write_floats(block, at, keys, values),
            Block::F16(block) => {
                let mut rounded = vec![f16::ZERO; keys.len() + values.len()];
                let (own_keys, own_values) = rounded.split_at_mut(keys.len());
                own_keys.convert_from_f32_slice(keys);
                own_values.convert_from_f32_slice(values);
                self.write_floats(block, at, own_keys, own_values);
            }
            Block::Bf16(block) => self.write_pairs(block, at, keys, values),
        }
    }

    fn write_floats<E: Copy>(self, block: &mut [E], at: usize, keys: &[E], values: &[E]) {
        let heads = block.chunks_exact_mut(self.head()).zip(keys.chunks_exact(self.size));
        for ((head, keys), values) in heads.zip(values.chunks_exact(self.size)) {
            let (held_keys, held_values) = head.split_at_mut(self.keys());
            for (held, key) in held_keys.iter_mut().skip(at).step_by(KEYS).zip(keys) {
                *held = *key;
            }
            for (held, values) in held_values.chunks_exact_mut(KEYS * STRIP).zip(values.chunks(STRIP)) {
                held[at * STRIP..][..values.len()].copy_from_slice(values);
            }
        }
    }

    fn write_pairs(self, block: &mut [u32], at: usize, keys: &[f32], values: &[f32]) {
        let heads = block.chunks_exact_mut(self.head()).zip(keys.chunks_exact(self.size));
        for ((head, keys), values) in heads.zip(values.chunks_exact(self.size)) {
            let (held_keys, held_values) = head.split_at_mut(self.keys());
            for (held, keys) in held_keys.iter_mut().skip(at).step_by(KEYS).zip(keys.chunks(2)) {
                keys.iter().enumerate().for_each(|(place, key)| put(held, place, round_bf16(*key)));
            }
            for (held, values) in held_values.chunks_exact_mut(KEYS / 2 * STRIP).zip(values.chunks(STRIP)) {
                let held = &mut held[at / 2 * STRIP..][..values.len()];
                held.iter_mut().zip(values).for_each(|(held, value)| put(held, at % 2, round_bf16(*value)));
            }
        }
    }
}

impl KeyValueCache {
    /// A cache without tokens for key-value heads of this kind; `element` is the type in which they are kept.
    pub fn new(heads: Heads, element: Element) -> Self {
        let layout = Layout { heads: heads.keys, size: heads.size, element };
        Self { layout, tokens: 0, blocks: Vec::new() }
    }

    /// Bytes that a token takes where blocks are full.
    pub fn bytes_per_token(heads: Heads, element: Element) -> u64 {
        let layout = Layout { heads: heads.keys, size: heads.size, element };
        let bytes = match element {
            Element::F32 | Element::F16 => element.bytes(),
            Element::Bf16 => 2 * element.bytes(),
        };
        (layout.heads * layout.head() / KEYS) as u64 * bytes
    }

    /// Tokens of a block.
    pub const BLOCK_TOKENS: usize = KEYS;

    /// A cache that begins with the first `tokens` tokens of these blocks, which are of caches for the same heads and of the same
    /// type. It has all of them but the last in common with these, and that too where it is full.
    pub fn beginning(heads: Heads, element: Element, blocks: &[KeyValueBlock], tokens: usize) -> Self {
        let mut cache = Self::new(heads, element);
        cache.tokens = tokens.min(blocks.len() * KEYS);
        cache.blocks = blocks.iter().take(cache.tokens.div_ceil(KEYS)).map(|block| Arc::clone(&block.0)).collect();
        if let (Some(last), rest @ 1..) = (cache.blocks.last_mut(), cache.tokens % KEYS) {
            // As if the others had never been there.
            let (layout, zeros) = (cache.layout, vec![0.0; cache.layout.heads * cache.layout.size]);
            for at in rest..KEYS {
                layout.write(Arc::make_mut(last), at, &zeros, &zeros);
            }
        }
        cache
    }

    /// The blocks of tokens at these positions; the first is one of a block.
    pub fn blocks(&self, positions: Range<usize>) -> Vec<KeyValueBlock> {
        let blocks = positions.start / KEYS..positions.end.min(self.tokens).div_ceil(KEYS);
        self.blocks.get(blocks).into_iter().flatten().map(|block| KeyValueBlock(Arc::clone(block))).collect()
    }

    /// Has these blocks, which hold the same, in place of its own from the token `first` on, the first of a block.
    pub fn replace(&mut self, first: usize, blocks: &[KeyValueBlock]) {
        for (own, block) in self.blocks.iter_mut().skip(first / KEYS).zip(blocks) {
            *own = Arc::clone(&block.0);
        }
    }

    /// Tokens that it holds.
    pub fn tokens(&self) -> usize {
        self.tokens
    }

    pub(super) fn layout(&self) -> Layout {
        self.layout
    }

    pub(super) fn element(&self) -> Element {
        self.layout.element
    }

    /// Appends tokens, rounded to the cache's type: `fill` writes the keys and values `[heads, size]` of each, counted from the first.
    /// Blocks are filled on all threads.
    pub(super) fn extend(&mut self, tokens: usize, fill: impl Fn(usize, &mut [f32], &mut [f32]) + Sync) {
        let Self { layout, tokens: first, .. } = *self;
        let end = first + tokens;
        let before = first / KEYS;
        let write = |(at, block): (usize, &mut Arc<Block>)| {
            let positions = (before + at) * KEYS..end.min((before + at + 1) * KEYS);
            let mut numbers = vec![0.0; 2 * layout.heads * layout.size];
            let (keys, values) = numbers.split_at_mut(layout.heads * layout.size);
            // Its own already, but for the first token after a beginning that it shares.
            let block = Arc::make_mut(block);
            for position in first.max(positions.start)..positions.end {
                fill(position - first, keys, values);
                layout.write(block, position % KEYS, keys, values);
            }
        };
        self.tokens = end;
        self.blocks.resize_with(end.div_ceil(KEYS), || Arc::new(layout.zeros()));
        let blocks = &mut self.blocks[before..];
        if blocks.len() == 1 {
            blocks.iter_mut().enumerate().for_each(write);
        } else {
            blocks.par_iter_mut().enumerate().for_each(write);
        }
    }

    /// A head's keys `[size, KEYS]` of a block and, after them, its values `[strips, KEYS, STRIP]`: where they lie if they are f32,
    /// else widened into `wide`.
    pub(super) fn head<'a, S: Simd>(&'a self, simd: S, block: usize, head: usize, wide: &'a mut Vec<f32>) -> &'a [f32] {
        let own = head * self.layout.head()..(head + 1) * self.layout.head();
        match &*self.blocks[block] {
            Block::F32(values) => return &values[own],
            Block::F16(values) => {
                wide.resize(own.len(), 0.0);
                vectorised(
                    simd,
                    #[inline(always)]
                    || values[own].convert_to_f32_slice(wide),
                );
            }
            Block::Bf16(pairs) => {
                wide.resize(self.layout.floats(), 0.0);
                let (keys, values) = wide.split_at_mut(self.layout.size * KEYS);
                let (key_pairs, value_pairs) = pairs[own].split_at(self.layout.keys());
                widen_pairs(simd, key_pairs, keys);
                widen_pairs(simd, value_pairs, values);
            }
        }
        wide
    }

    /// The same in pairs, where it is kept in those: keys `[Pairs::padded(size), KEYS]`, values `[strips, KEYS / 2, STRIP]`, as
    /// floats of the same bits.
    pub(super) fn head_in_pairs(&self, block: usize, head: usize) -> &[f32] {
        match &*self.blocks[block] {
            Block::Bf16(pairs) => {
                bytemuck::cast_slice(&pairs[head * self.layout.head()..(head + 1) * self.layout.head()])
            }
            Block::F32(_) | Block::F16(_) => &[],
        }
    }
}
