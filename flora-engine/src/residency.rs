//! Which adapters are on the device, which come and which go: policy alone, of names, versions, sizes and numbers of users.
//! Reading is done elsewhere ([`LoadOrder`], [`Loaded`]), and so is placing.
//!
//! An adapter is absent, being loaded, resident or failed. A resident or failed one may be loaded at the same time: its files
//! are being compared with the version that is known.

use std::collections::{BTreeMap, HashMap, HashSet};
use std::time::Instant;

use crate::composition::AdapterChoice;
use crate::decoder::{AdapterFacts, AdapterFailure, AdapterId};
use crate::metrics::AdapterMetrics;
use crate::options::AdapterOptions;

/// Names that failed are remembered for so many, whatever clients make up.
const REMEMBERED_FAILURES: usize = 1024;

/// Asks for an adapter to be read, off the thread that steps.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct LoadOrder {
    /// Which.
    pub adapter: AdapterChoice,
    /// The version that is resident, or that failed: one of this version need not be read again.
    pub known: Option<u64>,
}

/// What came of a [`LoadOrder`].
#[derive(Debug)]
pub struct Loaded<P> {
    /// Which.
    pub adapter: AdapterChoice,
    /// What came of it.
    pub outcome: LoadOutcome<P>,
}

/// See [`Loaded`].
#[derive(Debug)]
pub enum LoadOutcome<P> {
    /// It is still of the version that was known.
    Unchanged,
    /// It is in host memory.
    Prepared {
        /// Of what was read.
        version: u64,
        /// For the decoder.
        prepared: P,
        /// What is known of it.
        facts: AdapterFacts,
    },
    /// It can't be had.
    Failed {
        /// Of what couldn't be read; `None` where not even that is known.
        version: Option<u64>,
        /// Why.
        failure: AdapterFailure,
    },
}

/// How it stands with the adapter of a request that waits.
#[derive(Debug, PartialEq, Eq)]
pub(crate) enum Standing {
    /// Resident, and of the disk's version.
    Ready(AdapterId),
    /// Resident, and being compared with the disk.
    Checking(AdapterId),
    /// Being read, or will be.
    Loading,
    /// In host memory; has to be placed.
    Prepared {
        /// What it takes on the device.
        bytes: u64,
    },
    /// The request fails.
    Failed(AdapterFailure),
}

/// Whether there is room for an adapter.
#[derive(Debug, PartialEq, Eq)]
pub(crate) enum Room {
    Now,
    /// When adapters in use fall free.
    Later,
    Never(AdapterFailure),
    /// Not beside those that the same request needs.
    NeverTogether(AdapterFailure),
}

/// An adapter on its way to the device: to be told to [`Residency::placed`], [`Residency::full`] or [`Residency::unfit`].
#[derive(Debug)]
#[must_use]
pub(crate) struct Placement {
    pub(crate) id: AdapterId,
    name: AdapterChoice,
    checked: Instant,
    version: u64,
    facts: AdapterFacts,
}

/// What is known of a name when nothing is done about it.
#[derive(Debug)]
enum Settled {
    /// `checked`: it was what the disk had at some moment after this.
    Resident {
        checked: Instant,
        id: AdapterId,
    },
    Failed {
        checked: Instant,
        version: Option<u64>,
        failure: AdapterFailure,
    },
}

/// What is done about a name.
#[derive(Debug)]
enum Work<P> {
    Ordered {
        since: Instant,
    },
    Prepared {
        checked: Instant,
        version: u64,
        facts: AdapterFacts,
        prepared: P,
        /// Someone waits for it.
        wanted: bool,
        /// The device had no room for it when so many had been removed.
        full_at: Option<u64>,
    },
}

#[derive(Debug)]
struct Slot {
    name: AdapterChoice,
    version: u64,
    facts: AdapterFacts,
    /// Sequences that run with it.
    users: usize,
    /// On a clock that counts uses.
    last_used: u64,
    /// No new sequence takes it: there is a newer version, or its files are gone.
    superseded: bool,
}

