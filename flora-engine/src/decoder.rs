//! What the engine asks of a model, and of the place that adapters come from.

use std::error::Error;
use std::ops::Range;

use crate::composition::{AdapterChoice, Composition};

/// A sequence whose keys and values a decoder keeps, from its first segment until it is released.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord, Hash)]
pub struct SequenceId(pub u64);

/// An adapter that is resident on the device: a number that the engine gives out, unique among the resident ones.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord, Hash)]
pub struct AdapterId(pub u32);

/// Keys and values of a block of tokens that several sequences may have: a number that the engine gives out.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord, Hash)]
pub struct BlockId(pub u64);

/// What an adapter is told by from any other, whatever it is called and whenever it was read: a digest of all that it holds.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord, Hash)]
pub struct AdapterContent(pub u128);

/// What the engine has to know of an adapter.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct AdapterFacts {
    /// The bytes that it takes on the device.
    pub bytes: u64,
    /// What it holds.
    pub content: AdapterContent,
    /// Tokens that invoke it, of an activated adapter (aLoRA): it acts from their last occurrence in a prompt on, and where they
    /// don't occur not at all. `None`: it acts everywhere.
    pub invocation: Option<Vec<u32>>,
    /// Whether its parts are weighed for each token, by what the base model makes of the tokens up to it (X-LoRA). It has all tokens of
    /// a request, and its sequences hold the base model's keys and values beside their own: two times as much.
    pub gated: bool,
}

/// The tokens of one sequence in one step; they follow those that its earlier segments held.
#[derive(Clone, Copy, Debug)]
pub struct StepSegment<'a> {
    /// Whose tokens.
    pub sequence: SequenceId,
    /// The adapter of these tokens; `None` for the base model. Segments of one sequence may have different ones.
    pub adapter: Option<AdapterId>,
    /// The position of the first of `tokens`: how many tokens of the sequence the decoder holds.
    pub first_position: u32,
    /// At least one.
    pub tokens: &'a [u32],
    /// How many of `tokens`, from the first on, belong to the prompt. Generated ones follow: one, or several where a pre-empted
    /// sequence is computed again.
    pub prompt_tokens: u32,
    /// After which of `tokens` the logits are wanted.
    pub logits: LogitRows,
}

/// After which tokens of a segment the logits are wanted.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum LogitRows {
    /// None of them.
    None,
    /// The last.
    Last,
    /// Each of them.
    All,
}

impl LogitRows {
    /// How many rows those of a segment of so many tokens are.
    pub fn of(self, tokens: usize) -> usize {
        match self {
            Self::None => 0,
            Self::Last => 1,
            Self::All => tokens,
        }
    }
}

/// What a decoder can hold.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct DecoderLimits {
    /// Tokens that there are in the base model.
    pub vocabulary: u32,
    /// The most tokens of one sequence, prompt and generated ones.
    pub context_length: u32,
    /// Bytes of keys and values of one token.
    pub cache_bytes_per_token: u64,
}

/// A model on a device, one step at a time.
pub trait Decoder {
    /// An adapter in host memory, ready for the device.
    type Prepared: Send + 'static;
    /// Why a step failed. The engine fails the requests of that step and goes on.
    type Error: Error + Send + Sync + 'static;

    /// What it can hold.
    fn limits(&self) -> DecoderLimits;

    /// Tokens that there are with an adapter: those of [`Self::limits`], unless the adapter brings a vocabulary of its own.
    fn vocabulary(&self, adapter: Option<AdapterId>) -> u32 {
        let _ = adapter;
        self.limits().vocabulary
    }

