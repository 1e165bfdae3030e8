//! The engine without threads or clocks: requests go in, steps are taken, events come out, and the same calls give the same events.

use std::collections::{BTreeMap, BTreeSet};
use std::error::Error;
use std::sync::Arc;
use std::time::Instant;

use tracing::trace_span;

use crate::cache::BlockPool;
use crate::composition::AdapterChoice;
use crate::decoder::{BlockSharing, Decoder, LogitRows, SequenceId, StepSegment};
use crate::limits::{Accepted, RequestLimits};
use crate::metrics::{AdapterRequests, Metrics};
use crate::options::{Options, OptionsError};
use crate::phases::{SAMPLING, STEP};
use crate::request::{Event, Request, RequestError};
use crate::residency::{LoadOrder, Loaded, Residency};
use crate::schedule::{Piece, plan};
use crate::sequence::{Adapted, Running, Said, Waiting, WaitingAdapters};
use crate::text::Vocabulary;

mod admission;

/// A request that was accepted; they are numbered as they come.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord, Hash)]
pub struct RequestId(u64);

impl RequestId {
    /// The name that the decoder hears.
    pub fn sequence(self) -> SequenceId {
        SequenceId(self.0)
    }
}

/// Continuous batching, one [`Self::step`] at a time.
#[derive(Debug)]
pub struct Core<D: Decoder> {
    decoder: D,
    vocabulary: Arc<Vocabulary>,
    options: Options,
    limits: RequestLimits,
    /// In order of arrival, the pre-empted ones among them.
    waiting: BTreeMap<RequestId, Waiting>,
    running: BTreeMap<RequestId, Running>,
    cache: BlockPool,
    /// Whether sequences have keys and values in common.
    shares: bool,
    residency: Residency<D::Prepared>,
    next_request: u64,
    stalled: bool,
    /// Counts; sizes are filled in when they are asked for.
    counts: Metrics,
    events: Vec<(RequestId, Event)>,
}

impl<D: Decoder> Core<D> {
    /// An engine with nothing to do.
    ///
    /// # Errors
    /// Options that can't be run with.
    pub fn new(decoder: D, vocabulary: Arc<Vocabulary>, options: Options) -> Result<Self, OptionsError> {
        options.check()?;
        let mut decoder = decoder;
        let divides =
            |sharing: &mut dyn BlockSharing| options.block_tokens.is_multiple_of(sharing.granularity().max(1) as usize);
        let shares = options.share_prefixes && decoder.sharing().is_some_and(divides);
        let limits = decoder.limits();
        Ok(Self {
            limits: RequestLimits::new(limits, &options),
            cache: BlockPool::new(options.cache_tokens, options.block_tokens),
            shares,
            residency: Residency::new(options.adapters.clone()),
            decoder,
            vocabulary,
            options,
            waiting: BTreeMap::new(),
            running: BTreeMap::new(),
            next_request: 0,
            stalled: true,
            counts: Metrics::default(),
            events: Vec::new(),
        })
    }

    /// What requests have to keep to.
    pub fn limits(&self) -> &RequestLimits {
        &self.limits
    }

    /// Takes a request; it runs when there is room for it.
    ///
    /// # Errors
    /// It can't be run, or too many wait.
    pub fn submit(&mut self, request: Request, now: Instant) -> Result<RequestId, RequestError> {
        let accepted = self.limits.check(request)?;
        self.enqueue(accepted, now)
    }

    /// [`Self::submit`] of one that was checked.
    ///
    /// # Errors
    /// Too many wait.
    pub fn enqueue(&mut self, request: Accepted, now: Instant) -> Result<RequestId, RequestError> {
        if self.waiting.len() >= self.options.waiting {
            return Err(RequestError::QueueFull { waiting: self.waiting.len() });
        }
        let id = RequestId(self.next_request);
        self.next_request += 1;
        let waiting = Waiting::new(request, self.limits.context_length(), &self.vocabulary, now);
        if let WaitingAdapters::Named { wanted, .. } = &waiting.adapters {
            // Files are compared with what is resident while the step before its first one runs.
            for wanted in wanted {
                self.residency.standing(&wanted.adapter, now, now);
            }
        }
        self.waiting.insert(id, waiting);
        self.stalled = false;
        Ok(id)
    }