/// See the module.
#[derive(Debug)]
pub(crate) struct Residency<P> {
    options: AdapterOptions,
    pinned: HashSet<String>,
    settled: HashMap<AdapterChoice, Settled>,
    work: HashMap<AdapterChoice, Work<P>>,
    slots: BTreeMap<AdapterId, Slot>,
    orders: Vec<LoadOrder>,
    removed: Vec<AdapterId>,
    next_id: u32,
    clock: u64,
    /// How many were ever removed.
    removals: u64,
    counts: AdapterMetrics,
}

impl<P> Residency<P> {
    pub(crate) fn new(options: AdapterOptions) -> Self {
        Self {
            pinned: options.pinned.iter().cloned().collect(),
            options,
            settled: HashMap::new(),
            work: HashMap::new(),
            slots: BTreeMap::new(),
            orders: Vec::new(),
            removed: Vec::new(),
            next_id: 0,
            clock: 0,
            removals: 0,
            counts: AdapterMetrics::default(),
        }
    }

    pub(crate) fn pin(&mut self, name: &str) {
        self.pinned.insert(name.into());
    }

    pub(crate) fn unpin(&mut self, name: &str) {
        self.pinned.remove(name);
    }

    /// What has to be read; to be given back to [`Self::loaded`], each once.
    pub(crate) fn take_orders(&mut self) -> Vec<LoadOrder> {
        std::mem::take(&mut self.orders)
    }

    /// What the decoder has to remove, before anything else is placed.
    pub(crate) fn take_removed(&mut self) -> Vec<AdapterId> {
        std::mem::take(&mut self.removed)
    }

    /// How it stands with `name` for a request that came at `arrived`; orders what has to be read for it.
    pub(crate) fn standing(&mut self, name: &AdapterChoice, arrived: Instant, now: Instant) -> Standing {
        // What the disk had after the request came is as new as it can want, whatever is being looked at for others; anything older may
        // have been replaced before.
        let known = match self.settled.get(name) {
            Some(Settled::Resident { checked, id }) if *checked >= arrived => return Standing::Ready(*id),
            Some(Settled::Failed { checked, failure, .. }) if *checked >= arrived => {
                return Standing::Failed(failure.clone());
            }
            Some(Settled::Resident { id, .. }) => self.slots.get(id).map(|slot| slot.version),
            Some(Settled::Failed { version, .. }) => *version,
            None => None,
        };
        let resident = self.resident(name);
        match self.work.get_mut(name) {
            Some(Work::Prepared { wanted, facts, checked, .. }) if *checked >= arrived => {
                *wanted = true;
                return Standing::Prepared { bytes: facts.bytes };
            }
            // What is prepared is placed for those who came before, and compared with the disk then.
            Some(Work::Ordered { .. } | Work::Prepared { .. }) => {
                return resident.map_or(Standing::Loading, Standing::Checking);
            }
            None => {}
        }
        // Comparing is quick, and what is resident shall not wait for those that are being read.
        if resident.is_some() || self.work.len() < self.options.loading {
            self.work.insert(name.clone(), Work::Ordered { since: now });
            self.orders.push(LoadOrder { adapter: name.clone(), known });
        }
        resident.map_or(Standing::Loading, Standing::Checking)
    }

    /// Nothing that is prepared is known to be wanted, until [`Self::standing`] is asked for it.
    pub(crate) fn begin_pass(&mut self) {
        for work in self.work.values_mut() {
            if let Work::Prepared { wanted, .. } = work {
                *wanted = false;
            }
        }
    }

    /// Forgets what is prepared for requests that [`Self::standing`] wasn't asked for yet, as far as `name` can't be read beside it. They
    /// wait for room that is kept for whoever wants `name`, who would wait for them otherwise.
    pub(crate) fn make_way(&mut self, name: &AdapterChoice) {
        while !self.work.contains_key(name) && self.work.len() >= self.options.loading {
            let may_go = |(name, work): (&AdapterChoice, &Work<P>)| {
                matches!(work, Work::Prepared { wanted: false, .. }).then(|| name.clone())
            };
            let Some(last) = self.work.iter().filter_map(may_go).max() else { return };
            self.work.remove(&last);
        }
    }

