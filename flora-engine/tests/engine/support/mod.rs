//! What the tests share: a decoder that checks the contract, a disk, and a core that is driven step by step.

pub(crate) mod decoder;
pub(crate) mod disk;
pub(crate) mod drive;
pub(crate) mod grammar;

use flora_engine::{LogProbabilities, LogitRules, Options, Request, Sampling, StopAt, Vocabulary};

/// Tokens of the fake model: `a` to `h`, the halves of `é`, bytes that are no UTF-8, one that says nothing.
pub(crate) fn vocabulary() -> Vocabulary {
    let letters = (b'a'..=b'h').map(|letter| vec![letter]);
    Vocabulary::new(letters.chain([vec![0xc3], vec![0xa9], vec![0xff], Vec::new()]).collect())
}

/// How many they are.
pub(crate) const TOKENS: u32 = 12;

/// Small sizes, so that everything is met soon.
pub(crate) fn options() -> Options {
    Options {
        sequences: 4,
        tokens_per_step: 16,
        chunk_tokens: 4,
        cache_tokens: 256,
        block_tokens: 4,
        share_prefixes: false,
        ..Options::default()
    }
}

/// A greedy request without stops.
pub(crate) fn request(prompt: &[u32], adapter: Option<&str>, max_tokens: u32) -> Request {
    Request {
        prompt: prompt.to_vec(),
        adapters: adapter.into(),
        sampling: Sampling::Greedy,
        rules: LogitRules::default(),
        stop: StopAt { max_tokens, strings: Vec::new(), tokens: Vec::new() },
        grammar: None,
        log_probabilities: LogProbabilities::default(),
    }
}