    /// Forgets a request, without an event; nothing where it isn't known, or is at its end.
    pub fn cancel(&mut self, request: RequestId) {
        if self.drop_request(request) {
            self.counts.cancelled += 1;
        }
    }

    /// Fails requests that haven't begun, as an engine does that is about to stop. Those that were pre-empted have.
    pub fn fail_unbegun(&mut self, error: &RequestError) -> Vec<(RequestId, Event)> {
        let unbegun = |waiting: &Waiting| waiting.run_before == 0;
        let requests: Vec<RequestId> =
            self.waiting.iter().filter(|(_, waiting)| unbegun(waiting)).map(|(request, _)| *request).collect();
        for request in requests {
            self.fail(request, error.clone());
        }
        std::mem::take(&mut self.events)
    }

    /// Keeps an adapter from being evicted once it is resident.
    pub fn pin(&mut self, adapter: &str) {
        self.residency.pin(adapter);
    }

    /// The opposite of [`Self::pin`].
    pub fn unpin(&mut self, adapter: &str) {
        self.residency.unpin(adapter);
        self.stalled = false;
    }

    /// What has to be read since this was asked last; each is to be answered by [`Self::loaded`], whenever that may be.
    pub fn take_orders(&mut self) -> Vec<LoadOrder> {
        self.residency.take_orders()
    }

    /// Takes the answer to an order.
    pub fn loaded(&mut self, loaded: Loaded<D::Prepared>) {
        self.residency.loaded(loaded);
        self.remove_adapters();
        self.stalled = false;
    }

    /// Whether a step would do nothing until something is submitted, loaded or unpinned.
    pub fn is_stalled(&self) -> bool {
        self.stalled
    }

    /// Whether no request waits or runs.
    pub fn is_empty(&self) -> bool {
        self.waiting.is_empty() && self.running.is_empty()
    }

    /// A snapshot, but for the time that a step took: there is no clock here.
    pub fn metrics(&self) -> Metrics {
        Metrics {
            waiting: self.waiting.len(),
            running: self.running.len(),
            cache_blocks_used: self.cache.used(),
            cache_blocks_kept: self.cache.kept(),
            cache_blocks_total: self.cache.total(),
            cache_block_tokens: self.cache.block_tokens(),
            adapters: self.residency.metrics(),
            ..self.counts
        }
    }

    /// Which adapters requests have.
    pub fn adapter_requests(&self) -> AdapterRequests {
        let resident =
            |adapted: &Adapted| -> Vec<_> { adapted.ids.iter().filter_map(|id| self.residency.name(*id)).collect() };
        let running = self.running.values().flat_map(|running| resident(&running.adapters));
        let waiting = self.waiting.values().flat_map(|waiting| match &waiting.adapters {
            WaitingAdapters::Named { wanted, .. } => wanted.iter().map(|wanted| &wanted.adapter).collect(),
            WaitingAdapters::Chosen(adapted) => resident(adapted),
        });
        let once = |adapters: BTreeSet<&AdapterChoice>| adapters.into_iter().map(ToString::to_string).collect();
        let (running, waiting) = (once(running.collect()), once(waiting.collect()));
        AdapterRequests { running, waiting, resident: self.options.adapters.resident }
    }

