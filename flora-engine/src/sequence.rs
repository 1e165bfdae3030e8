//! A request between its first and its last word: what was said, and what it is still to be.

use std::time::Instant;

use crate::cache::Blocks;
use crate::decoder::AdapterId;
use crate::limits::Accepted;
use crate::request::{Event, FinishReason, Request, Usage};
use crate::rules::Reshaper;
use crate::sample::{LogitsError, Sampler};
use crate::stop::{Found, StopStrings};
use crate::text::{Reader, Vocabulary};

/// What outlives pre-emption: tokens, what was passed on, and the state of sampling.
#[derive(Debug)]
pub(crate) struct Sequence {
    /// Of the prompt, then generated ones.
    tokens: Vec<u32>,
    prompt: usize,
    /// Where it ends for its length, prompt included.
    most: usize,
    stop_tokens: Vec<u32>,
    reshaper: Reshaper,
    sampler: Sampler,
    reader: Reader,
    stop: StopStrings,
}

/// A sequence that waits to run, for the first time or again.
#[derive(Debug)]
pub(crate) struct Waiting {
    pub(crate) sequence: Sequence,
    pub(crate) adapter: WaitingAdapter,
    /// How many of its tokens have been run before.
    pub(crate) run_before: usize,
}

/// What a waiting sequence has of its adapter.
#[derive(Debug)]
pub(crate) enum WaitingAdapter {
    /// Whatever version is the disk's when it begins.
    Named {
        name: String,
        arrived: Instant,
        /// It had to wait for it.
        missed: bool,
    },
    /// It was pre-empted and keeps what it began with, or needs none.
    Chosen(Option<AdapterId>),
}

/// A sequence that runs.
#[derive(Debug)]
pub(crate) struct Running {
    pub(crate) sequence: Sequence,
    pub(crate) adapter: Option<AdapterId>,
    /// How many of its tokens the decoder holds.
    pub(crate) computed: usize,
    /// The most of them that were ever run.
    pub(crate) run_before: usize,
    pub(crate) blocks: Blocks,
}

impl Waiting {
    pub(crate) fn new(request: Accepted, context_length: usize, vocabulary: &Vocabulary, arrived: Instant) -> Self {
        let Request { prompt, adapter, sampling, rules, stop } = request.into_request();
        let sequence = Sequence {
            prompt: prompt.len(),
            most: prompt.len().saturating_add(stop.max_tokens as usize).min(context_length),
            sampler: Sampler::new(sampling, &rules),
            reshaper: Reshaper::new(rules, &prompt, &stop.tokens),
            reader: vocabulary.reader(&prompt),
            tokens: prompt,
            stop_tokens: stop.tokens,
            stop: StopStrings::new(stop.strings),
        };
        let adapter = match adapter {
            Some(name) => WaitingAdapter::Named { name, arrived, missed: false },
            None => WaitingAdapter::Chosen(None),
        };
        Self { sequence, adapter, run_before: 0 }
    }
}

/// What a sequence says after a step.
#[derive(Debug)]
pub(crate) enum Said {
    /// It goes on.
    More(Event),
    /// It is done.
    Last(Vec<Event>),
}

impl Sequence {
    pub(crate) fn tokens(&self) -> &[u32] {
        &self.tokens
    }

    pub(crate) fn prompt(&self) -> usize {
        self.prompt
    }

    /// The most tokens it can come to; the last isn't run.
    pub(crate) fn most(&self) -> usize {
        self.most
    }

    /// Chooses the next token.
    pub(crate) fn next(&mut self, logits: &[f32], vocabulary: &Vocabulary) -> Result<Said, LogitsError> {
        let token = if self.reshaper.is_idle() {
            self.sampler.next(logits)?
        } else {
            let mut logits = logits.to_vec();
            self.reshaper.reshape(&mut logits);
            self.sampler.next(&logits)?
        };
        if self.stop_tokens.contains(&token) {
            return Ok(self.last(FinishReason::Stop, String::new(), Vec::new(), vocabulary));
        }
        self.tokens.push(token);
        let text = self.reader.push(token, vocabulary);
        let may_not_stop = self.reshaper.may_not_stop();
        self.reshaper.note(token);
        let found = if may_not_stop { Found::Text(self.stop.pass(&text)) } else { self.stop.push(&text) };
        Ok(match found {
            Found::Stop(text) => Said::Last(vec![
                Event::Text { text, tokens: vec![token] },
                Event::Finished { reason: FinishReason::Stop, usage: self.usage() },
            ]),
            Found::Text(text) if self.tokens.len() == self.most => {
                self.last(FinishReason::Length, text, vec![token], vocabulary)
            }
            Found::Text(text) => Said::More(Event::Text { text, tokens: vec![token] }),
        })
    }

    /// The end, with what was held back.
    fn last(&mut self, reason: FinishReason, mut text: String, tokens: Vec<u32>, vocabulary: &Vocabulary) -> Said {
        let left = self.reader.flush(vocabulary);
        let reason = match self.stop.push(&left) {
            Found::Text(more) => {
                text += &more;
                text += &self.stop.flush();
                reason
            }
            Found::Stop(more) => {
                text += &more;
                FinishReason::Stop
            }
        };
        let finished = Event::Finished { reason, usage: self.usage() };
        if text.is_empty() && tokens.is_empty() {
            return Said::Last(vec![finished]);
        }
        Said::Last(vec![Event::Text { text, tokens }, finished])
    }

    fn usage(&self) -> Usage {
        // A context is counted in u32.
        let count = |tokens: usize| tokens as u32;
        Usage { prompt_tokens: count(self.prompt), completion_tokens: count(self.tokens.len() - self.prompt) }
    }
}
