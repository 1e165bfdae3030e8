//! A request between its first and its last word: what was said, and what it is still to be.

use std::borrow::Cow;
use std::time::Instant;

use crate::cache::Blocks;
use crate::composition::AdapterChoice;
use crate::decoder::{AdapterContent, AdapterFacts, AdapterId};
use crate::grammar::Position;
use crate::limits::Accepted;
use crate::prefix::Row;
use crate::request::{Event, FinishReason, LogProbabilities, Request, RequestError, ScoredToken, Usage};
use crate::rules::Reshaper;
use crate::sample::{LogitsError, Sampler};
use crate::score::score;
use crate::spans::Spans;
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
    grammar: Option<Position>,
    reshaper: Reshaper,
    sampler: Sampler,
    reader: Reader,
    stop: StopStrings,
    log_probabilities: LogProbabilities,
    /// Tokens of the prompt that were scored; the first needs no score.
    scored: usize,
}

/// A sequence that waits to run, for the first time or again.
#[derive(Debug)]
pub(crate) struct Waiting {
    pub(crate) sequence: Sequence,
    pub(crate) adapters: WaitingAdapters,
    /// How many of its tokens have been run before.
    pub(crate) run_before: usize,
}

/// What a waiting sequence has of its adapters.
#[derive(Debug)]
pub(crate) enum WaitingAdapters {
    /// Whatever versions are the disk's when it begins.
    Named {
        wanted: Vec<Wanted>,
        /// What acts where, as positions in `wanted`.
        spans: Spans<usize>,
        arrived: Instant,
    },
    /// It was pre-empted and keeps what it began with, or needs none.
    Chosen(Adapted),
}

/// An adapter that a sequence waits for.
#[derive(Clone, Debug)]
pub(crate) struct Wanted {
    pub(crate) adapter: AdapterChoice,
    /// It had to be waited for.
    pub(crate) missed: bool,
}

/// A sequence that runs.
#[derive(Debug)]
pub(crate) struct Running {
    pub(crate) sequence: Sequence,
    pub(crate) adapters: Adapted,
    /// How many of its tokens the decoder holds.
    pub(crate) computed: usize,
    /// The most of them that were ever run.
    pub(crate) run_before: usize,
    pub(crate) blocks: Blocks,
}

/// The adapters of a sequence, all of them resident as long as it runs.
#[derive(Clone, Debug, Default)]
pub(crate) struct Adapted {
    /// Each once.
    pub(crate) ids: Vec<AdapterId>,
    acting: Spans<Acting>,
    /// Its one adapter is gated: keys and values of the base model are held beside those that it gives.
    gated: bool,
}

/// An adapter and what it holds.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
struct Acting {
    id: AdapterId,
    content: AdapterContent,
}

impl Adapted {
    /// The adapters of a sequence with this prompt, and where each acts, as positions in `adapters`. An activated one acts from the last
    /// occurrence of its invocation in its span of the prompt on, as PEFT has it, and where there is none not at all.
    pub(crate) fn new(adapters: &[(AdapterId, &AdapterFacts)], spans: &Spans<usize>, prompt: &[u32]) -> Self {
        let mut runs = Vec::new();
        for (start, own) in spans.runs() {
            let Some((id, facts)) = own.and_then(|own| adapters.get(*own)) else {
                runs.push((start, None));
                continue;
            };
            let end = spans.next_change(start).map_or(prompt.len(), |end| end.min(prompt.len()));
            let acting = Some(Acting { id: *id, content: facts.content });
            match facts.invocation.as_deref() {
                None => runs.push((start, acting)),
                Some(invocation) => {
                    runs.push((start, None));
                    let own = prompt.get(start..end).unwrap_or_default();
                    // Nothing is in no place.
                    let invoked = (!invocation.is_empty())
                        .then(|| own.windows(invocation.len()).rposition(|tokens| tokens == invocation));
                    runs.extend(invoked.flatten().map(|at| (start + at, acting)));
                }
            }
        }
        let ids = adapters.iter().map(|(id, _)| *id).collect();
        let gated = adapters.iter().any(|(_, facts)| facts.gated);
        Self { ids, acting: Spans::of_runs(runs), gated }
    }

