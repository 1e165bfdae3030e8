//! Which blocks of keys and values sequences have in common: a tree in which a block follows the block before it, known by its
//! tokens and by the content of the adapter that each was computed with. So a block is found by what it holds, never by a hash of
//! it, and one of an adapter that was replaced by another is another block.
//!
//! A block that sequences have stays as it is. One that none has stays until its memory is needed, the one that wasn't used for
//! longest first, and none before those that follow it.

use std::collections::{BTreeMap, BTreeSet, HashMap};
use std::ops::Bound;
use std::sync::Arc;

use crate::decoder::{AdapterContent, BlockId};

/// A token and the adapter that it is computed with, if any.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord)]
pub(crate) struct Row {
    pub(crate) token: u32,
    pub(crate) adapter: Option<AdapterContent>,
}

/// The blocks that follow another, or begin a sequence.
type Following = BTreeMap<Arc<[Row]>, BlockId>;

#[derive(Debug)]
struct Node {
    before: Option<BlockId>,
    /// A whole block of them, or fewer, and nothing follows then.
    rows: Arc<[Row]>,
    following: Following,
    /// Blocks of memory that it takes.
    size: usize,
    /// Sequences that have it.
    users: usize,
    /// On a clock that counts uses.
    last_used: u64,
}

/// See the module.
#[derive(Debug)]
pub(crate) struct PrefixTree {
    block_tokens: usize,
    nodes: HashMap<BlockId, Node>,
    beginnings: Following,
    /// Blocks that may go: none has them, and nothing follows them.
    idle: BTreeSet<(u64, BlockId)>,
    /// Memory of all, and of those that some sequence has, in blocks.
    blocks: usize,
    held: usize,
    clock: u64,
    next_id: u64,
}

/// What there is of a sequence.
#[derive(Debug, Default, PartialEq, Eq)]
pub(crate) struct Found {
    /// Whole blocks, one after the other.
    pub(crate) blocks: Vec<BlockId>,
    /// A block whose first rows follow them, and how many.
    pub(crate) rest: Option<(BlockId, usize)>,
}

/// What became of rows that were put in.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum Placed {
    /// They are this block now.
    New(BlockId),
    /// They were there.
    Known(BlockId),
}

/// A block and its rows.
type Entry<'a> = (&'a Arc<[Row]>, &'a BlockId);

/// The last of the blocks before `rows` in order, and the first that isn't. A block that shares rows with them is one of these, or
/// shares no more than one of these.
fn neighbours<'a>(following: &'a Following, rows: &[Row]) -> (Option<Entry<'a>>, Option<Entry<'a>>) {
    let before = following.range::<[Row], _>((Bound::Unbounded, Bound::Excluded(rows))).next_back();
    (before, following.range::<[Row], _>((Bound::Included(rows), Bound::Unbounded)).next())
}

impl PrefixTree {
    pub(crate) fn new(block_tokens: usize) -> Self {
        Self {
            block_tokens,
            nodes: HashMap::new(),
            beginnings: BTreeMap::new(),
            idle: BTreeSet::new(),
            blocks: 0,
            held: 0,
            clock: 0,
            next_id: 0,
        }
    }

    /// Blocks of memory that it takes.
    pub(crate) fn blocks(&self) -> usize {
        self.blocks
    }

    /// Those of them that sequences have.
    pub(crate) fn held(&self) -> usize {
        self.held
    }

    /// The longest beginning of `rows` that there is.
    pub(crate) fn find(&self, rows: &[Row]) -> Found {
        let mut found = Found::default();
        let mut following = &self.beginnings;
        for rows in rows.chunks(self.block_tokens) {
            // What shares most with these rows stands next to them in order.
            let (before, after) = neighbours(following, rows);
            let shared = |(known, id): (&Arc<[Row]>, &BlockId)| {
                (known.iter().zip(rows).take_while(|(known, row)| known == row).count(), *id)
            };
            let Some((count, id)) = before.into_iter().chain(after).map(shared).max_by_key(|(count, _)| *count) else {
                break;
            };
            if count < self.block_tokens {
                found.rest = (count > 0).then_some((id, count));
                break;
            }
            found.blocks.push(id);
            let Some(node) = self.nodes.get(&id) else { break };
            following = &node.following;
        }
        found
    }

    /// Puts in rows that follow `before`, a block of them or fewer, which take `size` blocks of memory; rows that begin a block that is there are there. What is forgotten
    /// for it, because it begins them, is given to `forgotten`. `None`: there is no such block before.
    pub(crate) fn insert(
        &mut self,
        before: Option<BlockId>,
        rows: &[Row],
        size: usize,
        mut forgotten: impl FnMut(BlockId),
    ) -> Option<Placed> {
        let (last, next) = neighbours(self.following(before)?, rows);
        if let Some((_, id)) = next.filter(|(known, _)| known.starts_with(rows)) {
            return Some(Placed::Known(*id));
        }
        let shorter = last.filter(|(known, _)| rows.starts_with(known)).map(|(_, id)| *id);
        if let Some(id) = shorter {
            self.remove(id);
            forgotten(id);
        }
        let id = BlockId(self.next_id);
        self.next_id += 1;
        self.clock += 1;
        let rows: Arc<[Row]> = rows.into();
        let (following, last_used) = (BTreeMap::new(), self.clock);
        let node = Node { before, rows: Arc::clone(&rows), following, size, users: 0, last_used };
        self.blocks += size;
        self.idle.insert((node.last_used, id));
        self.nodes.insert(id, node);
        match before.and_then(|before| self.nodes.get_mut(&before).map(|node| (before, node))) {
            None => self.beginnings.insert(rows, id),
            Some((before, node)) => {
                self.idle.remove(&(node.last_used, before));
                node.following.insert(rows, id)
            }
        };
        Some(Placed::New(id))
    }

