//! The engine on its threads, with a decoder and a disk that wait for the test where that matters.

use std::sync::mpsc::{Receiver, Sender, channel};
use std::sync::{Mutex, PoisonError};
use std::time::Duration;

use flora_engine::{
    AdapterFacts, AdapterFailure, AdapterId, AdapterSource, Decoder, DecoderLimits, Engine, Event, Options, PlaceError,
    Read, RequestError, SequenceId, StepSegment, Stream, Unread,
};

use crate::support::decoder::{FakeAdapter, FakeDecoder, Lost, NextStep};
use crate::support::disk::Disk;
use crate::support::drive::{End, Heard};
use crate::support::{options, request, vocabulary};

/// Longer than any test takes.
const LONG: Duration = Duration::from_secs(600);

/// Takes a step for each permit, and any number once there is no one to give them.
struct Gated {
    decoder: FakeDecoder,
    /// Hears of each step before it waits.
    begun: Sender<()>,
    permits: Receiver<()>,
}

impl Decoder for Gated {
    type Prepared = FakeAdapter;
    type Error = Lost;

    fn limits(&self) -> DecoderLimits {
        self.decoder.limits()
    }

    fn step(&mut self, segments: &[StepSegment<'_>]) -> Result<Vec<f32>, Lost> {
        let _ = self.begun.send(());
        let _ = self.permits.recv();
        self.decoder.step(segments)
    }

    fn release(&mut self, sequence: SequenceId) {
        self.decoder.release(sequence);
    }

    fn place(&mut self, adapter: AdapterId, prepared: FakeAdapter) -> Result<(), PlaceError<FakeAdapter>> {
        self.decoder.place(adapter, prepared)
    }

    fn remove(&mut self, adapter: AdapterId) {
        self.decoder.remove(adapter);
    }
}

/// Reads `slow` when it is let to, and panics at `explosive`.
struct Temperamental {
    disk: Disk,
    permits: Mutex<Receiver<()>>,
}

impl AdapterSource for Temperamental {
    type Prepared = FakeAdapter;

    fn names(&self) -> Vec<String> {
        self.disk.names()
    }

    fn version(&self, name: &str) -> Result<u64, AdapterFailure> {
        self.disk.version(name)
    }

    fn prepare(&self, name: &str) -> Result<Read<FakeAdapter>, Unread> {
        match name {
            "slow" => drop(self.permits.lock().unwrap_or_else(PoisonError::into_inner).recv()),
            "explosive" => panic!("a header of a petabyte"),
            _ => {}
        }
        self.disk.prepare(name)
    }

    fn facts(prepared: &FakeAdapter) -> AdapterFacts {
        Disk::facts(prepared)
    }
}

fn engine(options: Options) -> (Engine, FakeDecoder) {
    let decoder = FakeDecoder::new(&options);
    let engine = Engine::start(decoder.clone(), Disk::with(&["ann", "bob"]), vocabulary(), options);
    (engine.expect("an engine"), decoder)
}

/// An engine that steps when it is let to.
fn gated(options: Options) -> (Engine, FakeDecoder, Gate) {
    let ((permits, permitted), (begin, begun)) = (channel(), channel());
    let decoder = FakeDecoder::new(&options);
    let gated = Gated { decoder: decoder.clone(), begun: begin, permits: permitted };
    let engine = Engine::start(gated, Disk::default(), vocabulary(), options).expect("an engine");
    (engine, decoder, Gate { begun, permits })
}

/// The test's side of a [`Gated`]; dropping it opens it.
struct Gate {
    begun: Receiver<()>,
    permits: Sender<()>,
}

impl Gate {
    fn permit_a_step(&self) {
        self.permits.send(()).expect("the engine");
    }

