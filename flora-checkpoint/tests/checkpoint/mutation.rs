//! Random changes of a file, for the tests of every crate that reads files.

use proptest::prelude::*;
use proptest::test_runner::RngSeed;
use std::time::{Duration, Instant};

pub(crate) fn settings() -> ProptestConfig {
    let cases = std::env::var("FLORA_FUZZ_CASES").ok().and_then(|cases| cases.parse().ok()).unwrap_or(64);
    ProptestConfig { cases, rng_seed: RngSeed::Fixed(7), failure_persistence: None, ..Default::default() }
}

/// One change of a file.
#[derive(Clone, Debug)]
pub(crate) enum Change {
    Replace(prop::sample::Index, u8),
    /// Eight bytes at once: a length or an offset.
    ReplaceWord(prop::sample::Index, u64),
    Insert(prop::sample::Index, Vec<u8>),
    Remove(prop::sample::Index, usize),
    Cut(prop::sample::Index),
}

fn change() -> impl Strategy<Value = Change> {
    let index = any::<prop::sample::Index>;
    let word = prop_oneof![any::<u64>(), 0u64..300, Just(u64::MAX), Just(1 << 63), Just(1 << 32)];
    prop_oneof![
        4 => (index(), any::<u8>()).prop_map(|(at, byte)| Change::Replace(at, byte)),
        3 => (index(), word).prop_map(|(at, word)| Change::ReplaceWord(at, word)),
        2 => (index(), prop::collection::vec(any::<u8>(), 1..20)).prop_map(|(at, bytes)| Change::Insert(at, bytes)),
        2 => (index(), 1usize..20).prop_map(|(at, count)| Change::Remove(at, count)),
        1 => index().prop_map(Change::Cut),
    ]
}

pub(crate) fn changes() -> impl Strategy<Value = Vec<Change>> {
    prop::collection::vec(change(), 1..5)
}

pub(crate) fn changed(bytes: &[u8], changes: &[Change]) -> Vec<u8> {
    let mut bytes = bytes.to_vec();
    for change in changes {
        let at = |index: &prop::sample::Index, bytes: &[u8]| index.index(bytes.len() + 1);
        match change {
            Change::Replace(index, byte) => {
                let at = at(index, &bytes);
                bytes.iter_mut().skip(at).take(1).for_each(|old| *old = *byte);
            }
            Change::ReplaceWord(index, word) => {
                let at = at(index, &bytes);
                bytes.iter_mut().skip(at).zip(word.to_le_bytes()).for_each(|(old, byte)| *old = byte);
            }
            Change::Insert(index, new) => {
                let at = at(index, &bytes);
                bytes.splice(at..at, new.iter().copied());
            }
            Change::Remove(index, count) => {
                let at = at(index, &bytes);
                let end = (at + count).min(bytes.len());
                bytes.drain(at..end);
            }
            Change::Cut(index) => {
                let at = at(index, &bytes);
                bytes.truncate(at);
            }
        }
    }
    bytes
}

/// Runs `read` and fails when it takes long: every file here has a few kilobytes.
pub(crate) fn soon(read: impl FnOnce()) {
    let start = Instant::now();
    read();
    let taken = start.elapsed();
    assert!(taken < Duration::from_secs(10), "{taken:?}");
}
