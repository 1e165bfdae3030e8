//! What an engine has done and holds, as numbers.

use std::time::Duration;

/// A snapshot. Counts are since the start.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct Metrics {
    /// Requests that wait, those that were pre-empted among them.
    pub waiting: usize,
    /// Requests that run.
    pub running: usize,
    /// Requests that came to their end.
    pub finished: u64,
    /// Requests that failed after they were accepted.
    pub failed: u64,
    /// Requests whose client went away.
    pub cancelled: u64,
    /// Batches run.
    pub steps: u64,
    /// Tokens of prompts, each counted once.
    pub prompt_tokens: u64,
    /// Tokens chosen.
    pub generated_tokens: u64,
    /// Tokens that were run again after a pre-emption.
    pub recomputed_tokens: u64,
    /// Tokens whose keys and values were there, of a sequence that began alike.
    pub shared_tokens: u64,
    /// Sequences that had to make room.
    pub preemptions: u64,
    /// Blocks of the cache that sequences hold.
    pub cache_blocks_used: usize,
    /// Blocks of the cache that none holds, and that are kept for sequences that begin alike; their memory is there for others.
    pub cache_blocks_kept: usize,
    /// Blocks of the cache.
    pub cache_blocks_total: usize,
    /// Tokens of a block.
    pub cache_block_tokens: usize,
    /// How long the last step took, from admission to its last event.
    pub last_step: Duration,
    /// Of adapters.
    pub adapters: AdapterMetrics,
}

/// Which adapters requests have, each named once and in order: what routes requests sends one to where its adapter is.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct AdapterRequests {
    /// Of requests that run.
    pub running: Vec<String>,
    /// Of requests that wait; those of others that run are there too.
    pub waiting: Vec<String>,
    /// How many may be resident.
    pub resident: usize,
}

/// A snapshot of the adapters' comings and goings. Counts are since the start.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct AdapterMetrics {
    /// Requests that found their adapter resident.
    pub hits: u64,
    /// Adapters placed.
    pub loads: u64,
    /// Adapters removed to make room.
    pub evictions: u64,
    /// Loads that failed.
    pub failures: u64,
    /// Resident now, versions that are on their way out among them.
    pub resident: usize,
    /// Bytes of the resident ones.
    pub resident_bytes: u64,
    /// Being read or compared with the disk, or ready and waiting for a place.
    pub loading: usize,
}