    fn following(&self, before: Option<BlockId>) -> Option<&Following> {
        match before {
            None => Some(&self.beginnings),
            Some(before) => self.nodes.get(&before).map(|node| &node.following),
        }
    }

    /// A sequence has a block.
    pub(crate) fn hold(&mut self, id: BlockId) {
        if let Some(node) = self.nodes.get_mut(&id) {
            self.held += if node.users == 0 { node.size } else { 0 };
            node.users += 1;
            self.idle.remove(&(node.last_used, id));
        }
    }

    /// A sequence hasn't it any more.
    pub(crate) fn release(&mut self, id: BlockId) {
        self.clock += 1;
        if let Some(node) = self.nodes.get_mut(&id) {
            node.users -= 1;
            self.held -= if node.users == 0 { node.size } else { 0 };
            node.last_used = self.clock;
            if node.users == 0 && node.following.is_empty() {
                self.idle.insert((node.last_used, id));
            }
        }
    }

    /// Takes out the block that may go first, if one may.
    pub(crate) fn evict(&mut self) -> Option<BlockId> {
        let (_, id) = *self.idle.first()?;
        self.remove(id);
        Some(id)
    }

    /// Takes out a block that may go.
    fn remove(&mut self, id: BlockId) {
        let Some(node) = self.nodes.remove(&id) else { return };
        self.blocks -= node.size;
        self.idle.remove(&(node.last_used, id));
        match node.before.and_then(|before| self.nodes.get_mut(&before).map(|node| (before, node))) {
            None => {
                self.beginnings.remove(&node.rows);
            }
            Some((before, parent)) => {
                parent.following.remove(&node.rows);
                if parent.users == 0 && parent.following.is_empty() {
                    self.idle.insert((parent.last_used, before));
                }
            }
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn rows(tokens: &[u32]) -> Vec<Row> {
        tokens.iter().map(|token| Row { token: *token, adapter: None }).collect()
    }

    fn insert(tree: &mut PrefixTree, before: Option<BlockId>, tokens: &[u32]) -> Placed {
        tree.insert(before, &rows(tokens), 1, |_| {}).expect("a block that is there")
    }

    fn new(placed: Placed) -> BlockId {
        match placed {
            Placed::New(id) => id,
            Placed::Known(id) => panic!("{id:?} was there"),
        }
    }

    #[test]
    fn the_longest_beginning_is_found() {
        let mut tree = PrefixTree::new(3);
        let first = new(insert(&mut tree, None, &[1, 2, 3]));
        let second = new(insert(&mut tree, Some(first), &[4, 5, 6]));
        let rest = new(insert(&mut tree, Some(second), &[7]));
        assert_eq!(insert(&mut tree, Some(first), &[4, 5, 6]), Placed::Known(second));
        assert_eq!(insert(&mut tree, Some(first), &[4, 5]), Placed::Known(second), "it begins a block that is there");
        let found = |tokens: &[u32]| {
            let Found { blocks, rest } = tree.find(&rows(tokens));
            (blocks, rest)
        };
        assert_eq!(found(&[1, 2, 3, 4, 5, 6, 7, 8]), (vec![first, second], Some((rest, 1))));
        assert_eq!(found(&[1, 2, 3, 4, 5, 9]), (vec![first], Some((second, 2))));
        assert_eq!(found(&[1, 2]), (vec![], Some((first, 2))));
        assert_eq!(found(&[1, 2, 3]), (vec![first], None));
        assert_eq!(found(&[2]), (vec![], None));
    }

    #[test]
    fn rows_of_another_adapter_are_others() {
        let of = |content: u128| Row { token: 1, adapter: Some(AdapterContent(content)) };
        let mut tree = PrefixTree::new(2);
        let mixed = [Row { token: 1, adapter: None }, of(7)];
        let id = new(tree.insert(None, &mixed, 1, |_| {}).expect("no block before"));
        assert_eq!(tree.find(&mixed).blocks, [id]);
        assert_eq!(tree.find(&[of(7), of(7)]), Found::default());
        assert_eq!(tree.find(&[mixed[0], of(8)]).rest, Some((id, 1)), "what was before the adapter is the base's");
    }

    #[test]
    fn blocks_go_when_none_has_them_and_nothing_follows() {
        let mut tree = PrefixTree::new(2);
        let first = new(insert(&mut tree, None, &[1, 2]));
        tree.hold(first);
        let second = new(insert(&mut tree, Some(first), &[3, 4]));
        tree.hold(second);
        let other = new(insert(&mut tree, None, &[9]));
        assert_eq!((tree.blocks(), tree.held()), (3, 2));
        assert_eq!(tree.evict(), Some(other));
        assert_eq!(tree.evict(), None);
        tree.release(first);
        assert_eq!(tree.evict(), None, "something follows it");
        tree.release(second);
        assert_eq!((tree.evict(), tree.evict(), tree.evict()), (Some(second), Some(first), None));
        assert_eq!((tree.blocks(), tree.held()), (0, 0));
        assert_eq!(tree.find(&rows(&[1, 2])), Found::default());
    }

    #[test]
    fn a_longer_block_takes_the_place_of_its_beginning() {
        let mut tree = PrefixTree::new(4);
        let short = new(insert(&mut tree, None, &[1, 2]));
        let mut forgotten = Vec::new();
        let long = new(tree.insert(None, &rows(&[1, 2, 3, 4]), 1, |id| forgotten.push(id)).expect("no block before"));
        assert_eq!((forgotten, tree.blocks()), (vec![short], 1));
        assert_eq!(tree.find(&rows(&[1, 2, 3])).rest, Some((long, 3)));
    }
}
