//! Who begins: in order of arrival, as cache, batch and adapters allow.
//!
//! A request that waits for its adapter is passed by others, but nothing that it needs is taken from the older by the younger:
//! one that finds no blocks is passed by none, and while a place on the device is waited for, none enters that would keep another
//! adapter in use, or evicts one that an older request is about to use.

use std::time::Instant;

use super::{Core, RequestId};
use crate::composition::AdapterChoice;
use crate::decoder::{AdapterFailure, AdapterId, Decoder, PlaceError};
use crate::limits::token_fault;
use crate::prefix::Found as Prefix;
use crate::request::RequestError;
use crate::residency::{Room, Standing};
use crate::sequence::{Adapted, Running, Waiting, WaitingAdapters, Wanted};

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
    /// `begins`: it takes its adapters now, having found them there or not. Otherwise it has all it needs of adapters.
    Enter {
        adapted: Adapted,
        begins: Option<Vec<Found>>,
    },
    Wait,
    Fail(AdapterFailure),
}

/// How a request came to an adapter.
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
        self.residency.begin_pass();
        let requests: Vec<RequestId> = self.waiting.keys().copied().collect();
        for request in requests {
            let turn = self.turn(request, &mut pass);
            if let Turn::Enter { adapted, begins: Some(_) } = &turn
                && let Some(fault) = self.unknown_token(request, adapted).or_else(|| self.too_long(request, adapted))
            {
                self.fail(request, RequestError::Invalid(fault));
                continue;
            }
            match turn {
                Turn::Enter { begins: Some(_), .. } if pass.place_is_waited_for => {}
                Turn::Enter { adapted, begins } if pass.has_room => {
                    pass.has_room = self.enter(request, adapted, begins);
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
        let (mut wanted, arrived) = match &mut waiting.adapters {
            WaitingAdapters::Chosen(adapted) => return Turn::Enter { adapted: adapted.clone(), begins: None },
            WaitingAdapters::Named { wanted, arrived, .. } => (std::mem::take(wanted), *arrived),
        };
        let found = self.find(&mut wanted, arrived, pass);
        let Some(waiting) = self.waiting.get_mut(&request) else { return Turn::Wait };
        let WaitingAdapters::Named { wanted: own, spans, .. } = &mut waiting.adapters else { return Turn::Wait };
        *own = wanted;
        let ids = match found {
            Ok(Some(ids)) => ids,
            Ok(None) => return Turn::Wait,
            Err(failure) => return Turn::Fail(failure),
        };
        let facts = ids.iter().map(|id| Some((*id, self.residency.facts(*id)?))).collect::<Option<Vec<_>>>();
        let Some(facts) = facts else { return Turn::Wait };
        if let Some(position) = facts.iter().position(|(_, facts)| facts.gated)
            && spans.runs().any(|(_, own)| own != Some(&position))
        {
            let reason = "a network weighs its parts by all tokens before, so that it has all tokens of a request; name no other beside it"
                .to_owned();
            return Turn::Fail(AdapterFailure::Unusable { name: own[position].adapter.to_string(), reason });
        }
        let prompt = &waiting.sequence.tokens()[..waiting.sequence.prompt()];
        let adapted = Adapted::new(&facts, spans, prompt);
        let begins = own.iter().map(|wanted| if wanted.missed { Found::Loaded } else { Found::Resident });
        Turn::Enter { adapted, begins: Some(begins.collect()) }
    }

    /// The adapters that a request wants, where all of them are resident and of the disk's version by now. Those that are prepared are
    /// placed, if there is room.
    fn find(
        &mut self,
        wanted: &mut [Wanted],
        arrived: Instant,
        pass: &mut Pass,
    ) -> Result<Option<Vec<AdapterId>>, AdapterFailure> {
        let mut ids: Vec<Option<AdapterId>> = vec![None; wanted.len()];
        // What of it is on the device stays there while the rest is placed.
        let mut together = Vec::new();
        let mut prepared = Vec::new();
        let mut failure = None;
        for (index, Wanted { adapter, missed }) in wanted.iter_mut().enumerate() {
            // All are asked for, so that they are read at the same time.
            match self.residency.standing(adapter, arrived, pass.now) {
                Standing::Ready(id) => {
                    together.push(id);
                    ids[index] = Some(id);
                }
                Standing::Checking(id) => together.push(id),
                Standing::Failed(reason) => failure = failure.or(Some(reason)),
                Standing::Loading => *missed = true,
                Standing::Prepared { bytes } => {
                    *missed = true;
                    prepared.push((index, bytes));
                }
            }
        }
        if let Some(failure) = failure {
            return Err(failure);
        }
        if !together.is_empty() {
            // Who is younger can't have the room that is kept for what is here, and may have read all that is read at a time.
            for (Wanted { adapter, .. }, _) in wanted.iter().zip(&ids).filter(|(_, id)| id.is_none()) {
                self.residency.make_way(adapter);
                self.residency.standing(adapter, arrived, pass.now);
            }
        }
        pass.protected.extend(&together);
        for (index, bytes) in prepared {
            let all = self.options.adapters.bytes_per_step;
            if pass.place_is_waited_for || pass.placeable.is_some_and(|left| bytes > left) {
                continue;
            }
            pass.placeable = Some(pass.placeable.unwrap_or(all).saturating_sub(bytes));
            ids[index] = self.place(&wanted[index].adapter, &together, pass)?;
            together.extend(ids[index]);
        }
        Ok(ids.into_iter().collect())
    }

    /// Places an adapter that is prepared, if there is room beside those that the request needs with it.
    fn place(
        &mut self,
        adapter: &AdapterChoice,
        together: &[AdapterId],
        pass: &mut Pass,
    ) -> Result<Option<AdapterId>, AdapterFailure> {
        match self.residency.make_room(adapter, &pass.protected, together) {
            Room::Now => {}
            Room::Later => {
                pass.place_is_waited_for = true;
                return Ok(None);
            }
            Room::Never(failure) => {
                self.residency.refuse(adapter, failure.clone());
                self.remove_adapters();
                return Err(failure);
            }
            // Others may have it by itself.
            Room::NeverTogether(failure) => return Err(failure),
        }
        self.remove_adapters();
        pass.changed = true;
        let Some((placement, prepared)) = self.residency.begin(adapter) else { return Ok(None) };
        let placed = match self.decoder.place(placement.id, prepared) {
            Ok(()) => {
                let id = self.residency.placed(placement);
                pass.protected.push(id);
                Ok(Some(id))
            }
            Err(PlaceError::Full(prepared)) => {
                self.residency.full(placement, prepared);
                pass.place_is_waited_for = true;
                Ok(None)
            }
            Err(PlaceError::Unfit(failure)) => {
                self.residency.unfit(placement, failure.clone());
                Err(failure)
            }
        };
        self.remove_adapters();
        placed
    }

    /// What is wrong with a prompt for adapters whose vocabularies are known only now that they are resident.
    fn unknown_token(&self, request: RequestId, adapted: &Adapted) -> Option<String> {
        let sequence = &self.waiting.get(&request)?.sequence;
        let tokens = sequence.tokens();
        let mut sizes = adapted.runs().map(|(_, adapter)| self.decoder.vocabulary(adapter));
        let first = sizes.next()?;
        // What one says is read by the next.
        if let Some(other) = sizes.find(|size| *size != first) {
            return Some(format!(
                "the adapters of its spans have vocabularies of {first} and {other} tokens; a request's have to be of one size"
            ));
        }
        token_fault(0, tokens, first)
    }

    /// Has a request end where the cache does for adapters that take more of it than others, or says that its prompt is too long for that.
    fn too_long(&mut self, request: RequestId, adapted: &Adapted) -> Option<String> {
        let room = self.cache.block_tokens() * (self.cache.total() / adapted.block_size());
        let sequence = &mut self.waiting.get_mut(&request)?.sequence;
        let prompt = sequence.prompt();
        if sequence.most() <= room {
            return None;
        }
        if prompt < room {
            sequence.end_at(room);
            return None;
        }
        Some(format!(
            "the prompt has {prompt} tokens, and with one to come the cache holds {room} of an adapter whose parts are weighed for each token, \
             beside the base model's keys and values"
        ))
    }

    /// Moves a request among those that run, if there is room.
    fn enter(&mut self, request: RequestId, adapted: Adapted, begins: Option<Vec<Found>>) -> bool {
        let Some(waiting) = self.waiting.get(&request) else { return true };
        if self.running.len() >= self.options.sequences {
            return false;
        }
        // One more than it has, or it might have to make room with its first word.
        let said = waiting.sequence.tokens();
        let tokens = (said.len() + 1).min(waiting.sequence.most());
        // The last token is run whatever is there, and so is a prompt whose logits are asked for.
        let prefix = match said.split_last() {
            Some((_, before)) if self.shares && !waiting.sequence.scores_prompt() => {
                self.cache.find(&adapted.rows(0, before))
            }
            _ => Prefix::default(),
        };
        let taken = self.cache.take(prefix, tokens, adapted.block_size());
        self.forget_blocks();
        let Some((blocks, prefix)) = taken else { return false };
        let Some(Waiting { sequence, run_before, .. }) = self.waiting.remove(&request) else { return true };
        for (id, found) in adapted.ids.iter().zip(begins.into_iter().flatten()) {
            self.residency.acquire(*id, matches!(found, Found::Resident));
        }
        let computed = self.resume(request, prefix);
        let prompt = sequence.prompt();
        self.counts.prompt_tokens += computed.min(prompt).saturating_sub(run_before) as u64;
        let run_before = run_before.max(computed);
        self.running.insert(request, Running { sequence, adapters: adapted, computed, run_before, blocks });
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
