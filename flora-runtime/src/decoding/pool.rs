//! Keys and values of all sequences in one layer: blocks of tokens in one buffer, so that one launch reads those of every sequence
//! where they lie. A sequence has a list of blocks; several that begin alike may have the same ones. A block that nothing has any more
//! is given to whoever asks next, the lowest first, so that layers of one model hand out the same numbers.

use std::collections::BTreeSet;
use std::ops::Range;
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};

use flora_plan::layer::Element;

use super::Heads;
use crate::buffer::Buffer;
use crate::device::{Device, DeviceError};
use crate::info::DeviceInfo;
use crate::operands::OperandError;

/// Tokens of a block. Fixed, because a row's bits depend on it.
pub const BLOCK_TOKENS: usize = 32;

/// Blocks that a pool begins with.
const FIRST_BLOCKS: usize = 16;

/// Kernels index numbers of a pool with 32 bits, with room past its end.
const INDEX_LIMIT: u64 = i32::MAX as u64;

/// Keys and values of one layer.
#[derive(Debug)]
pub struct KeyValuePool {
    device: Device,
    heads: Heads,
    element: Element,
    /// Blocks that are wanted at most, as far as is known.
    expected: usize,
    blocks: Mutex<Blocks>,
}

/// The memory, and what of it is free.
#[derive(Debug, Default)]
struct Blocks {
    /// `[count, 2, key-value heads, BLOCK_TOKENS, size]`
    buffer: Option<Buffer>,
    count: usize,
    free: BTreeSet<u32>,
}

/// Keys and values of a block of tokens in one layer, which several caches may have. They don't change while more than one has them.
#[derive(Clone, Debug)]
pub struct KeyValueBlock(Arc<Held>);

/// A block that isn't free.
#[derive(Debug)]
struct Held {
    pool: Arc<KeyValuePool>,
    index: u32,
}

impl KeyValueBlock {
    /// Which of the pool's it is.
    pub(super) fn index(&self) -> u32 {
        self.0.index
    }
}

impl Drop for Held {
    fn drop(&mut self) {
        self.pool.lock().free.insert(self.index);
    }
}

/// The cache of one sequence in one layer.
#[derive(Debug)]
pub struct KeyValueCache {
    pool: Arc<KeyValuePool>,
    tokens: usize,
    blocks: Vec<KeyValueBlock>,
}

impl KeyValuePool {
    /// A pool without blocks, whose buffer grows as they are asked for: twofold up to what `tokens` tokens take, and by an
    /// eighth from there on.
    ///
    /// # Errors
    /// Tokens that don't fit the device's largest buffer.
    pub fn new(device: &Device, heads: Heads, element: Element, tokens: usize) -> Result<Self, DeviceError> {
        let pool = Self {
            device: device.clone(),
            heads,
            element,
            expected: tokens.div_ceil(BLOCK_TOKENS),
            blocks: Mutex::default(),
        };
        pool.numbers(pool.expected)?;
        Ok(pool)
    }

    /// Bytes that a token takes.
    pub fn bytes_per_token(heads: Heads, element: Element) -> u64 {
        (2 * heads.keys * heads.size) as u64 * element.bytes()
    }

    pub(super) fn heads(&self) -> Heads {
        self.heads
    }

    pub(super) fn element(&self) -> Element {
        self.element
    }

    pub(super) fn owner(&self) -> &Arc<DeviceInfo> {
        self.device.shared_info()
    }

    fn lock(&self) -> MutexGuard<'_, Blocks> {
        self.blocks.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// Bytes that the buffer may have.
    fn limit(&self) -> u64 {
        let indexed = INDEX_LIMIT * self.element.bytes();
        self.device.info().largest_buffer_bytes.map_or(indexed, |limit| limit.min(indexed))
    }

    /// Blocks in so many bytes.
    fn most_blocks(&self, bytes: u64) -> usize {
        let block = BLOCK_TOKENS as u64 * Self::bytes_per_token(self.heads, self.element);
        usize::try_from(bytes / block.max(1)).unwrap_or(usize::MAX)
    }

    /// Numbers of so many blocks.
    fn numbers(&self, blocks: usize) -> Result<usize, DeviceError> {
        let of_block = (BLOCK_TOKENS * 2 * self.heads.keys * self.heads.size) as u64;
        let numbers = (blocks as u64).saturating_mul(of_block);
        let limit = self.limit();
        let bytes = numbers.saturating_mul(self.element.bytes());
        if bytes > limit {
            let tokens = (self.most_blocks(limit) * BLOCK_TOKENS) as u64;
            let device = self.device.info().id.clone();
            return Err(DeviceError::CacheTooLarge { bytes, limit, tokens, device });
        }
        Ok(numbers as usize)
    }

    /// The memory, and how many blocks it has.
    pub(super) fn buffer(&self) -> Result<(Buffer, usize), DeviceError> {
        let mut blocks = self.lock();
        self.grow(&mut blocks, 1)?;
        let buffer = blocks.buffer.clone().map_or_else(|| self.device.upload_as(&[], self.element), Ok)?;
        Ok((buffer, blocks.count))
    }

