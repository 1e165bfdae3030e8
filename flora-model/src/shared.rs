//! Keys and values that sequences have in common, as the engine names them: what it calls a block are blocks of the caches of all layers.

use std::ops::Range;

use flora_engine::{BlockId, BlockSharing, SequenceId};

use crate::decoder::{Sequence, ServedModel};
use crate::operations::Serving;

/// What an engine's block is in each layer.
pub(crate) type LayerBlocks<O> = Vec<Vec<<O as Serving>::Block>>;

impl<O: Serving> BlockSharing for ServedModel<O> {
    fn granularity(&self) -> u32 {
        O::BLOCK_TOKENS
    }

    fn share(&mut self, sequence: SequenceId, positions: Range<u32>, block: BlockId) {
        let Some(sequence) = self.sequences.get_mut(&sequence) else { return };
        let positions = positions.start as usize..positions.end as usize;
        match self.shared.get(&block) {
            Some(layers) => {
                for (cache, blocks) in sequence.layers.iter_mut().zip(layers) {
                    O::replace(cache, positions.start, blocks);
                }
            }
            None => {
                let layers = sequence.layers.iter().map(|cache| O::blocks(cache, positions.clone()));
                self.shared.insert(block, layers.collect());
            }
        }
    }

    fn resume(&mut self, sequence: SequenceId, blocks: &[BlockId], tokens: u32) {
        let length = tokens as usize;
        // Where one isn't known, there is no sequence, and its first step says that its tokens aren't there.
        let Some(known) = blocks.iter().map(|block| self.shared.get(block)).collect::<Option<Vec<_>>>() else { return };
        let layer = |at: usize| {
            let blocks: Vec<O::Block> = known.iter().filter_map(|layers| layers.get(at)).flatten().cloned().collect();
            self.parts.operations.beginning(at, &blocks, length)
        };
        // Those of the base model too, where they are kept beside an adapter's.
        let caches = known.first().map_or(self.parts.blocks.len(), |layers| layers.len());
        if let Ok(layers) = (0..caches).map(layer).collect() {
            self.sequences.insert(sequence, Sequence { length, layers });
        }
    }

    fn forget(&mut self, block: BlockId) {
        self.shared.remove(&block);
    }
}