    /// Blocks of memory that a block of the sequence takes.
    pub(crate) fn block_size(&self) -> usize {
        if self.gated { 2 } else { 1 }
    }

    /// Tokens with what they are computed with, those of a sequence from `first` on.
    pub(crate) fn rows(&self, first: usize, tokens: &[u32]) -> Vec<Row> {
        let row = |(position, token): (usize, &u32)| Row {
            token: *token,
            adapter: self.acting.at(position).map(|acting| acting.content),
        };
        (first..).zip(tokens).map(row).collect()
    }

    /// The adapter that acts on the token at a position.
    pub(crate) fn at(&self, position: usize) -> Option<AdapterId> {
        self.acting.at(position).map(|acting| acting.id)
    }

    /// Where each run starts, and what acts on it.
    pub(crate) fn runs(&self) -> impl Iterator<Item = (usize, Option<AdapterId>)> {
        self.acting.runs().map(|(start, acting)| (start, acting.map(|acting| acting.id)))
    }

    /// Where another begins to act than on the token at a position.
    pub(crate) fn next_change(&self, position: usize) -> Option<usize> {
        self.acting.next_change(position)
    }
}

impl Running {
    /// Its tokens at these positions with what they are computed with.
    pub(crate) fn rows(&self, positions: std::ops::Range<usize>) -> Vec<Row> {
        self.adapters.rows(positions.start, &self.sequence.tokens()[positions])
    }
}

impl Waiting {
    pub(crate) fn new(request: Accepted, context_length: usize, vocabulary: &Vocabulary, arrived: Instant) -> Self {
        let Request { prompt, adapters, sampling, rules, grammar, stop, log_probabilities } = request.into_request();
        let sequence = Sequence {
            prompt: prompt.len(),
            most: prompt.len().saturating_add(stop.max_tokens as usize).min(context_length),
            grammar: grammar.map(|grammar| grammar.begin()),
            sampler: Sampler::new(sampling, &rules),
            reshaper: Reshaper::new(rules, &prompt, &stop.tokens),
            reader: vocabulary.reader(&prompt),
            tokens: prompt,
            stop_tokens: stop.tokens,
            stop: StopStrings::new(stop.strings),
            log_probabilities,
            scored: 1,
        };
        let mut wanted: Vec<Wanted> = Vec::new();
        let spans = adapters.map(|adapter| {
            wanted.iter().position(|known| known.adapter == *adapter).unwrap_or_else(|| {
                wanted.push(Wanted { adapter: adapter.clone(), missed: false });
                wanted.len() - 1
            })
        });
        let adapters = match wanted.is_empty() {
            false => WaitingAdapters::Named { wanted, spans, arrived },
            true => WaitingAdapters::Chosen(Adapted::default()),
        };
        Self { sequence, adapters, run_before: 0 }
    }
}

/// Why a sequence says nothing after a step.
#[derive(Debug)]
pub(crate) enum Silence {
    Logits(LogitsError),
    Grammar(String),
}

impl From<LogitsError> for Silence {
    fn from(error: LogitsError) -> Self {
        Self::Logits(error)
    }
}