    /// Forgets what was prepared for requests that are gone: [`Self::standing`] was asked for all that wait since the last call.
    /// Whether there was any: others may be ordered in their stead.
    pub(crate) fn drop_unwanted(&mut self) -> bool {
        let before = self.work.len();
        self.work.retain(|_, work| match work {
            Work::Ordered { .. } => true,
            Work::Prepared { wanted, .. } => std::mem::take(wanted),
        });
        self.work.len() < before
    }

    /// Takes what came of an order. One that wasn't given is ignored.
    pub(crate) fn loaded(&mut self, loaded: Loaded<P>) {
        let Loaded { adapter: name, outcome } = loaded;
        let Some(Work::Ordered { since }) = self.work.get(&name) else {
            return;
        };
        let since = *since;
        self.work.remove(&name);
        match outcome {
            LoadOutcome::Unchanged => match self.settled.get_mut(&name) {
                Some(Settled::Resident { checked, .. } | Settled::Failed { checked, .. }) => *checked = since,
                // It was evicted meanwhile.
                None => {}
            },
            LoadOutcome::Prepared { version, prepared, facts } => {
                self.work.insert(
                    name,
                    Work::Prepared { checked: since, version, facts, prepared, wanted: false, full_at: None },
                );
            }
            LoadOutcome::Failed { version, failure } => self.fail(name, since, version, failure),
        }
    }

    fn fail(&mut self, name: AdapterChoice, checked: Instant, version: Option<u64>, failure: AdapterFailure) {
        self.counts.failures += 1;
        // A name that nobody has is a client's mistake, which its answer says.
        if let AdapterFailure::Unusable { reason, .. } = &failure {
            tracing::warn!(adapter = %name, %reason, "an adapter can't be used");
        }
        self.supersede(&name);
        if self.settled.len() - self.current_residents() >= REMEMBERED_FAILURES {
            self.forget_oldest_failure();
        }
        self.settled.insert(name, Settled::Failed { checked, version, failure });
    }

    fn current_residents(&self) -> usize {
        self.slots.values().filter(|slot| !slot.superseded).count()
    }

    fn forget_oldest_failure(&mut self) {
        let failures = self.settled.iter().filter_map(|(name, settled)| match settled {
            Settled::Failed { checked, .. } => Some((*checked, name)),
            Settled::Resident { .. } => None,
        });
        if let Some(name) = failures.min().map(|(_, name)| name.clone()) {
            self.settled.remove(&name);
        }
    }

    /// Makes room for the adapter `name`, which is prepared. Those that are in use, are pinned or `protected` stay; `together` are those
    /// among these that the same request needs at the same time.
    pub(crate) fn make_room(&mut self, name: &AdapterChoice, protected: &[AdapterId], together: &[AdapterId]) -> Room {
        let Some(Work::Prepared { facts, full_at, .. }) = self.work.get(name) else {
            return Room::Later;
        };
        let (bytes, device_full) = (facts.bytes, *full_at == Some(self.removals));
        let unusable = |reason| AdapterFailure::Unusable { name: name.to_string(), reason };
        if let Some(reason) = self.never_fits(name, bytes, device_full, &[]) {
            return Room::Never(unusable(reason));
        }
        if let Some(reason) = self.never_fits(name, bytes, device_full, together) {
            return Room::NeverTogether(unusable(reason));
        }
        let mut unused: Vec<(u64, AdapterId, u64)> = self
            .slots
            .iter()
            .filter(|(id, slot)| slot.users == 0 && !protected.contains(id) && !self.stays(name, slot))
            .map(|(id, slot)| (slot.last_used, *id, slot.facts.bytes))
            .collect();
        unused.sort_unstable();
        let (mut count, mut total) = (self.slots.len() + 1, self.resident_bytes().saturating_add(bytes));
        let mut evicted = 0;
        while count > self.options.resident || total > self.options.bytes || (device_full && evicted == 0) {
            let Some((_, _, freed)) = unused.get(evicted) else {
                return Room::Later;
            };
            count -= 1;
            total -= freed;
            evicted += 1;
        }
        for (_, id, _) in &unused[..evicted] {
            self.evict(*id);
        }
        Room::Now
    }

