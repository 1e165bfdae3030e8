//! Who begins: in order of arrival, as cache, batch and adapters allow.
//!
//! A request that waits for its adapter is passed by others, but nothing that it needs is taken from the older by the younger:
//! one that finds no blocks is passed by none, and while a place on the device is waited for, none enters that would keep another
//! adapter in use, or evicts one that an older request is about to use.

use std::time::Instant;

use super::{Core, RequestId};
use crate::decoder::{AdapterFailure, AdapterId, Decoder, PlaceError};
use crate::limits::token_fault;
use crate::prefix::Found as Prefix;
use crate::request::RequestError;
use crate::residency::{Room, Standing};
use crate::sequence::{Adapted, Running, Waiting, WaitingAdapter};

/// One pass over those that wait.
struct Pass {
    now: Instant,
    /// Something has changed by it.
    changed: bool,
    /// No one was turned back for want of a block or a sequence.
    has_room: bool,
    /// Bytes of adapters that may still be placed; `None` before the first, which may be as large as it is.
    placeable: Option<u64>,
    /// Someone waits for another's adapter to leave.
    place_is_waited_for: bool,
    /// Adapters that those who came before are about to use.
    protected: Vec<AdapterId>,
}

/// What a waiting request may do.
enum Turn {
    /// `begins`: it takes the adapter now, having found it there or not. Otherwise it has all it needs of adapters.
    Enter {
        adapter: Option<AdapterId>,
        begins: Option<Found>,
    },
    Wait,
    Fail(AdapterFailure),
}

/// How a request came to its adapter.
#[derive(Clone, Copy)]
enum Found {
    Resident,
    Loaded,
}

impl<D: Decoder> Core<D> {
    /// Lets in who can begin. Whether anything changed.
    pub(super) fn admit(&mut self, now: Instant) -> bool {
        let mut pass = Pass {
            now,
            changed: false,
            has_room: true,
            placeable: None,
            place_is_waited_for: false,
            protected: Vec::new(),
        };
        let requests: Vec<RequestId> = self.waiting.keys().copied().collect();
        for request in requests {
            let turn = self.turn(request, &mut pass);
            if let Turn::Enter { adapter, begins: Some(_) } = turn
                && let Some(fault) = self.unknown_token(request, adapter)
            {
                self.fail(request, RequestError::Invalid(fault));
                continue;
            }
            match turn {
                Turn::Enter { begins: Some(_), .. } if pass.place_is_waited_for => {}
                Turn::Enter { adapter, begins } if pass.has_room => {
                    pass.has_room = self.enter(request, adapter, begins);
                    pass.changed |= pass.has_room;
                }
                Turn::Enter { .. } | Turn::Wait => {}
                Turn::Fail(failure) => self.fail(request, failure.into()),
            }
        }
        self.residency.drop_unwanted() || pass.changed
    }

    fn turn(&mut self, request: RequestId, pass: &mut Pass) -> Turn {
        let Some(waiting) = self.waiting.get_mut(&request) else { return Turn::Wait };
        let (name, arrived, missed) = match &mut waiting.adapter {
            WaitingAdapter::Chosen(adapter) => return Turn::Enter { adapter: *adapter, begins: None },
            WaitingAdapter::Named { name, arrived, missed } => (name, *arrived, missed),
        };
        match self.residency.standing(name, arrived, pass.now) {
            Standing::Ready(id) => {
                pass.protected.push(id);
                let found = if *missed { Found::Loaded } else { Found::Resident };
                Turn::Enter { adapter: Some(id), begins: Some(found) }
            }
            Standing::Checking(id) => {
                pass.protected.push(id);
                Turn::Wait
            }
            Standing::Failed(failure) => Turn::Fail(failure),
            Standing::Loading => {
                *missed = true;
                Turn::Wait
            }
            Standing::Prepared { bytes } => {
                *missed = true;
                let all = self.options.adapters.bytes_per_step;
                if pass.place_is_waited_for || pass.placeable.is_some_and(|left| bytes > left) {
                    return Turn::Wait;
                }
                pass.placeable = Some(pass.placeable.unwrap_or(all).saturating_sub(bytes));
                let name = name.clone();
                self.place(&name, pass)
            }
        }
    }

