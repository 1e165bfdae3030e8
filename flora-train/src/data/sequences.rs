//! Documents to sequences of bounded length. Each is a segment of a batch by itself, so that a batch needs no padding, and attention
//! never crosses from one document to another.

use sha2::{Digest, Sha256};

use super::read::DataError;
use crate::random::generator;

/// The tokens of one example.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Document {
    tokens: Vec<u32>,
    /// For each token, whether it is learnt.
    learnt: Vec<bool>,
    excess: Excess,
}

/// What becomes of the tokens beyond the length of a sequence.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Excess {
    /// They are further sequences, which begin without what was before.
    Continued,
    /// They are left out: an answer isn't learnt without its question.
    Dropped,
}

impl Document {
    /// One without tokens.
    pub fn new(excess: Excess) -> Self {
        Self { tokens: Vec::new(), learnt: Vec::new(), excess }
    }

    /// Adds tokens, which are learnt or not.
    pub fn push(&mut self, tokens: impl IntoIterator<Item = u32>, learnt: bool) {
        self.tokens.extend(tokens);
        self.learnt.resize(self.tokens.len(), learnt);
    }

    /// The last token.
    pub fn last(&self) -> Option<u32> {
        self.tokens.last().copied()
    }

    /// How many tokens there are.
    pub fn len(&self) -> usize {
        self.tokens.len()
    }

    /// Whether there is none.
    pub fn is_empty(&self) -> bool {
        self.tokens.is_empty()
    }
}

/// Tokens of one document, and what should follow each.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Sequence {
    /// At least one.
    pub tokens: Vec<u32>,
    /// As many, at least one of which is some token.
    pub targets: Vec<Option<u32>>,
}

/// What a job is trained or evaluated on.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Dataset {
    sequences: Vec<Sequence>,
    /// Documents that were cut off at the length of a sequence.
    pub cut_off: usize,
    /// Documents of which nothing is learnt.
    pub unused: usize,
    digest: String,
}

impl Dataset {
    /// `documents` in sequences of at most `length` tokens. A token at a sequence's end is learnt there, although it begins the
    /// next one.
    ///
    /// # Errors
    /// Nothing is left to learn from.
    pub fn new(documents: &[Document], length: usize) -> Result<Self, DataError> {
        let mut made = Self { sequences: Vec::new(), cut_off: 0, unused: 0, digest: String::new() };
        let length = length.max(1);
        for document in documents {
            let before = made.sequences.len();
            let follows = document.tokens.len().saturating_sub(1);
            for start in (0..follows).step_by(length) {
                if start > 0 && document.excess == Excess::Dropped {
                    made.cut_off += 1;
                    break;
                }
                let end = (start + length).min(follows);
                let target = |at: usize| document.learnt[at].then_some(document.tokens[at]);
                let targets: Vec<Option<u32>> = (start + 1..=end).map(target).collect();
                if targets.iter().any(Option::is_some) {
                    made.sequences.push(Sequence { tokens: document.tokens[start..end].to_vec(), targets });
                }
            }
            made.unused += usize::from(made.sequences.len() == before);
        }
        if made.sequences.is_empty() {
            let reason = format!(
                "of {} documents none has a token to learn within its first {length}; {} were cut off there",
                documents.len(),
                made.cut_off
            );
            return Err(DataError::Nothing { place: "the data".to_owned(), reason });
        }
        made.digest = digest(&made.sequences);
        Ok(made)
    }

    /// The first `sequences` of them alone, at least one.
    #[must_use]
    pub fn of_first(mut self, sequences: usize) -> Self {
        self.sequences.truncate(sequences.max(1));
        self.digest = digest(&self.sequences);
        self
    }

    /// Those of them alone whose positions `is_kept` keeps. A job needs one at least.
    #[must_use]
    pub fn keep(mut self, is_kept: impl Fn(usize) -> bool) -> Self {
        let mut positions = 0..;
        self.sequences.retain(|_| positions.next().is_some_and(&is_kept));
        self.digest = digest(&self.sequences);
        self
    }

    /// In the order of the documents.
    pub fn sequences(&self) -> &[Sequence] {
        &self.sequences
    }

    /// Tokens of all sequences.
    pub fn tokens(&self) -> u64 {
        self.sequences.iter().map(|sequence| sequence.tokens.len() as u64).sum()
    }

    /// Targets of all sequences.
    pub fn targets(&self) -> u64 {
        self.sequences.iter().map(|sequence| sequence.targets.iter().flatten().count() as u64).sum()
    }

    /// What tells the data from any other.
    pub fn digest(&self) -> &str {
        &self.digest
    }
}

fn digest(sequences: &[Sequence]) -> String {
    let mut hasher = Sha256::new();
    for sequence in sequences {
        hasher.update((sequence.tokens.len() as u64).to_le_bytes());
        sequence.tokens.iter().for_each(|token| hasher.update(token.to_le_bytes()));
        for target in &sequence.targets {
            hasher.update(target.map_or(u64::MAX, u64::from).to_le_bytes());
        }
    }
    hasher.finalize().iter().take(16).map(|byte| format!("{byte:02x}")).collect()
}

/// The documents in two: to learn from, and `fraction` of them, at least one, to evaluate on. Which ones follows from `seed`; both
/// keep their order.
///
/// # Errors
/// There are less than two documents.
pub fn split(documents: Vec<Document>, fraction: f64, seed: u64) -> Result<(Vec<Document>, Vec<Document>), DataError> {
    let count = documents.len();
    if count < 2 {
        return Err(DataError::Indivisible { documents: count });
    }
    let held = ((count as f64 * fraction).round() as usize).clamp(1, count - 1);
    let mut drawn: Vec<usize> = (0..count).collect();
    generator(seed, "held out", 0).shuffle(&mut drawn);
    let mut is_held = vec![false; count];
    drawn.iter().take(held).for_each(|index| is_held[*index] = true);
    let mut is_held = is_held.into_iter();
    let (held, learnt) = documents.into_iter().partition(|_| is_held.next().unwrap_or(false));
    Ok((learnt, held))
}
