//! Accounts for the blocks of the cache. Where they lie is the decoder's; that there are never too many is decided here.

/// The blocks there are.
#[derive(Debug)]
pub(crate) struct BlockPool {
    block_tokens: usize,
    total: usize,
    used: usize,
}

/// Blocks that a sequence holds, to be given back.
#[derive(Debug, Default)]
#[must_use]
pub(crate) struct Blocks(usize);

impl BlockPool {
    pub(crate) fn new(cache_tokens: usize, block_tokens: usize) -> Self {
        Self { block_tokens, total: cache_tokens / block_tokens, used: 0 }
    }

    /// Blocks for that many tokens, if there are so many.
    pub(crate) fn take(&mut self, tokens: usize) -> Option<Blocks> {
        let mut blocks = Blocks::default();
        self.grow(&mut blocks, tokens).then_some(blocks)
    }

    /// Makes `blocks` enough for that many tokens. `false`, and nothing has changed, where there are too few.
    pub(crate) fn grow(&mut self, blocks: &mut Blocks, tokens: usize) -> bool {
        let more = tokens.div_ceil(self.block_tokens).saturating_sub(blocks.0);
        if more > self.total - self.used {
            return false;
        }
        self.used += more;
        blocks.0 += more;
        true
    }

    pub(crate) fn give_back(&mut self, blocks: Blocks) {
        self.used -= blocks.0;
    }

    pub(crate) fn used(&self) -> usize {
        self.used
    }

    pub(crate) fn total(&self) -> usize {
        self.total
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn blocks_are_taken_whole_and_given_back() {
        let mut pool = BlockPool::new(100, 32);
        assert_eq!(pool.total(), 3);
        let mut first = pool.take(33).expect("two of three");
        assert!(pool.grow(&mut first, 64), "both are held already");
        assert_eq!(pool.used(), 2);
        assert!(pool.take(33).is_none());
        assert_eq!(pool.used(), 2);
        let second = pool.take(1).expect("the third");
        assert!(!pool.grow(&mut first, 65));
        pool.give_back(second);
        assert!(pool.grow(&mut first, 65));
        pool.give_back(first);
        assert_eq!(pool.used(), 0);
    }
}