impl From<Silence> for RequestError {
    fn from(silence: Silence) -> Self {
        match silence {
            Silence::Logits(error) => Self::Model(error.to_string()),
            Silence::Grammar(reason) => Self::Invalid(reason),
        }
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

    /// Has it end where it comes to so many tokens.
    pub(crate) fn end_at(&mut self, most: usize) {
        self.most = self.most.min(most);
    }

    /// Whether tokens of the prompt are still to be scored: their rows have to be computed then.
    pub(crate) fn scores_prompt(&self) -> bool {
        self.log_probabilities.prompt.is_some() && self.scored < self.prompt
    }

    /// Scores the tokens of the prompt that follow those at `first`, `first` + 1, … by the logits after these. Rows are left over
    /// where nothing of the prompt follows.
    pub(crate) fn score_prompt(&mut self, first: usize, rows: &[&[f32]]) -> Result<Option<Event>, LogitsError> {
        let Some(alternatives) = self.log_probabilities.prompt.filter(|_| self.scores_prompt()) else {
            return Ok(None);
        };
        let scored_rows = (self.scored - 1).saturating_sub(first);
        let mut scores = Vec::new();
        for (token, row) in self.tokens[..self.prompt].iter().skip(first + 1).zip(rows).skip(scored_rows) {
            scores.push(score(row, *token, alternatives)?);
        }
        self.scored += scores.len();
        Ok((!scores.is_empty()).then_some(Event::Prompt(scores)))
    }

    /// What ends a request that is to generate nothing.
    pub(crate) fn nothing_to_say(&self) -> Option<Event> {
        let is_full = self.tokens.len() >= self.most;
        is_full.then(|| Event::Finished { reason: FinishReason::Length, usage: self.usage() })
    }

    /// Chooses the next token.
    pub(crate) fn next(&mut self, logits: &[f32], vocabulary: &Vocabulary) -> Result<Said, Silence> {
        let mut logits = Cow::Borrowed(logits);
        let may_end = match &mut self.grammar {
            None => false,
            Some(grammar) => grammar.mask(logits.to_mut(), &self.stop_tokens).map_err(Silence::Grammar)?,
        };
        let mut reshaped = Cow::Borrowed(&logits[..]);
        if !self.reshaper.is_idle() {
            self.reshaper.reshape(reshaped.to_mut());
        }
        if self.grammar.is_some() && reshaped.iter().all(|logit| *logit == f32::NEG_INFINITY) {
            return match may_end {
                true => Ok(self.last(FinishReason::Stop, String::new(), None, Vec::new(), vocabulary)),
                false => {
                    Err(Silence::Grammar("no token of the model goes on with what the grammar allows next".to_owned()))
                }
            };
        }
        let token = self.sampler.next(&reshaped)?;
        let scored = self.log_probabilities.generated.map(|count| score(&logits, token, count)).transpose()?;
        let scored = scored.into_iter().collect();
        if self.stop_tokens.contains(&token) {
            return Ok(self.last(FinishReason::Stop, String::new(), None, scored, vocabulary));
        }
        self.tokens.push(token);
        let text = self.reader.push(token, vocabulary);
        let may_not_stop = self.reshaper.may_not_stop();
        self.reshaper.note(token);
        let is_over = match &mut self.grammar {
            None => false,
            Some(grammar) => grammar.advance(token).map_err(Silence::Grammar)?,
        };
        let found = if may_not_stop { Found::Text(self.stop.pass(&text)) } else { self.stop.push(&text) };
        Ok(match found {
            Found::Stop(text) => Said::Last(vec![
                Event::Text { text, tokens: vec![token], scored },
                Event::Finished { reason: FinishReason::Stop, usage: self.usage() },
            ]),
            Found::Text(text) if is_over => self.last(FinishReason::Stop, text, Some(token), scored, vocabulary),
            Found::Text(text) if self.tokens.len() == self.most => {
                self.last(FinishReason::Length, text, Some(token), scored, vocabulary)
            }
            Found::Text(text) => Said::More(Event::Text { text, tokens: vec![token], scored }),
        })
    }

    /// The end, with what was held back, after a last token that is passed on or without one.
    fn last(
        &mut self,
        reason: FinishReason,
        mut text: String,
        token: Option<u32>,
        scored: Vec<ScoredToken>,
        vocabulary: &Vocabulary,
    ) -> Said {
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
        if text.is_empty() && token.is_none() && scored.is_empty() {
            return Said::Last(vec![finished]);
        }
        Said::Last(vec![Event::Text { text, tokens: token.into_iter().collect(), scored }, finished])
    }

    fn usage(&self) -> Usage {
        // A context is counted in u32.
        let count = |tokens: usize| tokens as u32;
        Usage { prompt_tokens: count(self.prompt), completion_tokens: count(self.tokens.len() - self.prompt) }
    }
}