    /// Whether an adapter stays whatever comes, while room is made for `name`: the old version of that may go.
    fn stays(&self, name: &AdapterChoice, slot: &Slot) -> bool {
        let is_pinned = matches!(&slot.name, AdapterChoice::Named(name) if self.pinned.contains(name));
        slot.name != *name && !slot.superseded && is_pinned
    }

    /// Why the adapter `name` never fits beside those that stay whatever comes.
    fn never_fits(
        &self,
        name: &AdapterChoice,
        bytes: u64,
        device_full: bool,
        together: &[AdapterId],
    ) -> Option<String> {
        let stays = |id: &AdapterId, slot: &Slot| together.contains(id) || self.stays(name, slot);
        let staying = || self.slots.iter().filter(|(id, slot)| stays(id, slot)).map(|(_, slot)| slot);
        let (which, mend) = match together.is_empty() {
            true => ("pinned ones", "unpin one or allow more"),
            false => ("others of the request, and pinned ones,", "name fewer in one request, or allow more"),
        };
        let (count, taken) = (staying().count(), staying().map(|slot| slot.facts.bytes).sum::<u64>());
        if count >= self.options.resident {
            return Some(format!(
                "{} adapters may be resident, and {count} {which} are; {mend}",
                self.options.resident
            ));
        }
        if bytes > self.options.bytes.saturating_sub(taken) {
            return Some(format!(
                "it takes {bytes} bytes on the device; {} are allowed, and {which} take {taken} of them; allow more \
                 (--adapter-memory)",
                self.options.bytes
            ));
        }
        (device_full && count == self.slots.len()).then(|| {
            format!("it takes {bytes} bytes, and the device has no room for it beside {count} {which}; {mend}")
        })
    }

    fn evict(&mut self, id: AdapterId) {
        if let Some(slot) = self.slots.get(&id)
            && !slot.superseded
        {
            self.settled.remove(&slot.name);
        }
        self.counts.evictions += 1;
        self.remove(id);
    }

    fn remove(&mut self, id: AdapterId) {
        self.slots.remove(&id);
        self.removed.push(id);
        self.removals += 1;
    }

    /// Takes a prepared adapter out, for the decoder. `None` if it isn't prepared.
    pub(crate) fn begin(&mut self, name: &AdapterChoice) -> Option<(Placement, P)> {
        match self.work.remove(name) {
            Some(Work::Prepared { checked, version, facts, prepared, .. }) => {
                while self.slots.contains_key(&AdapterId(self.next_id)) {
                    self.next_id = self.next_id.wrapping_add(1);
                }
                let id = AdapterId(self.next_id);
                self.next_id = self.next_id.wrapping_add(1);
                Some((Placement { id, name: name.clone(), checked, version, facts }, prepared))
            }
            Some(work) => {
                self.work.insert(name.clone(), work);
                None
            }
            None => None,
        }
    }

    /// It is on the device. An older version leaves with its last user.
    pub(crate) fn placed(&mut self, placement: Placement) -> AdapterId {
        let Placement { id, name, checked, version, facts } = placement;
        self.counts.loads += 1;
        self.supersede(&name);
        self.clock += 1;
        let slot = Slot { name: name.clone(), version, facts, users: 0, last_used: self.clock, superseded: false };
        self.slots.insert(id, slot);
        self.settled.insert(name, Settled::Resident { checked, id });
        id
    }

