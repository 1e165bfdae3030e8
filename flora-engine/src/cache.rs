//! Accounts for the blocks of the cache. Where they lie is the decoder's; that there are never too many is decided here, and which
//! of them several sequences have.

use crate::decoder::BlockId;
use crate::prefix::{Found, Placed, PrefixTree, Row};

/// The blocks there are: those of single sequences, and those of the tree, which a sequence may have in common with others.
#[derive(Debug)]
pub(crate) struct BlockPool {
    block_tokens: usize,
    total: usize,
    /// Blocks that single sequences have by themselves, each as many as it takes.
    own: usize,
    tree: PrefixTree,
    /// What the decoder has to forget, before anything else is run.
    forgotten: Vec<BlockId>,
}

/// Blocks that a sequence holds, to be given back.
#[derive(Debug, Default)]
#[must_use]
pub(crate) struct Blocks {
    /// Its first, of the tree.
    shared: Vec<BlockId>,
    /// Those after them.
    own: usize,
    /// Blocks of memory that each of them takes: two where a sequence holds the base model's keys and values too.
    size: usize,
}

/// What the decoder is told of a block that a sequence has filled.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) struct Filled {
    pub(crate) block: BlockId,
    /// Which of the sequence's it is.
    pub(crate) index: usize,
}

impl BlockPool {
    pub(crate) fn new(cache_tokens: usize, block_tokens: usize) -> Self {
        let (tree, forgotten) = (PrefixTree::new(block_tokens), Vec::new());
        Self { block_tokens, total: cache_tokens / block_tokens, own: 0, tree, forgotten }
    }

    /// Blocks for that many tokens, if there are so many, each of `size` blocks of memory: first what was found of the sequence in the
    /// tree, but for a begun block where there isn't room for it and its copy. The decoder reads that before anything else is done here.
    pub(crate) fn take(&mut self, found: Found, tokens: usize, size: usize) -> Option<(Blocks, Found)> {
        if found.rest.is_some()
            && let Some(blocks) = self.try_take(&found, tokens, size)
        {
            return Some((blocks, found));
        }
        let found = Found { rest: None, ..found };
        Some((self.try_take(&found, tokens, size)?, found))
    }

    fn try_take(&mut self, found: &Found, tokens: usize, size: usize) -> Option<Blocks> {
        let mut blocks = Blocks { shared: found.blocks.clone(), own: 0, size };
        blocks.shared.iter().for_each(|block| self.tree.hold(*block));
        // It makes no room for the sequence that begins with it.
        let rest = found.rest.map(|(block, _)| block);
        rest.into_iter().for_each(|block| self.tree.hold(block));
        let has_room = self.grow(&mut blocks, tokens);
        rest.into_iter().for_each(|block| self.tree.release(block));
        if has_room {
            return Some(blocks);
        }
        self.give_back(blocks);
        None
    }

    /// Makes `blocks` enough for that many tokens. `false`, and nothing that a sequence has has changed, where there are too few.
    pub(crate) fn grow(&mut self, blocks: &mut Blocks, tokens: usize) -> bool {
        let more = tokens.div_ceil(self.block_tokens).saturating_sub(blocks.shared.len() + blocks.own);
        let taken = more * blocks.size;
        if taken > self.total - self.used() {
            return false;
        }
        while taken > self.total - self.own - self.tree.blocks() {
            let Some(block) = self.tree.evict() else { return false };
            self.forgotten.push(block);
        }
        self.own += taken;
        blocks.own += more;
        true
    }

    pub(crate) fn give_back(&mut self, blocks: Blocks) {
        self.own -= blocks.own * blocks.size;
        // Those that follow go before those that they follow.
        blocks.shared.into_iter().rev().for_each(|block| self.tree.release(block));
    }

    /// What there is of a sequence of these rows.
    pub(crate) fn find(&self, rows: &[Row]) -> Found {
        self.tree.find(rows)
    }

    /// Puts the next block of a sequence in the tree, where it is full of the tokens that the decoder holds: `rows` gives those at
    /// some positions.
    pub(crate) fn fill(
        &mut self,
        blocks: &mut Blocks,
        computed: usize,
        rows: impl Fn(std::ops::Range<usize>) -> Vec<Row>,
    ) -> Option<Filled> {
        let index = blocks.shared.len();
        let end = (index + 1) * self.block_tokens;
        if blocks.own == 0 || end > computed {
            return None;
        }
        let rows = rows(end - self.block_tokens..end);
        let before = blocks.shared.last().copied();
        let placed = self.tree.insert(before, &rows, blocks.size, |block| self.forgotten.push(block))?;
        let (Placed::New(block) | Placed::Known(block)) = placed;
        self.tree.hold(block);
        blocks.shared.push(block);
        blocks.own -= 1;
        self.own -= blocks.size;
        Some(Filled { block, index })
    }