    /// Lets in whom there is room for, and runs one batch. The events of a request are in order, and after its
    /// [`Event::Finished`] or [`Event::Failed`] there are none.
    pub fn step(&mut self, now: Instant) -> Vec<(RequestId, Event)> {
        let admitted = self.admit(now);
        let schedule =
            plan(&mut self.running, &mut self.cache, self.options.chunk_tokens, self.options.tokens_per_step);
        self.forget_blocks();
        for (request, preempted) in schedule.preempted {
            self.preempt(request, preempted);
        }
        if !schedule.pieces.is_empty() {
            self.run(&schedule.pieces);
        }
        self.stalled = self.running.is_empty() && !admitted && self.events.is_empty();
        std::mem::take(&mut self.events)
    }

    fn preempt(&mut self, request: RequestId, preempted: Running) {
        self.counts.preemptions += 1;
        self.decoder.release(request.sequence());
        let Running { sequence, adapters, run_before, .. } = preempted;
        self.waiting.insert(request, Waiting { sequence, adapters: WaitingAdapters::Chosen(adapters), run_before });
    }

    /// Runs one batch and says what it gave.
    fn run(&mut self, pieces: &[Piece]) {
        let segments: Vec<StepSegment<'_>> = pieces.iter().filter_map(|piece| segment(&self.running, piece)).collect();
        let rows_of = |segment: &StepSegment<'_>| {
            let width = self.decoder.vocabulary(segment.adapter) as usize;
            std::iter::repeat_n(width, segment.logits.of(segment.tokens.len()))
        };
        let widths: Vec<usize> = segments.iter().flat_map(rows_of).collect();
        let row_counts: Vec<usize> = segments.iter().map(|segment| segment.logits.of(segment.tokens.len())).collect();
        let logits = trace_span!(STEP).in_scope(|| self.decoder.step(&segments));
        self.counts.steps += 1;
        let failure = match &logits {
            Err(error) => Some(chain(error)),
            Ok(logits) if logits.len() != widths.iter().sum::<usize>() => {
                Some(format!("it gave {} logits for rows of {widths:?}", logits.len()))
            }
            Ok(_) => None,
        };
        if let Some(failure) = failure {
            for piece in pieces {
                // What the decoder holds of it is nothing that another could begin with.
                if let Some(running) = self.running.get_mut(&piece.request) {
                    running.computed = 0;
                }
                self.fail(piece.request, RequestError::Model(failure.clone()));
            }
            return;
        }
        let _sampling = trace_span!(SAMPLING).entered();
        let logits = logits.unwrap_or_default();
        let mut rest = &logits[..];
        let mut rows = widths.into_iter().map(|width| rest.split_off(..width).unwrap_or_default());
        for (piece, count) in pieces.iter().zip(row_counts) {
            let rows: Vec<&[f32]> = rows.by_ref().take(count).collect();
            self.advance(piece, &rows);
        }
    }

    /// Moves a sequence on by what was run of it, and the logits that were wanted of it.
    fn advance(&mut self, piece: &Piece, rows: &[&[f32]]) {
        let Some(running) = self.running.get_mut(&piece.request) else { return };
        let prompt = running.sequence.prompt();
        let again = piece.range.end.min(running.run_before).saturating_sub(piece.range.start);
        let first_time_from = piece.range.start.max(running.run_before);
        self.counts.recomputed_tokens += again as u64;
        self.counts.prompt_tokens += piece.range.end.min(prompt).saturating_sub(first_time_from) as u64;
        running.computed = piece.range.end;
        running.run_before = running.run_before.max(piece.range.end);
        if self.shares {
            share(&mut self.decoder, &mut self.cache, piece.request, running);
        }
        match running.sequence.score_prompt(piece.range.start, rows) {
            Ok(scores) => self.events.extend(scores.map(|event| (piece.request, event))),
            Err(error) => return self.fail(piece.request, RequestError::Model(error.to_string())),
        }
        if running.computed < running.sequence.tokens().len() {
            return;
        }
        if let Some(end) = running.sequence.nothing_to_say() {
            self.counts.finished += 1;
            self.drop_request(piece.request);
            self.events.push((piece.request, end));
            return;
        }
        let Some(row) = rows.last() else { return };
        self.counts.generated_tokens += 1;
        match running.sequence.next(row, &self.vocabulary) {
            Ok(Said::More(event)) => self.events.push((piece.request, event)),
            Ok(Said::Last(events)) => {
                self.counts.finished += 1;
                self.drop_request(piece.request);
                self.events.extend(events.into_iter().map(|event| (piece.request, event)));
            }
            Err(silence) => self.fail(piece.request, silence.into()),
        }
    }

    fn fail(&mut self, request: RequestId, error: RequestError) {
        if self.drop_request(request) {
            self.counts.failed += 1;
            self.events.push((request, Event::Failed(error)));
        }
    }

    /// Gives back all that a request holds. Whether there was one.
    fn drop_request(&mut self, request: RequestId) -> bool {
        let adapters = if let Some(waiting) = self.waiting.remove(&request) {
            match waiting.adapters {
                WaitingAdapters::Chosen(adapted) => adapted.ids,
                WaitingAdapters::Named { .. } => Vec::new(),
            }
        } else if let Some(mut running) = self.running.remove(&request) {
            if self.shares {
                let rows = running.rows(0..running.computed);
                if let Some(filled) = self.cache.keep_rest(&mut running.blocks, &rows)
                    && let Some(sharing) = self.decoder.sharing()
                {
                    let start = filled.index * self.options.block_tokens;
                    sharing.share(request.sequence(), start as u32..running.computed as u32, filled.block);
                }
            }
            self.decoder.release(request.sequence());
            self.cache.give_back(running.blocks);
            self.forget_blocks();
            running.adapters.ids
        } else {
            return false;
        };
        for adapter in adapters {
            self.residency.release(adapter);
        }
        self.remove_adapters();
        self.stalled = false;
        true
    }

    fn forget_blocks(&mut self) {
        let forgotten = self.cache.take_forgotten();
        if let Some(sharing) = self.decoder.sharing() {
            forgotten.into_iter().for_each(|block| sharing.forget(block));
        }
    }

    fn remove_adapters(&mut self) {
        for adapter in self.residency.take_removed() {
            self.decoder.remove(adapter);
        }
    }
}

