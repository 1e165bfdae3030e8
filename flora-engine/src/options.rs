//! What an engine is told when it is made: sizes of batches, cache, queue and adapter memory.

/// How an engine batches and what it holds.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Options {
    /// The most sequences that run at once.
    pub sequences: usize,
    /// The most tokens in one step, prefill and decode together. At least [`Self::chunk_tokens`] beside one token of every
    /// other sequence, so that a chunk always finds room.
    pub tokens_per_step: usize,
    /// A prompt is run in chunks of this many tokens, whatever else is in the batch.
    pub chunk_tokens: usize,
    /// Tokens whose keys and values the cache holds, those of all running sequences together; whole blocks of it are used.
    pub cache_tokens: usize,
    /// Tokens in a block of the cache: what a sequence takes at a time.
    pub block_tokens: usize,
    /// Whether keys and values are kept for sequences that begin alike, where the decoder can share them.
    pub share_prefixes: bool,
    /// The most requests that wait to be run.
    pub waiting: usize,
    /// What a request may ask to be stopped at.
    pub stop: StopLimits,
    /// Adapters that come and go.
    pub adapters: AdapterOptions,
}

impl Default for Options {
    fn default() -> Self {
        Self {
            sequences: 32,
            tokens_per_step: 1024,
            chunk_tokens: 512,
            cache_tokens: 16_384,
            block_tokens: 32,
            share_prefixes: true,
            waiting: 1024,
            stop: StopLimits::default(),
            adapters: AdapterOptions::default(),
        }
    }
}

/// The most that a request may ask to be stopped at.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct StopLimits {
    /// Stop strings.
    pub strings: usize,
    /// Bytes of one of them.
    pub string_bytes: usize,
    /// Stop tokens.
    pub tokens: usize,
}

impl Default for StopLimits {
    fn default() -> Self {
        Self { strings: 16, string_bytes: 256, tokens: 64 }
    }
}

/// What the device holds of adapters, and how they get there.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct AdapterOptions {
    /// The most that are resident.
    pub resident: usize,
    /// The most bytes that the resident ones take.
    pub bytes: u64,
    /// Names of those that aren't evicted once they are resident.
    pub pinned: Vec<String>,
    /// Threads that read and fold adapters.
    pub loaders: usize,
    /// The most adapters that are being read, or are ready in host memory and wait for a place.
    pub loading: usize,
    /// The most bytes of adapters that are placed between two steps, or else one adapter: those that run wait for no more than
    /// such a copy to the device.
    pub bytes_per_step: u64,
}

impl Default for AdapterOptions {
    fn default() -> Self {
        Self { resident: 64, bytes: u64::MAX, pinned: Vec::new(), loaders: 2, loading: 8, bytes_per_step: 4 << 20 }
    }
}

/// Options that no engine can run with.
#[derive(Clone, Debug, PartialEq, Eq, thiserror::Error)]
#[non_exhaustive]
pub enum OptionsError {
    /// Something is 0 that has to be something.
    #[error("the option `{0}` is 0; it has to be at least 1")]
    Zero(&'static str),
    /// A chunk may find no room in a step.
    #[error(
        "`tokens_per_step` is {tokens_per_step}, which a chunk of {chunk_tokens} tokens beside {sequences} sequences may never \
         fit in; make it at least {least}"
    )]
    StepTooSmall {
        /// As given.
        tokens_per_step: usize,
        /// As given.
        chunk_tokens: usize,
        /// As given.
        sequences: usize,
        /// The least that does.
        least: usize,
    },
    /// Not one block.
    #[error("`cache_tokens` is {cache_tokens}, less than one block of {block_tokens} tokens")]
    CacheTooSmall {
        /// As given.
        cache_tokens: usize,
        /// As given.
        block_tokens: usize,
    },
    /// A thread couldn't be started.
    #[error("a thread of the engine can't be started: {0}")]
    Thread(String),
}

impl Options {
    pub(crate) fn check(&self) -> Result<(), OptionsError> {
        let sizes = [
            ("sequences", self.sequences),
            ("chunk_tokens", self.chunk_tokens),
            ("block_tokens", self.block_tokens),
            ("waiting", self.waiting),
            ("adapters.loaders", self.adapters.loaders),
            ("adapters.loading", self.adapters.loading),
        ];
        if let Some((name, _)) = sizes.into_iter().find(|(_, size)| *size == 0) {
            return Err(OptionsError::Zero(name));
        }
        let least = self.chunk_tokens.saturating_add(self.sequences - 1);
        if self.tokens_per_step < least {
            return Err(OptionsError::StepTooSmall {
                tokens_per_step: self.tokens_per_step,
                chunk_tokens: self.chunk_tokens,
                sequences: self.sequences,
                least,
            });
        }
        if self.cache_tokens < self.block_tokens {
            return Err(OptionsError::CacheTooSmall {
                cache_tokens: self.cache_tokens,
                block_tokens: self.block_tokens,
            });
        }
        Ok(())
    }
}
