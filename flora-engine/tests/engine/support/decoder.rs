//! A decoder whose logits are a hash of the adapter and all tokens of the sequence, and which panics where the engine breaks the
//! contract.

use std::collections::{BTreeMap, BTreeSet};
use std::hash::{DefaultHasher, Hash, Hasher};
use std::ops::Range;
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};

use flora_engine::{
    AdapterFailure, AdapterId, BlockId, BlockSharing, Decoder, DecoderLimits, LogitRows, Options, PlaceError,
    SequenceId, StepSegment,
};

use super::TOKENS;

/// Tokens of a sequence, at most.
pub(crate) const CONTEXT: u32 = 64;

/// A prompt that ends with these has NaN for logits.
pub(crate) const POISON: [u32; 2] = [11, 11];

/// The adapter that acts from its invocation on.
pub(crate) const INVOKED: &str = "invoked";

/// The adapter whose sequences hold the base model's rows too.
pub(crate) const GATED: &str = "gated";

/// An adapter in host memory.
#[derive(Clone, Debug, PartialEq, Eq)]
pub(crate) struct FakeAdapter {
    pub(crate) name: String,
    pub(crate) version: u64,
    pub(crate) bytes: u64,
    pub(crate) fits: bool,
    /// What it was made of, by names and versions.
    pub(crate) parts: Vec<(String, u64)>,
}

/// The decoder; its clones are views of the same device.
#[derive(Clone, Debug)]
pub(crate) struct FakeDecoder {
    pub(crate) options: Options,
    state: Arc<Mutex<State>>,
}

/// The device.
#[derive(Debug, Default)]
pub(crate) struct State {
    pub(crate) sequences: BTreeMap<SequenceId, Held>,
    /// Blocks that several of them may have.
    pub(crate) shared: BTreeMap<BlockId, Vec<FakeRow>>,
    /// Tokens that were run.
    pub(crate) computed: usize,
    pub(crate) adapters: BTreeMap<AdapterId, FakeAdapter>,
    /// Of every sequence that ever was: its adapters and, once it is known, the length of its prompt.
    pub(crate) known: BTreeMap<SequenceId, Known>,
    /// Sequences whose rows have different adapters, so that a chunk may end anywhere.
    pub(crate) varying: BTreeSet<SequenceId>,
    /// Bytes of adapters that there is room for.
    pub(crate) adapter_capacity: Option<u64>,
    pub(crate) next_step: NextStep,
    /// What every sequence says, in place of the hash.
    pub(crate) script: Vec<u32>,
    pub(crate) steps: usize,
    pub(crate) places: Vec<u64>,
    /// Sequences of the last step.
    pub(crate) last_step: Vec<SequenceId>,
}

/// What is held of a sequence.
#[derive(Clone, Debug, Default)]
pub(crate) struct Held {
    pub(crate) rows: Vec<FakeRow>,
    /// Blocks of it that others may have.
    shared: usize,
    /// Tokens that it began with.
    resumed: usize,
}

/// A token and the adapter that it was run with, by its name and version.
pub(crate) type FakeRow = (u32, Option<(String, u64)>);

#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub(crate) struct Known {
    /// Each once, as they came.
    pub(crate) adapters: Vec<FakeAdapter>,
    pub(crate) prompt: Option<usize>,
}

#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub(crate) enum NextStep {
    #[default]
    Works,
    Fails,
    Panics,
}

#[derive(Debug, thiserror::Error)]
#[error("the device is lost")]
pub(crate) struct Lost;

impl FakeDecoder {
    pub(crate) fn new(options: &Options) -> Self {
        Self { options: options.clone(), state: Arc::default() }
    }

    pub(crate) fn state(&self) -> MutexGuard<'_, State> {
        self.state.lock().unwrap_or_else(PoisonError::into_inner)
    }
}

/// Blocks of memory that a block of such rows takes.
fn block_size(rows: &[FakeRow]) -> usize {
    let is_gated = |(_, with): &FakeRow| with.as_ref().is_some_and(|(name, _)| name == GATED);
    if rows.iter().any(is_gated) { 2 } else { 1 }
}

impl State {
    fn blocks(&self, block_tokens: usize) -> usize {
        let own = |held: &Held| (held.rows.len().div_ceil(block_tokens) - held.shared) * block_size(&held.rows);
        self.shared_blocks() + self.sequences.values().map(own).sum::<usize>()
    }