    fn wait_for_a_step(&self) {
        self.begun.recv().expect("the engine");
    }
}

/// All that comes, to the end.
fn hear(stream: &mut Stream) -> Heard {
    let mut heard = Heard::default();
    while let Some(event) = stream.blocking_recv() {
        heard.take(event);
    }
    heard
}

fn failed(heard: &Heard) -> &RequestError {
    match &heard.end {
        Some(End::Failed(error)) => error,
        other => panic!("{other:?}"),
    }
}

#[test]
fn requests_are_served_and_counted() {
    let (engine, decoder) = engine(options());
    let handle = engine.handle();
    assert_eq!(handle.adapters(), ["ann", "bob"]);
    let mut streams: Vec<Stream> = [None, Some("ann"), Some("bob"), Some("none")]
        .into_iter()
        .map(|adapter| handle.submit(request(&[1, 2], adapter, 5)).expect("a request that can be run"))
        .collect();
    let heard: Vec<Heard> = streams.iter_mut().map(hear).collect();
    assert!(heard[..3].iter().all(|heard| heard.tokens.len() == 5));
    assert_eq!(*failed(&heard[3]), RequestError::Adapter(AdapterFailure::Unknown("none".into())));
    handle.shutdown(LONG);
    engine.join();
    let metrics = handle.metrics();
    assert_eq!((metrics.finished, metrics.failed, metrics.waiting, metrics.running), (3, 1, 0, 0));
    assert_eq!((metrics.adapters.loads, metrics.cache_blocks_used), (2, 0));
    assert!(metrics.last_step > Duration::ZERO);
    assert!(decoder.state().sequences.is_empty());
}

#[test]
fn streams_can_be_awaited() {
    let runtime = tokio::runtime::Builder::new_current_thread().build().expect("a runtime");
    let (engine, _) = engine(options());
    let handle = engine.handle();
    runtime.block_on(async {
        let mut stream = handle.submit(request(&[1], Some("ann"), 3)).expect("a request that can be run");
        let mut heard = Heard::default();
        while let Some(event) = stream.recv().await {
            heard.take(event);
        }
        assert_eq!(heard.tokens.len(), 3);
        assert_eq!(stream.recv().await, None);
        handle.shutdown(LONG);
        handle.stopped().await;
    });
}

#[test]
fn a_dropped_stream_is_a_cancelled_request() {
    let (engine, decoder, gate) = gated(Options { sequences: 1, ..options() });
    let handle = engine.handle();
    let mut running = handle.submit(request(&[1], None, 50)).expect("a request that can be run");
    let waiting = handle.submit(request(&[1], None, 50)).expect("a request that can be run");
    gate.permit_a_step();
    assert!(matches!(running.blocking_recv(), Some(Event::Text { .. })));
    drop((running, waiting));
    let mut last = handle.submit(request(&[1], None, 2)).expect("a request that can be run");
    drop(gate);
    assert_eq!(hear(&mut last).tokens.len(), 2);
    assert_eq!((handle.metrics().cancelled, handle.metrics().finished), (2, 1));
    assert!(decoder.state().steps <= 5, "what nobody listens to isn't run");
}

#[test]
fn a_stream_that_is_read_to_its_end_is_not_cancelled() {
    let (engine, _) = engine(options());
    let handle = engine.handle();
    for _ in 0..3 {
        let mut stream = handle.submit(request(&[1], None, 2)).expect("a request that can be run");
        hear(&mut stream);
    }
    drop(engine);
    assert_eq!((handle.metrics().cancelled, handle.metrics().finished), (0, 3));
}

#[test]
fn a_shutdown_lets_those_that_have_begun_end() {
    let (engine, _, gate) = gated(Options { sequences: 1, ..options() });
    let handle = engine.handle();
    let mut begun = handle.submit(request(&[1], None, 5)).expect("a request that can be run");
    gate.permit_a_step();
    assert!(matches!(begun.blocking_recv(), Some(Event::Text { .. })));
    let mut waiting = handle.submit(request(&[1], None, 5)).expect("a request that can be run");
    assert!(handle.is_healthy());
    handle.shutdown(LONG);
    assert!(!handle.is_healthy());
    assert_eq!(handle.submit(request(&[1], None, 5)).err(), Some(RequestError::ShuttingDown));
    drop(gate);
    assert_eq!(*failed(&hear(&mut waiting)), RequestError::ShuttingDown);
    assert_eq!(hear(&mut begun).tokens.len(), 4, "the one that was heard of, and these");
    engine.join();
    assert_eq!(handle.submit(request(&[1], None, 5)).err(), Some(RequestError::ShuttingDown));
}

#[test]
fn a_shutdown_without_grace_fails_what_is_left() {
    let (engine, _, gate) = gated(options());
    let handle = engine.handle();
    let mut begun = handle.submit(request(&[1], None, 50)).expect("a request that can be run");
    gate.permit_a_step();
    assert!(matches!(begun.blocking_recv(), Some(Event::Text { .. })));
    handle.shutdown(LONG);
    handle.shutdown(Duration::ZERO);
    drop(gate);
    engine.join();
    assert_eq!(*failed(&hear(&mut begun)), RequestError::ShuttingDown);
    assert_eq!((handle.metrics().failed, handle.metrics().running), (1, 0));
}

/// While nothing happens but that an adapter is read, the end of the grace is still kept.
#[test]
fn a_shutdown_does_not_wait_for_what_is_read() {
    let (permits, permitted) = channel();
    let source = Temperamental { disk: Disk::with(&["slow"]), permits: Mutex::new(permitted) };
    let engine = Engine::start(FakeDecoder::new(&options()), source, vocabulary(), options()).expect("an engine");
    let handle = engine.handle();
    let mut stream = handle.submit(request(&[1], Some("slow"), 5)).expect("a request that can be run");
    drop(engine);
    assert_eq!(*failed(&hear(&mut stream)), RequestError::ShuttingDown);
    drop(permits);
}

#[test]
fn a_decoder_that_fails_fails_the_requests_of_the_step() {
    let (engine, decoder) = engine(options());
    decoder.state().next_step = NextStep::Fails;
    let handle = engine.handle();
    let mut first = handle.submit(request(&[1], None, 5)).expect("a request that can be run");
    assert_eq!(*failed(&hear(&mut first)), RequestError::Model("the device is lost".into()));
    let mut second = handle.submit(request(&[1], None, 5)).expect("a request that can be run");
    assert_eq!(hear(&mut second).tokens.len(), 5);
    assert!(handle.is_healthy());
}

#[test]
fn a_decoder_that_panics_leaves_nobody_waiting() {
    let (engine, decoder, gate) = gated(Options { sequences: 1, ..options() });
    decoder.state().next_step = NextStep::Panics;
    let handle = engine.handle();
    let submit = || handle.submit(request(&[1], None, 5)).expect("a request that can be run");
    let running = submit();
    gate.wait_for_a_step();
    // The engine is in a step, and hasn't seen these.
    let mut streams = [running, submit(), submit()];
    drop(gate);
    let error = RequestError::Model("it panicked: the device is on fire".into());
    for stream in &mut streams {
        assert_eq!(*failed(&hear(stream)), error);
    }
    engine.join();
    assert!(!handle.is_healthy());
    assert_eq!(handle.submit(request(&[1], None, 5)).err(), Some(error));
    assert_eq!(handle.metrics().failed, 3);
}

#[test]
fn an_adapter_that_is_long_in_reading_stalls_no_one() {
    let (permits, permitted) = channel();
    let disk = Disk::with(&["ann", "explosive", "slow"]);
    let source = Temperamental { disk, permits: Mutex::new(permitted) };
    let options = Options { adapters: flora_engine::AdapterOptions { loaders: 2, ..Default::default() }, ..options() };
    let engine = Engine::start(FakeDecoder::new(&options), source, vocabulary(), options).expect("an engine");
    let handle = engine.handle();
    let mut slow = handle.submit(request(&[1], Some("slow"), 5)).expect("a request that can be run");
    let mut others = ["explosive", "ann", "explosive"]
        .map(|name| handle.submit(request(&[1], Some(name), 5)).expect("a request that can be run"));
    let heard = others.each_mut().map(hear);
    assert!(failed(&heard[0]).to_string().contains("reading it panicked: a header of a petabyte"));
    assert_eq!(heard[1].tokens.len(), 5);
    permits.send(()).expect("the loader");
    assert_eq!(hear(&mut slow).tokens.len(), 5);
}

#[test]
fn a_full_queue_is_said_at_once() {
    let (engine, _, gate) = gated(Options { sequences: 1, waiting: 2, ..options() });
    let handle = engine.handle();
    let mut running = handle.submit(request(&[1], None, 2)).expect("a request that can be run");
    gate.permit_a_step();
    assert!(matches!(running.blocking_recv(), Some(Event::Text { .. })));
    let mut waiting =
        [(); 2].map(|()| handle.submit(request(&[1], None, 2)).expect("a request that there is room for"));
    assert_eq!(handle.submit(request(&[1], None, 2)).err(), Some(RequestError::QueueFull { waiting: 2 }));
    let invalid = handle.submit(request(&[], None, 2)).err();
    assert!(matches!(invalid, Some(RequestError::Invalid(_))));
    drop(gate);
    for stream in &mut waiting {
        assert_eq!(hear(stream).tokens.len(), 2);
    }
    assert!(handle.submit(request(&[1], None, 2)).is_ok());
}

/// Many clients at once, some of which leave: each of the others hears its end.
#[test]
fn clients_on_many_threads_are_all_answered() {
    let (engine, decoder) = engine(Options { cache_tokens: 64, ..options() });
    let handle = engine.handle();
    std::thread::scope(|scope| {
        for client in 0..8u32 {
            let handle = handle.clone();
            scope.spawn(move || {
                for index in 0..20u32 {
                    let adapter = [None, Some("ann"), Some("bob"), Some("none")][(client + index) as usize % 4];
                    let tokens = 1 + (client + index) % 9;
                    let mut stream = handle.submit(request(&[client, index % 8], adapter, tokens)).expect("room");
                    if index % 5 == 4 {
                        continue;
                    }
                    let heard = hear(&mut stream);
                    match adapter {
                        Some("none") => assert!(matches!(failed(&heard), RequestError::Adapter(_))),
                        _ => assert_eq!(heard.tokens.len() as u32, tokens),
                    }
                }
            });
        }
    });
    handle.shutdown(LONG);
    engine.join();
    let metrics = handle.metrics();
    assert_eq!(metrics.finished + metrics.failed + metrics.cancelled, 160);
    assert_eq!((metrics.running, metrics.waiting, metrics.cache_blocks_used), (0, 0, 0));
    assert!(decoder.state().sequences.is_empty());
}