    /// Puts the begun block of a sequence that ends in the tree: the last of `rows`, all that the decoder holds. `None` where there is
    /// none, or where it is there.
    pub(crate) fn keep_rest(&mut self, blocks: &mut Blocks, rows: &[Row]) -> Option<Filled> {
        let index = blocks.shared.len();
        let rest =
            rows.get(index * self.block_tokens..).filter(|rest| !rest.is_empty() && rest.len() < self.block_tokens)?;
        if blocks.own == 0 {
            return None;
        }
        let before = blocks.shared.last().copied();
        match self.tree.insert(before, rest, blocks.size, |block| self.forgotten.push(block))? {
            Placed::Known(_) => None,
            Placed::New(block) => {
                blocks.own -= 1;
                self.own -= blocks.size;
                Some(Filled { block, index })
            }
        }
    }

    /// What the decoder has to forget, before anything else is run.
    pub(crate) fn take_forgotten(&mut self) -> Vec<BlockId> {
        std::mem::take(&mut self.forgotten)
    }

    /// Blocks that sequences have.
    pub(crate) fn used(&self) -> usize {
        self.own + self.tree.held()
    }

    /// Blocks that none has, kept for those that may come.
    pub(crate) fn kept(&self) -> usize {
        self.tree.blocks() - self.tree.held()
    }

    /// Tokens of a block.
    pub(crate) fn block_tokens(&self) -> usize {
        self.block_tokens
    }

    pub(crate) fn total(&self) -> usize {
        self.total
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn take(pool: &mut BlockPool, tokens: usize) -> Option<Blocks> {
        Some(pool.take(Found::default(), tokens, 1)?.0)
    }

    fn rows(range: std::ops::Range<usize>) -> Vec<Row> {
        range.map(|token| Row { token: token as u32, adapter: None }).collect()
    }

    #[test]
    fn blocks_are_taken_whole_and_given_back() {
        let mut pool = BlockPool::new(100, 32);
        assert_eq!(pool.total(), 3);
        let mut first = take(&mut pool, 33).expect("two of three");
        assert!(pool.grow(&mut first, 64), "both are held already");
        assert_eq!(pool.used(), 2);
        assert!(take(&mut pool, 33).is_none());
        assert_eq!(pool.used(), 2);
        let second = take(&mut pool, 1).expect("the third");
        assert!(!pool.grow(&mut first, 65));
        pool.give_back(second);
        assert!(pool.grow(&mut first, 65));
        pool.give_back(first);
        assert_eq!(pool.used(), 0);
    }

    #[test]
    fn what_sequences_have_in_common_is_counted_once() {
        let mut pool = BlockPool::new(5 * 4, 4);
        let mut first = take(&mut pool, 10).expect("three of five");
        let filled = [pool.fill(&mut first, 9, rows), pool.fill(&mut first, 9, rows), pool.fill(&mut first, 9, rows)];
        assert_eq!(filled.map(|filled| filled.map(|filled| filled.index)), [Some(0), Some(1), None]);
        assert_eq!((pool.used(), pool.kept()), (3, 0));
        let found = pool.find(&rows(0..11));
        assert_eq!((found.blocks.len(), found.rest), (2, None));
        let (second, _) = pool.take(found, 12, 1).expect("one beside two that are there");
        assert_eq!(pool.used(), 4);
        let rest = pool.keep_rest(&mut first, &rows(0..9)).expect("one row of a block");
        pool.give_back(first);
        assert_eq!((pool.used(), pool.kept()), (3, 1));
        pool.give_back(second);
        assert_eq!((pool.used(), pool.kept()), (0, 3));
        // All of it may go where it is needed; what follows goes first.
        let all = take(&mut pool, 20).expect("five of five");
        assert_eq!((pool.used(), pool.kept()), (5, 0));
        let forgotten = pool.take_forgotten();
        assert_eq!((forgotten.len(), forgotten[0]), (3, rest.block));
        pool.give_back(all);
    }

    #[test]
    fn blocks_of_two_take_two() {
        let mut pool = BlockPool::new(5 * 4, 4);
        let (mut gated, _) = pool.take(Found::default(), 7, 2).expect("four of five");
        assert!(pool.fill(&mut gated, 7, rows).is_some());
        assert!(pool.keep_rest(&mut gated, &rows(0..7)).is_some());
        assert_eq!((pool.used(), pool.kept()), (2, 2));
        assert!(take(&mut pool, 9).is_some(), "what none has goes, both blocks of it");
        assert_eq!((pool.used(), pool.kept(), pool.take_forgotten().len()), (5, 0, 1));
        pool.give_back(gated);
        assert_eq!((pool.used(), pool.kept()), (3, 2));
    }

    #[test]
    fn what_a_sequence_begins_with_does_not_make_room_for_it() {
        let mut pool = BlockPool::new(2 * 4, 4);
        let mut first = take(&mut pool, 7).expect("two");
        assert!(pool.fill(&mut first, 7, rows).is_some());
        assert!(pool.keep_rest(&mut first, &rows(0..7)).is_some());
        pool.give_back(first);
        let found = pool.find(&rows(0..7));
        assert_eq!((found.blocks.len(), found.rest.map(|(_, count)| count)), (1, Some(3)));
        let (blocks, found) = pool.take(found, 8, 1).expect("two of two");
        assert_eq!(
            (found.blocks.len(), found.rest),
            (1, None),
            "the rest and its copy don't fit beside the first block"
        );
        assert_eq!((pool.used(), pool.kept()), (2, 0));
        pool.give_back(blocks);
    }
}