    /// Places an adapter that is prepared, if there is room.
    fn place(&mut self, name: &str, pass: &mut Pass) -> Turn {
        match self.residency.make_room(name, &pass.protected) {
            Room::Now => {}
            Room::Later => {
                pass.place_is_waited_for = true;
                return Turn::Wait;
            }
            Room::Never(failure) => {
                self.residency.refuse(name, failure.clone());
                self.remove_adapters();
                return Turn::Fail(failure);
            }
        }
        self.remove_adapters();
        pass.changed = true;
        let Some((placement, prepared)) = self.residency.begin(name) else { return Turn::Wait };
        let turn = match self.decoder.place(placement.id, prepared) {
            Ok(()) => {
                let id = self.residency.placed(placement);
                pass.protected.push(id);
                Turn::Enter { adapter: Some(id), begins: Some(Found::Loaded) }
            }
            Err(PlaceError::Full(prepared)) => {
                self.residency.full(placement, prepared);
                pass.place_is_waited_for = true;
                Turn::Wait
            }
            Err(PlaceError::Unfit(failure)) => {
                self.residency.unfit(placement, failure.clone());
                Turn::Fail(failure)
            }
        };
        self.remove_adapters();
        turn
    }

    /// What is wrong with a prompt for an adapter whose vocabulary is known only now that it is resident.
    fn unknown_token(&self, request: RequestId, adapter: Option<AdapterId>) -> Option<String> {
        let tokens = self.waiting.get(&request)?.sequence.tokens();
        // Those before an activated adapter are the base model's.
        let from = self.adapted(adapter, tokens).map_or(0, |adapter| adapter.from.min(tokens.len()));
        token_fault(&tokens[..from], self.decoder.vocabulary(None))
            .or_else(|| token_fault(tokens, self.decoder.vocabulary(adapter)))
    }

    /// An adapter for a sequence with this prompt.
    fn adapted(&self, adapter: Option<AdapterId>, prompt: &[u32]) -> Option<Adapted> {
        let id = adapter?;
        Some(Adapted::new(id, self.residency.facts(id)?, prompt))
    }

    /// Moves a request among those that run, if there is room.
    fn enter(&mut self, request: RequestId, adapter: Option<AdapterId>, begins: Option<Found>) -> bool {
        let Some(waiting) = self.waiting.get(&request) else { return true };
        if self.running.len() >= self.options.sequences {
            return false;
        }
        // One more than it has, or it might have to make room with its first word.
        let said = waiting.sequence.tokens();
        let tokens = (said.len() + 1).min(waiting.sequence.most());
        let adapted = self.adapted(adapter, &said[..waiting.sequence.prompt()]);
        // The last token is run whatever is there, and so is a prompt whose logits are asked for.
        let prefix = match said.split_last() {
            Some((_, before)) if self.shares && !waiting.sequence.scores_prompt() => {
                self.cache.find(&Adapted::rows(adapted.as_ref(), 0, before))
            }
            _ => Prefix::default(),
        };
        let taken = self.cache.take(prefix, tokens);
        self.forget_blocks();
        let Some((blocks, prefix)) = taken else { return false };
        let Some(Waiting { sequence, run_before, .. }) = self.waiting.remove(&request) else { return true };
        if let (Some(id), Some(found)) = (adapter, begins) {
            self.residency.acquire(id, matches!(found, Found::Resident));
        }
        let computed = self.resume(request, prefix);
        let prompt = sequence.prompt();
        self.counts.prompt_tokens += computed.min(prompt).saturating_sub(run_before) as u64;
        let run_before = run_before.max(computed);
        self.running.insert(request, Running { sequence, adapter: adapted, computed, run_before, blocks });
        true
    }

    /// Begins a sequence with what is there of it. How many tokens that is.
    fn resume(&mut self, request: RequestId, prefix: Prefix) -> usize {
        let Prefix { mut blocks, rest } = prefix;
        let whole = blocks.len() * self.options.block_tokens;
        let tokens = whole + rest.map_or(0, |(_, count)| count);
        blocks.extend(rest.map(|(block, _)| block));
        if tokens > 0
            && let Some(sharing) = self.decoder.sharing()
        {
            sharing.resume(request.sequence(), &blocks, tokens as u32);
            self.counts.shared_tokens += tokens as u64;
        }
        tokens
    }
}
