//! Keys and values of one sequence in one layer, as attention reads them. They are kept in blocks of [`KEYS`] tokens that never
//! move, so that a sequence grows without a copy: for every head its keys `[size, KEYS]`, whose products with a query are
//! vectors of neighbouring keys, and its values `[KEYS, size]`. Several sequences that begin alike may have the same blocks.

use std::ops::Range;
use std::sync::Arc;

use flora_plan::layer::Element;
use half::slice::HalfFloatSliceExt;
use pulp::Simd;
use rayon::prelude::*;

use crate::decoder::heads::Heads;
use crate::layout::STRIP;
use crate::owned::OwnedValues;
use crate::values::Values;
use crate::vectorise::vectorised;

/// Tokens of a block. Fixed, because a row's bits depend on it.
pub(super) const KEYS: usize = 32;

/// The cache of one sequence in one layer.
#[derive(Clone, Debug)]
pub struct KeyValueCache {
    layout: Layout,
    element: Element,
    tokens: usize,
    blocks: Vec<Arc<OwnedValues>>,
}

/// Keys and values of a block of tokens in one layer, which several caches may have. They never change.
#[derive(Clone, Debug)]
pub struct KeyValueBlock(Arc<OwnedValues>);

/// Where numbers lie in a block.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) struct Layout {
    pub(super) heads: usize,
    pub(super) size: usize,
}

impl Layout {
    /// Numbers from one value to the next: whole strips, because the kernel multiplies those. What is beyond a value is 0.
    pub(super) fn pitch(self) -> usize {
        self.size.next_multiple_of(STRIP)
    }

    /// Numbers of one head's keys.
    pub(super) fn keys(self) -> usize {
        self.size * KEYS
    }

    /// Numbers of one head's keys and values.
    pub(super) fn head(self) -> usize {
        self.keys() + self.pitch() * KEYS
    }

    fn block(self) -> usize {
        self.heads * self.head()
    }

    /// Writes the keys and values `[heads, size]` of the block's token `at`, rounded to the block's type.
    fn write_one(self, block: &mut OwnedValues, at: usize, keys: &[f32], values: &[f32]) {
        match block {
            OwnedValues::F32(block) => self.write(block, at, keys, values),
            OwnedValues::F16(block) => self.write_rounded(block, at, keys, values),
            OwnedValues::Bf16(block) => self.write_rounded(block, at, keys, values),
        }
    }

    /// Writes the keys and values `[heads, size]` of the block's token `at`.
    fn write<E: Copy>(self, block: &mut [E], at: usize, keys: &[E], values: &[E]) {
        let heads = block.chunks_exact_mut(self.head()).zip(keys.chunks_exact(self.size));
        for ((head, keys), values) in heads.zip(values.chunks_exact(self.size)) {
            let (held_keys, held_values) = head.split_at_mut(self.keys());
            for (held, key) in held_keys.iter_mut().skip(at).step_by(KEYS).zip(keys) {
                *held = *key;
            }
            held_values[at * self.pitch()..][..self.size].copy_from_slice(values);
        }
    }

    /// The same of a half type.
    fn write_rounded<E: Copy + Default>(self, block: &mut [E], at: usize, keys: &[f32], values: &[f32])
    where
        [E]: HalfFloatSliceExt,
    {
        let mut rounded = vec![E::default(); keys.len() + values.len()];
        let (own_keys, own_values) = rounded.split_at_mut(keys.len());
        own_keys.convert_from_f32_slice(keys);
        own_values.convert_from_f32_slice(values);
        self.write(block, at, own_keys, own_values);
    }
}

impl KeyValueCache {
    /// A cache without tokens for key-value heads of this kind; `element` is the type in which they are kept.
    pub fn new(heads: Heads, element: Element) -> Self {
        let layout = Layout { heads: heads.keys, size: heads.size };
        Self { layout, element, tokens: 0, blocks: Vec::new() }
    }

    /// Bytes that a token takes where blocks are full.
    pub fn bytes_per_token(heads: Heads, element: Element) -> u64 {
        let layout = Layout { heads: heads.keys, size: heads.size };
        (layout.block() / KEYS) as u64 * element.bytes()
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
                layout.write_one(Arc::make_mut(last), at, &zeros, &zeros);
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
        self.element
    }

    /// Appends tokens, rounded to the cache's type: `fill` writes the keys and values `[heads, size]` of each, counted from the first.
    /// Blocks are filled on all threads.
    pub(super) fn extend(&mut self, tokens: usize, fill: impl Fn(usize, &mut [f32], &mut [f32]) + Sync) {
        let Self { layout, element, tokens: first, .. } = *self;
        let end = first + tokens;
        let before = first / KEYS;
        let write = |(at, block): (usize, &mut Arc<OwnedValues>)| {
            let positions = (before + at) * KEYS..end.min((before + at + 1) * KEYS);
            let mut numbers = vec![0.0; 2 * layout.heads * layout.size];
            let (keys, values) = numbers.split_at_mut(layout.heads * layout.size);
            // Its own already, but for the first token after a beginning that it shares.
            let block = Arc::make_mut(block);
            for position in first.max(positions.start)..positions.end {
                fill(position - first, keys, values);
                layout.write_one(block, position % KEYS, keys, values);
            }
        };
        self.tokens = end;
        self.blocks.resize_with(end.div_ceil(KEYS), || Arc::new(OwnedValues::zeros(layout.block(), element)));
        let blocks = &mut self.blocks[before..];
        if blocks.len() == 1 {
            blocks.iter_mut().enumerate().for_each(write);
        } else {
            blocks.par_iter_mut().enumerate().for_each(write);
        }
    }

    /// A head's keys `[size, KEYS]` and, after them, its values `[KEYS, pitch]` of a block: where they lie if they are f32, else
    /// widened into `wide`.
    pub(super) fn head<'a, S: Simd>(&'a self, simd: S, block: usize, head: usize, wide: &'a mut Vec<f32>) -> &'a [f32] {
        let own = head * self.layout.head()..(head + 1) * self.layout.head();
        match self.blocks[block].values() {
            Values::F32(values) => &values[own],
            values => {
                wide.resize(own.len(), 0.0);
                vectorised(
                    simd,
                    #[inline(always)]
                    || values.widen(own.start, wide),
                );
                wide
            }
        }
    }
}