    /// Blocks of memory that those take which sequences may have in common.
    pub(crate) fn shared_blocks(&self) -> usize {
        self.shared.values().map(|rows| block_size(rows)).sum()
    }

    /// Checks one segment and keeps its tokens.
    fn take(&mut self, segment: &StepSegment<'_>, chunk: usize) {
        let (id, length) = (segment.sequence, segment.tokens.len());
        assert!((1..=chunk).contains(&length), "{segment:?}");
        assert!(segment.tokens.iter().all(|token| *token < TOKENS), "{segment:?}");
        let adapter = segment.adapter.map(|id| self.adapters.get(&id).expect("an adapter that was placed").clone());
        let varies = self.varying.contains(&id);
        let own: Vec<FakeAdapter> = adapter.iter().cloned().collect();
        let known = self.known.entry(id).or_insert_with(|| Known { adapters: own.clone(), prompt: None });
        for adapter in own.iter().filter(|_| varies) {
            if known.adapters.iter().all(|known| known.name != adapter.name) {
                known.adapters.push(adapter.clone());
            }
        }
        let keeps =
            if varies { own.iter().all(|adapter| known.adapters.contains(adapter)) } else { known.adapters == own };
        assert!(keeps, "a sequence keeps its adapters, and their versions: {own:?} of {known:?}");
        let held = self.sequences.entry(id).or_default();
        let (start, resumed) = (held.rows.len(), held.resumed);
        assert_eq!(start, segment.first_position as usize, "{segment:?}");
        let with = adapter.as_ref().map(|adapter| (adapter.name.clone(), adapter.version));
        held.rows.extend(segment.tokens.iter().map(|token| (*token, with.clone())));
        self.computed += length;
        assert!(held.rows.len() <= CONTEXT as usize);
        if varies {
            return;
        }
        if segment.prompt_tokens > 0 {
            assert_eq!(segment.prompt_tokens as usize, length, "a chunk of the prompt has nothing else");
            assert!(start % chunk == 0 || start == resumed, "{segment:?}");
            let boundary = (start / chunk + 1) * chunk;
            let ends = start + length < boundary || segment.logits == LogitRows::Last;
            match known.prompt {
                Some(prompt) => assert_eq!(start + length, prompt.min(boundary), "{segment:?}"),
                None if ends => known.prompt = Some(start + length),
                None => {}
            }
        } else {
            let prompt = *known.prompt.get_or_insert(start);
            assert!((start - prompt).is_multiple_of(chunk) || length == 1 || start == resumed, "{segment:?}");
        }
    }

    /// The logits after the first `end` tokens.
    fn logits(&self, id: SequenceId, end: usize) -> [f32; TOKENS as usize] {
        let known = &self.known[&id];
        self.logits_of(known.prompt, &self.sequences[&id].rows[..end])
    }

    /// The logits after these rows of a sequence with so long a prompt.
    pub(crate) fn logits_of(&self, prompt: Option<usize>, rows: &[FakeRow]) -> [f32; TOKENS as usize] {
        let tokens: Vec<u32> = rows.iter().map(|(token, _)| *token).collect();
        if prompt.is_some_and(|prompt| tokens.get(..prompt).is_some_and(|prompt| prompt.ends_with(&POISON))) {
            return [f32::NAN; TOKENS as usize];
        }
        let said = tokens.len().wrapping_sub(prompt.unwrap_or_default());
        if let Some(scripted) = self.script.get(said) {
            return std::array::from_fn(|token| f32::from(u8::from(token == *scripted as usize)));
        }
        std::array::from_fn(|token| {
            let mut hasher = DefaultHasher::new();
            (rows, token).hash(&mut hasher);
            (hasher.finish() % 64) as f32 / 16.0
        })
    }
}

impl Decoder for FakeDecoder {
    type Prepared = FakeAdapter;
    type Error = Lost;

    fn limits(&self) -> DecoderLimits {
        DecoderLimits { vocabulary: TOKENS, context_length: CONTEXT, cache_bytes_per_token: 1 }
    }

