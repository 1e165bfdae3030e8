//! A core with its decoder and disk, driven a step at a time.

use std::collections::BTreeMap;
use std::sync::Arc;
use std::time::{Duration, Instant};

use flora_engine::{
    AdapterChoice, Core, Event, FinishReason, LoadOrder, Options, Request, RequestError, RequestId, ScoredToken, Usage,
};

use super::decoder::{FakeDecoder, INVOKED};
use super::disk::Disk;
use super::vocabulary;

/// All that a client heard.
#[derive(Clone, Debug, Default, PartialEq)]
pub(crate) struct Heard {
    pub(crate) text: String,
    pub(crate) tokens: Vec<u32>,
    pub(crate) prompt: Vec<ScoredToken>,
    pub(crate) scored: Vec<ScoredToken>,
    pub(crate) end: Option<End>,
}

#[derive(Clone, Debug, PartialEq)]
pub(crate) enum End {
    Finished(FinishReason, Usage),
    Failed(RequestError),
}

impl Heard {
    pub(crate) fn take(&mut self, event: Event) {
        assert_eq!(self.end, None, "an event after the end: {event:?}");
        match event {
            Event::Prompt(scored) => self.prompt.extend(scored),
            Event::Text { text, tokens, scored } => {
                self.scored.extend(scored);
                self.text += &text;
                self.tokens.extend(tokens);
            }
            Event::Finished { reason, usage } => self.end = Some(End::Finished(reason, usage)),
            Event::Failed(error) => self.end = Some(End::Failed(error)),
        }
    }
}

/// See the module. A step takes a millisecond.
pub(crate) struct Drive {
    pub(crate) core: Core<FakeDecoder>,
    pub(crate) decoder: FakeDecoder,
    pub(crate) disk: Disk,
    pub(crate) heard: BTreeMap<RequestId, Heard>,
    pub(crate) now: Instant,
    /// Orders that weren't carried out.
    pub(crate) orders: Vec<LoadOrder>,
}

impl Drive {
    pub(crate) fn new(options: Options, disk: Disk) -> Self {
        let decoder = FakeDecoder::new(&options);
        let core = Core::new(decoder.clone(), Arc::new(vocabulary()), options).expect("options that can be run with");
        Self { core, decoder, disk, heard: BTreeMap::new(), now: Instant::now(), orders: Vec::new() }
    }

    pub(crate) fn submit(&mut self, request: Request) -> RequestId {
        let runs = request.adapters.runs().count();
        let is_invoked = request.adapters.adapters().any(|adapter| *adapter == AdapterChoice::from(INVOKED));
        let id = self.core.submit(request, self.now).expect("a request that can be run");
        if runs > 1 || is_invoked {
            self.decoder.state().varying.insert(id.sequence());
        }
        self.heard.insert(id, Heard::default());
        id
    }

    /// One step, without loading.
    pub(crate) fn step(&mut self) {
        let before = (self.core.is_stalled(), self.core.metrics(), self.decoder.state().places.len());
        self.now += Duration::from_millis(1);
        let events = self.core.step(self.now);
        if before.0 {
            let after = (true, self.core.metrics(), self.decoder.state().places.len());
            assert_eq!((before, events.as_slice()), (after, &[][..]), "a stalled core did something");
        } else {
            let placed = &self.decoder.state().places[before.2..];
            let most = self.decoder.options.adapters.bytes_per_step;
            assert!(placed.len() < 2 || placed.iter().sum::<u64>() <= most, "{placed:?} was placed in a step");
        }
        for (request, event) in events {
            self.heard.get_mut(&request).expect("a request that was submitted").take(event);
        }
        self.orders.extend(self.core.take_orders());
    }

    /// Carries out all orders.
    pub(crate) fn load(&mut self) {
        for order in std::mem::take(&mut self.orders) {
            let loaded = self.disk.load(order);
            self.core.loaded(loaded);
        }
    }

    /// Steps and loads until nothing is left to do.
    pub(crate) fn finish(&mut self) {
        for _ in 0..10_000 {
            if self.core.is_empty() {
                return;
            }
            self.step();
            self.load();
        }
        panic!("requests are left: {:?}", self.core.metrics());
    }

    /// What a request heard by its end.
    pub(crate) fn end(&self, request: RequestId) -> &End {
        self.heard[&request].end.as_ref().expect("a request that has ended")
    }

    /// Whether nothing is held by anyone.
    pub(crate) fn check_nothing_is_held(&self) {
        let (metrics, state) = (self.core.metrics(), self.decoder.state());
        assert!(state.sequences.is_empty(), "{:?}", state.sequences);
        assert_eq!((metrics.waiting, metrics.running, metrics.cache_blocks_used), (0, 0, 0));
        assert_eq!(metrics.cache_blocks_kept, state.shared_blocks());
        assert_eq!(metrics.adapters.resident, state.adapters.len());
        let bytes: u64 = state.adapters.values().map(|adapter| adapter.bytes).sum();
        assert_eq!(metrics.adapters.resident_bytes, bytes);
        let mut names: Vec<&str> = state.adapters.values().map(|adapter| adapter.name.as_str()).collect();
        let residents = names.len();
        names.sort_unstable();
        names.dedup();
        assert_eq!(names.len(), residents, "an old version stayed: {:?}", state.adapters);
    }
}

/// What a request says alone in an engine, with these adapters.
pub(crate) fn alone(request: Request, chunk_tokens: usize, disk: Disk) -> Heard {
    let options = Options { chunk_tokens, sequences: 1, share_prefixes: false, ..Options::default() };
    let mut drive = Drive::new(options, disk);
    let id = drive.submit(request);
    drive.finish();
    drive.check_nothing_is_held();
    drive.heard.remove(&id).expect("the request")
}
