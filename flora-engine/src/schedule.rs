//! Which tokens run in the next step, and who makes room for them.

use std::collections::BTreeMap;
use std::ops::Range;

use crate::cache::BlockPool;
use crate::core::RequestId;
use crate::sequence::Running;

/// The tokens of one sequence that run in a step.
#[derive(Clone, Debug, PartialEq, Eq)]
pub(crate) struct Piece {
    pub(crate) request: RequestId,
    pub(crate) range: Range<usize>,
}

/// A step.
#[derive(Debug, Default)]
pub(crate) struct Schedule {
    pub(crate) pieces: Vec<Piece>,
    /// Taken from those that run, to make room.
    pub(crate) preempted: Vec<(RequestId, Running)>,
}

/// What of a sequence runs next. Where its ends are depends on the sequence alone, so that what is computed does too: chunks of
/// the prompt, then, after a pre-emption, chunks of what was generated. `change` is where another adapter begins to act than on the first
/// of them, so that a piece has one adapter or none.
fn next_range(prompt: usize, tokens: usize, change: Option<usize>, computed: usize, chunk: usize) -> Range<usize> {
    let (start, end) = if computed < prompt { (0, prompt) } else { (prompt, tokens) };
    let boundary = start + ((computed - start) / chunk + 1) * chunk;
    let end = change.map_or(end, |change| end.min(change));
    computed..boundary.min(end)
}

/// Plans a step: one token of every sequence that generates, then chunks of the others as the budget allows, the oldest first.
///
/// A sequence that finds no block takes those of the youngest that runs, itself perhaps, but never the oldest: that one was
/// admitted because the cache is large enough for it.
pub(crate) fn plan(
    running: &mut BTreeMap<RequestId, Running>,
    cache: &mut BlockPool,
    chunk_tokens: usize,
    tokens_per_step: usize,
) -> Schedule {
    let mut schedule = Schedule::default();
    let mut chunks = Vec::new();
    let mut budget = tokens_per_step;
    let oldest_first: Vec<RequestId> = running.keys().copied().collect();
    for request in oldest_first {
        // It may have made room for an older one.
        let Some(sequence) = running.get(&request) else { continue };
        let (prompt, tokens) = (sequence.sequence.prompt(), sequence.sequence.tokens().len());
        let change = sequence.adapters.next_change(sequence.computed);
        let range = next_range(prompt, tokens, change, sequence.computed, chunk_tokens);
        let decodes = range.len() == 1 && range.start >= prompt;
        if !make_room(running, cache, request, range.end, &mut schedule.preempted) {
            continue;
        }
        if decodes {
            budget = budget.saturating_sub(1);
            schedule.pieces.push(Piece { request, range });
        } else {
            chunks.push(Piece { request, range });
        }
    }
    for piece in chunks {
        if piece.range.len() <= budget {
            budget -= piece.range.len();
            schedule.pieces.push(piece);
        }
    }
    schedule
}

/// Whether the sequence has blocks for `tokens` tokens now; otherwise it is among the pre-empted.
fn make_room(
    running: &mut BTreeMap<RequestId, Running>,
    cache: &mut BlockPool,
    request: RequestId,
    tokens: usize,
    preempted: &mut Vec<(RequestId, Running)>,
) -> bool {
    loop {
        let Some(sequence) = running.get_mut(&request) else { return false };
        if cache.grow(&mut sequence.blocks, tokens) {
            return true;
        }
        let Some((victim, mut youngest)) = running.pop_last() else { return false };
        cache.give_back(std::mem::take(&mut youngest.blocks));
        preempted.push((victim, youngest));
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn chunks_end_where_the_sequence_says() {
        let ranges = |prompt, tokens, change: Option<usize>| {
            let mut computed = 0;
            std::iter::from_fn(move || {
                (computed < tokens).then(|| {
                    let next = change.filter(|change| *change > computed);
                    let range = next_range(prompt, tokens, next, computed, 4);
                    computed = range.end;
                    range
                })
            })
            .collect::<Vec<_>>()
        };
        assert_eq!(ranges(5, 5, None), [0..4, 4..5]);
        assert_eq!(ranges(8, 9, Some(0)), [0..4, 4..8, 8..9]);
        assert_eq!(ranges(6, 15, Some(usize::MAX)), [0..4, 4..6, 6..10, 10..14, 14..15]);
        assert_eq!(ranges(10, 11, Some(5)), [0..4, 4..5, 5..8, 8..10, 10..11]);
    }
}