    fn step(&mut self, segments: &[StepSegment<'_>]) -> Result<Vec<f32>, Lost> {
        let (options, mut state) = (&self.options, self.state());
        let sequences: BTreeSet<SequenceId> = segments.iter().map(|segment| segment.sequence).collect();
        assert!(!segments.is_empty() && sequences.len() == segments.len(), "{segments:?}");
        assert!(segments.len() <= options.sequences);
        assert!(segments.iter().map(|segment| segment.tokens.len()).sum::<usize>() <= options.tokens_per_step);
        for segment in segments {
            state.take(segment, options.chunk_tokens);
        }
        assert!(state.blocks(options.block_tokens) <= options.cache_tokens / options.block_tokens);
        state.steps += 1;
        state.last_step = segments.iter().map(|segment| segment.sequence).collect();
        match std::mem::take(&mut state.next_step) {
            NextStep::Works => {}
            NextStep::Fails => return Err(Lost),
            NextStep::Panics => panic!("the device is on fire"),
        }
        let rows = |segment: &StepSegment<'_>| {
            let end = segment.first_position as usize + segment.tokens.len();
            let first = end - segment.logits.of(segment.tokens.len());
            let logits = |end| state.logits(segment.sequence, end);
            (first..end).flat_map(|position| logits(position + 1)).collect::<Vec<f32>>()
        };
        Ok(segments.iter().flat_map(rows).collect())
    }

    fn release(&mut self, sequence: SequenceId) {
        self.state().sequences.remove(&sequence);
    }

    fn sharing(&mut self) -> Option<&mut dyn BlockSharing> {
        Some(self)
    }

    fn place(&mut self, adapter: AdapterId, prepared: FakeAdapter) -> Result<(), PlaceError<FakeAdapter>> {
        let mut state = self.state();
        state.places.push(prepared.bytes);
        if !prepared.fits {
            let reason = "of another shape".into();
            return Err(PlaceError::Unfit(AdapterFailure::Unusable { name: prepared.name, reason }));
        }
        let taken: u64 = state.adapters.values().map(|adapter| adapter.bytes).sum();
        if state.adapter_capacity.is_some_and(|capacity| taken + prepared.bytes > capacity) {
            return Err(PlaceError::Full(prepared));
        }
        assert!(state.adapters.len() < self.options.adapters.resident, "more adapters than may be resident");
        assert!(taken + prepared.bytes <= self.options.adapters.bytes, "more bytes than may be resident");
        assert_eq!(state.adapters.insert(adapter, prepared), None, "a number that is taken");
        Ok(())
    }

    fn remove(&mut self, adapter: AdapterId) {
        assert!(self.state().adapters.remove(&adapter).is_some(), "an adapter that isn't there");
    }
}

impl BlockSharing for FakeDecoder {
    fn granularity(&self) -> u32 {
        1
    }

    fn share(&mut self, sequence: SequenceId, positions: Range<u32>, block: BlockId) {
        let block_tokens = self.options.block_tokens;
        let mut state = self.state();
        let held = state.sequences.get_mut(&sequence).expect("a sequence that is held");
        let positions = positions.start as usize..positions.end as usize;
        assert_eq!(positions.start, held.shared * block_tokens, "blocks are shared one after the other");
        assert!(positions.len() <= block_tokens && !positions.is_empty());
        held.shared += 1;
        let rows = held.rows[positions].to_vec();
        let known = state.shared.entry(block).or_insert_with(|| rows.clone());
        assert_eq!(*known, rows, "a block that is another");
    }

    fn resume(&mut self, sequence: SequenceId, blocks: &[BlockId], tokens: u32) {
        let block_tokens = self.options.block_tokens;
        let mut state = self.state();
        let (last, whole) = blocks.split_last().expect("a block at least");
        assert!(whole.iter().all(|block| state.shared[block].len() == block_tokens));
        let tokens = tokens as usize;
        let in_last = tokens - whole.len() * block_tokens;
        assert!((1..=state.shared[last].len()).contains(&in_last), "{in_last} of the last of {blocks:?}");
        let mut rows: Vec<FakeRow> = blocks.iter().flat_map(|block| state.shared[block].clone()).collect();
        rows.truncate(tokens);
        for (name, version) in rows.iter().filter_map(|(_, with)| with.as_ref()) {
            let is_it = |adapter: &&FakeAdapter| (&adapter.name, adapter.version) == (name, *version);
            let adapter = state.adapters.values().find(is_it).expect("what a sequence begins with is resident").clone();
            let known = &mut state.known.entry(sequence).or_default().adapters;
            if !known.contains(&adapter) {
                known.push(adapter);
            }
        }
        let held = Held { rows, shared: tokens / block_tokens, resumed: tokens };
        assert!(state.sequences.insert(sequence, held).is_none(), "a sequence that is held");
    }

    fn forget(&mut self, block: BlockId) {
        assert!(self.state().shared.remove(&block).is_some(), "a block that isn't there");
    }
}