    /// Runs all segments as one batch: the logits that segments want, one row after the other in the order of the segments and
    /// of their tokens, each of as many as [`Self::vocabulary`] says of its adapter. A sequence is at most once among them.
    ///
    /// What a segment gives depends on its own sequence and adapter, whatever else is in the batch.
    ///
    /// # Errors
    /// The device fails. The sequences of the batch are then only good for [`Self::release`].
    fn step(&mut self, segments: &[StepSegment<'_>]) -> Result<Vec<f32>, Self::Error>;

    /// Forgets a sequence; nothing where it isn't known.
    fn release(&mut self, sequence: SequenceId);

    /// How sequences have keys and values in common; `None` where they can't.
    fn sharing(&mut self) -> Option<&mut dyn BlockSharing> {
        None
    }

    /// Puts an adapter on the device. A step may name it from then on.
    ///
    /// # Errors
    /// See [`PlaceError`]; nothing has changed.
    fn place(&mut self, adapter: AdapterId, prepared: Self::Prepared) -> Result<(), PlaceError<Self::Prepared>>;

    /// Frees an adapter's place; nothing where it isn't there.
    fn remove(&mut self, adapter: AdapterId);
}

/// Keys and values that sequences have in common, block by block. What a block holds never changes.
pub trait BlockSharing {
    /// What the tokens of a block have to be a multiple of.
    fn granularity(&self) -> u32;

    /// Keeps the keys and values of a sequence's tokens at these positions as `block`, so that they outlive it. Where there is such a
    /// block already, which holds the same, the sequence has that from now on instead of its own.
    fn share(&mut self, sequence: SequenceId, positions: Range<u32>, block: BlockId);

    /// Begins a sequence with the first `tokens` tokens of blocks that follow one another. Those of the last block that are beyond
    /// aren't the sequence's.
    fn resume(&mut self, sequence: SequenceId, blocks: &[BlockId], tokens: u32);

    /// Forgets a block; sequences that have it keep it.
    fn forget(&mut self, block: BlockId);
}

impl<D: Decoder + ?Sized> Decoder for Box<D> {
    type Prepared = D::Prepared;
    type Error = D::Error;

    fn limits(&self) -> DecoderLimits {
        (**self).limits()
    }

    fn vocabulary(&self, adapter: Option<AdapterId>) -> u32 {
        (**self).vocabulary(adapter)
    }

    fn step(&mut self, segments: &[StepSegment<'_>]) -> Result<Vec<f32>, Self::Error> {
        (**self).step(segments)
    }

    fn release(&mut self, sequence: SequenceId) {
        (**self).release(sequence);
    }

    fn sharing(&mut self) -> Option<&mut dyn BlockSharing> {
        (**self).sharing()
    }

    fn place(&mut self, adapter: AdapterId, prepared: Self::Prepared) -> Result<(), PlaceError<Self::Prepared>> {
        (**self).place(adapter, prepared)
    }

    fn remove(&mut self, adapter: AdapterId) {
        (**self).remove(adapter);
    }
}

/// Why an adapter isn't on the device.
#[derive(Debug, thiserror::Error)]
pub enum PlaceError<P> {
    /// The device's adapter memory has no room; the adapter comes back, for another try after others were removed.
    #[error("the device's adapter memory is full")]
    Full(P),
    /// It can never be placed.
    #[error("{0}")]
    Unfit(AdapterFailure),
}

/// Why an adapter can't be had: said to the requests that name it, and to them alone.
#[derive(Clone, Debug, PartialEq, Eq, thiserror::Error)]
pub enum AdapterFailure {
    /// There is none of this name.
    #[error("there is no adapter `{0}`")]
    Unknown(String),
    /// It can't be read, or doesn't fit the model.
    #[error("the adapter `{name}` can't be used: {reason}")]
    Unusable {
        /// The adapter, or the composition.
        name: String,
        /// Why, in full.
        reason: String,
    },
}

/// An adapter that was read.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Read<P> {
    /// Of the very files that were read, whatever lies in their place by now.
    pub version: u64,
    /// What [`Decoder::place`] takes.
    pub prepared: P,
}

/// An adapter that couldn't be read.
#[derive(Clone, Debug, PartialEq, Eq, thiserror::Error)]
#[error("{failure}")]
pub struct Unread {
    /// Of the files that can't be used: they needn't be read again. `None` where none could be read whole.
    pub version: Option<u64>,
    /// Why.
    pub failure: AdapterFailure,
}

impl From<AdapterFailure> for Unread {
    fn from(failure: AdapterFailure) -> Self {
        Self { version: None, failure }
    }
}

/// Where adapters come from. Called on threads of its own, so that reading and folding stall no step.
pub trait AdapterSource: Send + Sync + 'static {
    /// What [`Decoder::place`] takes.
    type Prepared: Send + 'static;

    /// The names there are now, sorted.
    fn names(&self) -> Vec<String>;

    /// What tells the adapter's files, as they are at some moment of this call, from any others that may take their place; cheap.
    ///
    /// # Errors
    /// There is no such adapter, or it can't be looked at.
    fn version(&self, name: &str) -> Result<u64, AdapterFailure>;

    /// Reads, checks and folds an adapter.
    ///
    /// # Errors
    /// There is no such adapter, or it can't be used.
    fn prepare(&self, name: &str) -> Result<Read<Self::Prepared>, Unread>;

    /// Reads the parts of a composition, and folds them into one adapter.
    ///
    /// # Errors
    /// A part that there isn't, or that can't be used in a sum. None can where this isn't implemented.
    fn compose(&self, composition: &Composition) -> Result<Read<Self::Prepared>, Unread> {
        let reason = "adapters aren't composed here; name one of them".to_owned();
        Err(AdapterFailure::Unusable { name: composition.to_string(), reason }.into())
    }

    /// [`version`](Self::version) of an adapter, or of all that it is made of.
    ///
    /// # Errors
    /// As [`version`](Self::version).
    fn version_of(&self, adapter: &AdapterChoice) -> Result<u64, AdapterFailure> {
        match adapter {
            AdapterChoice::Named(name) => self.version(name),
            AdapterChoice::Composed(composition) => composition.version(|name| self.version(name)),
        }
    }

    /// [`prepare`](Self::prepare) or [`compose`](Self::compose).
    ///
    /// # Errors
    /// As these.
    fn read(&self, adapter: &AdapterChoice) -> Result<Read<Self::Prepared>, Unread> {
        match adapter {
            AdapterChoice::Named(name) => self.prepare(name),
            AdapterChoice::Composed(composition) => self.compose(composition),
        }
    }

    /// What the engine has to know of it.
    fn facts(prepared: &Self::Prepared) -> AdapterFacts;
}
