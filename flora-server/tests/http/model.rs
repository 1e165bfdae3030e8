//! A model that says its prompt over and over, so that every test knows what it will say.
//!
//! Tokens are bytes, and 256 is the end of a text. A prompt with [`END`] in it ends there, one that begins with `?` makes the
//! model draw from the small letters, and a step with [`FAULT`] in it fails; [`LATE_FAULT`] is said as [`FAULT`], and so makes
//! the step after fail. With an adapter, the model says the
//! adapter's name first.

use std::collections::BTreeMap;
use std::fmt;
use std::sync::{Arc, Condvar, Mutex};

use flora_engine::{
    AdapterContent, AdapterFacts, AdapterFailure, AdapterId, AdapterSource, Composition, Decoder, DecoderLimits,
    PlaceError, Read, SequenceId, StepSegment, Unread, Vocabulary,
};

/// The byte that the model takes for the end of a text.
pub(crate) const END: char = '\u{4}';
/// The byte at which a step fails.
pub(crate) const FAULT: char = '\u{7}';
/// The byte that the model says as [`FAULT`].
pub(crate) const LATE_FAULT: char = '\u{6}';
/// The token of the end of a text.
pub(crate) const END_TOKEN: u32 = 256;
/// The most tokens of a sequence.
pub(crate) const CONTEXT: u32 = 1 << 16;

/// Holds steps back while it is closed.
#[derive(Clone, Default)]
pub(crate) struct Gate(Arc<(Mutex<bool>, Condvar)>);

impl Gate {
    pub(crate) fn close(&self) {
        *self.0.0.lock().unwrap() = true;
    }

    pub(crate) fn open(&self) {
        *self.0.0.lock().unwrap() = false;
        self.0.1.notify_all();
    }

    fn pass(&self) {
        let _open = self.0.1.wait_while(self.0.0.lock().unwrap(), |closed| *closed).unwrap();
    }
}

/// The model.
pub(crate) struct Parrot {
    gate: Gate,
    sequences: BTreeMap<SequenceId, Sequence>,
    adapters: BTreeMap<AdapterId, String>,
}

#[derive(Default)]
struct Sequence {
    prompt: Vec<u32>,
    held: usize,
}

/// Why a step failed.
#[derive(Debug)]
pub(crate) struct Fault;

impl fmt::Display for Fault {
    fn fmt(&self, formatter: &mut fmt::Formatter<'_>) -> fmt::Result {
        formatter.write_str("the parrot fell silent")
    }
}

impl std::error::Error for Fault {}

impl Parrot {
    pub(crate) fn new(gate: Gate) -> Self {
        Self { gate, sequences: BTreeMap::new(), adapters: BTreeMap::new() }
    }

    /// What its tokens say.
    pub(crate) fn vocabulary() -> Vocabulary {
        Vocabulary::new((0..=255).map(|byte| vec![byte]).chain([Vec::new()]).collect())
    }

    /// The logits that are wanted of a segment. Within a prompt, the byte after each in the alphabet is likely to follow it.
    fn run(&mut self, segment: &StepSegment<'_>) -> Vec<f32> {
        let next = self.next(segment);
        let within = segment.tokens.iter().map(|token| likely(&[token + 1]));
        let rows = within.take(segment.tokens.len() - 1).chain([next]).collect::<Vec<_>>();
        rows[rows.len() - segment.logits.of(rows.len())..].concat()
    }

    /// The logits after the last token of a segment.
    fn next(&mut self, segment: &StepSegment<'_>) -> Vec<f32> {
        let sequence = self.sequences.entry(segment.sequence).or_default();
        assert_eq!(sequence.held, segment.first_position as usize);
        sequence.prompt.extend(&segment.tokens[..segment.prompt_tokens as usize]);
        sequence.held += segment.tokens.len();
        if sequence.prompt[0] == u32::from(b'?') {
            return likely(&(u32::from(b'a')..=u32::from(b'z')).collect::<Vec<_>>());
        }
        let name = segment.adapter.map_or("", |adapter| &self.adapters[&adapter]);
        let said: Vec<u32> = name.bytes().map(u32::from).chain(sequence.prompt.iter().copied()).collect();
        let next = said[(sequence.held - sequence.prompt.len()) % said.len()];
        let next = match char::from_u32(next) {
            Some(END) => END_TOKEN,
            Some(LATE_FAULT) => u32::from(FAULT),
            _ => next,
        };
        likely(&[next])
    }
}

/// Logits by which one of these is next.
fn likely(tokens: &[u32]) -> Vec<f32> {
    let mut logits = vec![0.0; END_TOKEN as usize + 1];
    for token in tokens {
        logits[*token as usize] = 40.0;
    }
    logits
}

impl Decoder for Parrot {
    type Prepared = String;
    type Error = Fault;

    fn limits(&self) -> DecoderLimits {
        DecoderLimits { vocabulary: END_TOKEN + 1, context_length: CONTEXT, cache_bytes_per_token: 1 }
    }

    fn step(&mut self, segments: &[StepSegment<'_>]) -> Result<Vec<f32>, Fault> {
        self.gate.pass();
        if segments.iter().any(|segment| segment.tokens.contains(&u32::from(FAULT))) {
            return Err(Fault);
        }
        let mut logits = Vec::new();
        for segment in segments {
            logits.extend(self.run(segment));
        }
        Ok(logits)
    }

    fn release(&mut self, sequence: SequenceId) {
        self.sequences.remove(&sequence);
    }

    fn place(&mut self, adapter: AdapterId, name: String) -> Result<(), PlaceError<String>> {
        self.adapters.insert(adapter, name);
        Ok(())
    }

    fn remove(&mut self, adapter: AdapterId) {
        self.adapters.remove(&adapter);
    }
}

/// Names of adapters that say themselves; one of them, `broken`, can't be used.
pub(crate) struct Names;

impl Names {
    fn check(name: &str) -> Result<(), AdapterFailure> {
        match name {
            "broken" => {
                let reason = "its file holds 3 bytes".to_owned();
                Err(AdapterFailure::Unusable { name: name.to_owned(), reason })
            }
            name if Self.names().iter().any(|known| known == name) => Ok(()),
            name => Err(AdapterFailure::Unknown(name.to_owned())),
        }
    }
}

impl AdapterSource for Names {
    type Prepared = String;

    fn names(&self) -> Vec<String> {
        let mut names = vec!["broken".to_owned(), "alice".to_owned(), "two words, one name: ü".to_owned()];
        names.extend((0..32).map(|number| format!("user{number}")));
        names.sort();
        names
    }

    fn version(&self, name: &str) -> Result<u64, AdapterFailure> {
        Self::check(name).map(|()| 0)
    }

    fn prepare(&self, name: &str) -> Result<Read<String>, Unread> {
        Self::check(name)?;
        Ok(Read { version: 0, prepared: name.to_owned() })
    }

    fn compose(&self, composition: &Composition) -> Result<Read<String>, Unread> {
        composition.parts().try_for_each(|(name, _)| Self::check(name))?;
        let version = self.version_of(&composition.clone().into())?;
        Ok(Read { version, prepared: composition.to_string() })
    }

    fn facts(prepared: &String) -> AdapterFacts {
        let name = prepared.bytes().fold(0, |content, byte| content << 8 | u128::from(byte));
        AdapterFacts { bytes: prepared.len() as u64, content: AdapterContent(name), invocation: None, gated: false }
    }
}
