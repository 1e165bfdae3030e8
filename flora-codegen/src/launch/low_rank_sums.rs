//! Where the low-rank sums (h) of `fused` are, from one launch to the next. A launch has to find them empty, because a sum that
//! is there is its own flag. So there are two halves: a launch fills one and empties the other, which the launch before it has
//! filled. Nothing is uploaded for a batch, and no launch is spent on it.

use std::collections::HashMap;
use std::sync::{Mutex, PoisonError};

use cubecl::prelude::*;
use cubecl::server::Handle;
use cubecl_common::stream_id::StreamId;

use super::prepare::Size;
use crate::kernels::tables::{H_START, NO_SUM};

/// Allocators round buffers up to so many words, twice.
const HALF_WORDS: u32 = 64;

/// The halves of each stream. Launches of one stream run one after the other, which is what emptying relies on.
#[derive(Default)]
pub struct LowRankSums(Mutex<HashMap<StreamId, Halves>>);

/// One buffer: `[2, words]`
struct Halves {
    handle: Handle,
    words: u32,
    /// Which one is empty: 0 or 1.
    empty: u32,
    /// Words of the other that were written.
    written: u32,
}

/// The half that a launch fills, and what it has to empty.
pub(super) struct Half {
    pub(super) handle: Handle,
    /// Words of both.
    pub(super) words: usize,
    /// The first word that the launch fills: the ticket, then sums.
    pub(super) first: u32,
    /// The first word that it empties.
    pub(super) stale: u32,
    /// How many.
    pub(super) stale_count: u32,
}

impl LowRankSums {
    /// An empty half of `size`, which two of make. What comes next on this stream has to be the launch that fills it.
    pub(super) fn take<R: Runtime>(&self, client: &ComputeClient<R>, size: Size, largest_buffer: u64) -> Half {
        let wanted = (size.elements() / 2) as u32;
        let mut streams = self.0.lock().unwrap_or_else(PoisonError::into_inner);
        let halves = streams.entry(StreamId::current()).or_insert_with(|| Halves::new(client, wanted, largest_buffer));
        if halves.words < wanted {
            *halves = Halves::new(client, wanted, largest_buffer);
        }
        let Halves { words, empty, written, .. } = *halves;
        let half = Half {
            handle: halves.handle.clone(),
            words: 2 * words as usize,
            first: empty * words,
            stale: (1 - empty) * words,
            stale_count: written,
        };
        (halves.empty, halves.written) = (1 - empty, wanted);
        half
    }
}

#[cfg(feature = "emit")]
impl LowRankSums {
    /// The buffers that launches leave for those after them.
    pub(crate) fn handles(&self) -> Vec<Handle> {
        let streams = self.0.lock().unwrap_or_else(PoisonError::into_inner);
        streams.values().map(|halves| halves.handle.clone()).collect()
    }
}

impl Halves {
    /// Two empty halves of at least `wanted` words: the bytes that a buffer takes anyway are used.
    fn new<R: Runtime>(client: &ComputeClient<R>, wanted: u32, largest_buffer: u64) -> Self {
        let most = u32::try_from(largest_buffer / 8).unwrap_or(u32::MAX);
        let words = wanted.next_multiple_of(HALF_WORDS).min(most).max(wanted);
        let half = || (0..words).map(|at| if at < H_START { 0 } else { NO_SUM });
        let empty: Vec<u32> = half().chain(half()).collect();
        Self { handle: client.create_from_slice(bytemuck::cast_slice(&empty)), words, empty: 0, written: 0 }
    }
}