/// Shares the blocks that a sequence has filled.
fn share<D: Decoder>(decoder: &mut D, cache: &mut BlockPool, request: RequestId, running: &mut Running) {
    let Some(sharing) = decoder.sharing() else { return };
    let mut blocks = std::mem::take(&mut running.blocks);
    while let Some(filled) = cache.fill(&mut blocks, running.computed, |positions| running.rows(positions)) {
        let start = (filled.index * cache.block_tokens()) as u32;
        sharing.share(request.sequence(), start..start + cache.block_tokens() as u32, filled.block);
    }
    for forgotten in cache.take_forgotten() {
        sharing.forget(forgotten);
    }
    running.blocks = blocks;
}

fn segment<'a>(running: &'a BTreeMap<RequestId, Running>, piece: &Piece) -> Option<StepSegment<'a>> {
    let sequence = running.get(&piece.request)?;
    let tokens = sequence.sequence.tokens();
    let prompt_tokens = sequence.sequence.prompt().saturating_sub(piece.range.start).min(piece.range.len());
    // A context is counted in u32.
    Some(StepSegment {
        sequence: piece.request.sequence(),
        adapter: sequence.adapters.at(piece.range.start),
        first_position: piece.range.start as u32,
        tokens: &tokens[piece.range.clone()],
        prompt_tokens: prompt_tokens as u32,
        logits: match (sequence.sequence.scores_prompt(), piece.range.end == tokens.len()) {
            (true, _) => LogitRows::All,
            (false, true) => LogitRows::Last,
            (false, false) => LogitRows::None,
        },
    })
}

/// An error with all that caused it.
fn chain(error: &dyn Error) -> String {
    let mut text = error.to_string();
    let mut cause = error.source();
    while let Some(error) = cause {
        text += &format!(": {error}");
        cause = error.source();
    }
    text
}