    /// Has memory for at least so many blocks. What is in it stays.
    fn grow(&self, blocks: &mut Blocks, wanted: usize) -> Result<(), DeviceError> {
        if wanted <= blocks.count {
            return Ok(());
        }
        let larger = match blocks.count < self.expected {
            true => (2 * blocks.count).max(FIRST_BLOCKS).min(self.expected),
            // Blocks that are copied or aren't full: few.
            false => blocks.count + blocks.count / 8,
        };
        let count = wanted.max(larger.min(self.most_blocks(self.limit())));
        let numbers = self.numbers(count)?;
        let smaller = blocks.buffer.take().map_or_else(|| self.device.upload_as(&[], self.element), Ok)?;
        // A device that has no room for it may say so only when it is waited for; the blocks that there are stay then.
        let grown = self.device.resized(&smaller, numbers);
        match grown.and_then(|larger| self.device.synchronize().map(|()| larger)) {
            Ok(larger) => blocks.buffer = Some(larger),
            Err(error) => {
                blocks.buffer = Some(smaller);
                return Err(error);
            }
        }
        blocks.free.extend(blocks.count as u32..count as u32);
        blocks.count = count;
        Ok(())
    }

    /// A block that nothing has.
    fn take(self: &Arc<Self>) -> Result<KeyValueBlock, DeviceError> {
        let mut blocks = self.lock();
        if blocks.free.is_empty() {
            let wanted = blocks.count + 1;
            self.grow(&mut blocks, wanted)?;
        }
        // Growing leaves some.
        let index = blocks.free.pop_first().unwrap_or_default();
        Ok(KeyValueBlock(Arc::new(Held { pool: Arc::clone(self), index })))
    }
}

impl KeyValueCache {
    /// A cache without tokens.
    pub fn new(pool: &Arc<KeyValuePool>) -> Self {
        Self { pool: Arc::clone(pool), tokens: 0, blocks: Vec::new() }
    }

    /// A cache that begins with the first `tokens` tokens of these blocks, which are of the same pool. A last one that isn't full is
    /// copied when there is something to be written behind its tokens.
    pub fn beginning(pool: &Arc<KeyValuePool>, blocks: &[KeyValueBlock], tokens: usize) -> Self {
        let tokens = tokens.min(blocks.len() * BLOCK_TOKENS);
        let blocks = blocks.iter().take(tokens.div_ceil(BLOCK_TOKENS)).cloned().collect();
        Self { pool: Arc::clone(pool), tokens, blocks }
    }

    /// Tokens that it holds.
    pub fn tokens(&self) -> usize {
        self.tokens
    }

    /// The blocks of tokens at these positions; the first is one of a block.
    pub fn blocks(&self, positions: Range<usize>) -> Vec<KeyValueBlock> {
        let blocks = positions.start / BLOCK_TOKENS..positions.end.min(self.tokens).div_ceil(BLOCK_TOKENS);
        self.blocks.get(blocks).unwrap_or_default().to_vec()
    }

    /// Has these blocks, which hold the same, in place of its own from the token `first` on, the first of a block.
    pub fn replace(&mut self, first: usize, blocks: &[KeyValueBlock]) {
        for (own, block) in self.blocks.iter_mut().skip(first / BLOCK_TOKENS).zip(blocks) {
            own.clone_from(block);
        }
    }

    pub(super) fn pool(&self) -> &Arc<KeyValuePool> {
        &self.pool
    }

    /// The blocks that it has with so many tokens more, the last ones its own. Where a block that others have too has to be copied for
    /// that, says so in `copies`.
    pub(super) fn reserve(&self, tokens: usize, copies: &mut Vec<[u32; 2]>) -> Result<Vec<KeyValueBlock>, DeviceError> {
        if self.blocks.iter().any(|block| !Arc::ptr_eq(&block.0.pool, &self.pool)) {
            return Err(OperandError::ForeignCache.into());
        }
        let mut blocks = self.blocks.clone();
        let goes_on_within = tokens > 0 && !self.tokens.is_multiple_of(BLOCK_TOKENS);
        // The cache has it, and so has the copy of its list.
        let last = blocks.last_mut().filter(|last| goes_on_within && Arc::strong_count(&last.0) > 2);
        if let Some(last) = last {
            let own = self.pool.take()?;
            copies.push([last.0.index, own.0.index]);
            *last = own;
        }
        while blocks.len() * BLOCK_TOKENS < self.tokens + tokens {
            blocks.push(self.pool.take()?);
        }
        Ok(blocks)
    }

    /// Has so many tokens more, in the blocks that were reserved for them.
    pub(super) fn append(&mut self, tokens: usize, blocks: Vec<KeyValueBlock>) {
        self.tokens += tokens;
        self.blocks = blocks;
    }
}