    /// The device had no room; it is tried again once something was removed.
    pub(crate) fn full(&mut self, placement: Placement, prepared: P) {
        let Placement { name, checked, version, facts, .. } = placement;
        let full_at = Some(self.removals);
        self.work.insert(name, Work::Prepared { checked, version, facts, prepared, wanted: true, full_at });
    }

    /// The decoder won't have it.
    pub(crate) fn unfit(&mut self, placement: Placement, failure: AdapterFailure) {
        self.fail(placement.name, placement.checked, Some(placement.version), failure);
    }

    /// Fails one that is prepared and finds no room, ever.
    pub(crate) fn refuse(&mut self, name: &AdapterChoice, failure: AdapterFailure) {
        if let Some((placement, _)) = self.begin(name) {
            // What it doesn't fit beside may change though its files don't, so that it has to be read again.
            self.fail(placement.name, placement.checked, None, failure);
        }
    }

    /// No new sequence takes the version that is resident.
    fn supersede(&mut self, name: &AdapterChoice) {
        if let Some(Settled::Resident { id, .. }) = self.settled.remove(name)
            && let Some(slot) = self.slots.get_mut(&id)
        {
            slot.superseded = true;
            if slot.users == 0 {
                self.remove(id);
            }
        }
    }

    /// What a resident adapter is called.
    pub(crate) fn name(&self, id: AdapterId) -> Option<&AdapterChoice> {
        self.slots.get(&id).map(|slot| &slot.name)
    }

    /// What is known of a resident adapter.
    pub(crate) fn facts(&self, id: AdapterId) -> Option<&AdapterFacts> {
        self.slots.get(&id).map(|slot| &slot.facts)
    }

    /// A sequence begins to use an adapter. `hit`: it never had to wait for it.
    pub(crate) fn acquire(&mut self, id: AdapterId, hit: bool) {
        self.counts.hits += u64::from(hit);
        self.clock += 1;
        if let Some(slot) = self.slots.get_mut(&id) {
            slot.users += 1;
            slot.last_used = self.clock;
        }
    }

    /// A sequence ends that used an adapter.
    pub(crate) fn release(&mut self, id: AdapterId) {
        self.clock += 1;
        if let Some(slot) = self.slots.get_mut(&id) {
            slot.users -= 1;
            slot.last_used = self.clock;
            if slot.users == 0 && slot.superseded {
                self.remove(id);
            }
        }
    }

    pub(crate) fn metrics(&self) -> AdapterMetrics {
        AdapterMetrics {
            resident: self.slots.len(),
            resident_bytes: self.resident_bytes(),
            loading: self.work.len(),
            ..self.counts
        }
    }

    fn resident(&self, name: &AdapterChoice) -> Option<AdapterId> {
        match self.settled.get(name) {
            Some(Settled::Resident { id, .. }) => Some(*id),
            _ => None,
        }
    }

    fn resident_bytes(&self) -> u64 {
        self.slots.values().fold(0, |sum, slot| sum.saturating_add(slot.facts.bytes))
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    /// Clients may make up as many names as they like.
    #[test]
    fn failures_are_remembered_within_bounds() {
        let mut residency = Residency::<()>::new(AdapterOptions::default());
        let now = Instant::now();
        for index in 0..3 * REMEMBERED_FAILURES {
            let name = AdapterChoice::Named(format!("no-{index}"));
            assert_eq!(residency.standing(&name, now, now), Standing::Loading);
            assert_eq!(residency.take_orders(), [LoadOrder { adapter: name.clone(), known: None }]);
            let failure = AdapterFailure::Unknown(name.to_string());
            let outcome = LoadOutcome::Failed { version: None, failure: failure.clone() };
            residency.loaded(Loaded { adapter: name.clone(), outcome });
            assert_eq!(residency.standing(&name, now, now), Standing::Failed(failure));
        }
        assert_eq!(residency.settled.len(), REMEMBERED_FAILURES);
        assert!(residency.work.is_empty());
    }
}
