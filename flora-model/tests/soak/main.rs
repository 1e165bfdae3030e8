//! Two engines on a real decoder, replicas over one folder, under everything at once: random arrivals and cancellations, prompts that
//! begin alike, spans and sums of adapters, adapters that change, break, vanish and come back while they are asked for, caches far too
//! small. Every request ends, nothing leaks, running requests go on.
//!
//! `FLORA_SOAK_SECONDS` says for how long (20 unless set), `FLORA_SOAK_MODEL` on which model (a tiny one unless set; a .gguf file or
//! a folder). Times are printed, and decide nothing.

mod adapters;
mod memory;

use std::collections::BTreeMap;
use std::path::{Path, PathBuf};
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, AtomicU64, Ordering};
use std::thread;
use std::time::{Duration, Instant};

use flora_checkpoint::Model;
use flora_engine::{
    AdapterChoice, AdapterFailure, AdapterOptions, AdapterSpans, Composition, Engine, EngineHandle, Event,
    LogProbabilities, LogitRules, Metrics, Options, Request, RequestError, Sampling, Span, StopAt, Vocabulary,
};
use flora_model::{AdapterDirectory, ServeOptions};

/// Clients at a time: more than both engines take.
const CLIENTS: u64 = 40;
/// Of a cache; what the host can share is a multiple of it.
const BLOCK_TOKENS: usize = 32;
/// Nothing may take longer than this to make any progress at all.
const HANG: Duration = Duration::from_secs(120);

/// What became of requests.
#[derive(Default)]
struct Tally {
    sent: AtomicU64,
    finished: AtomicU64,
    cancelled: AtomicU64,
    unknown_adapters: AtomicU64,
    unusable_adapters: AtomicU64,
    queue_full: AtomicU64,
    tokens: AtomicU64,
}

impl Tally {
    fn ended(&self) -> u64 {
        let counts =
            [&self.finished, &self.cancelled, &self.unknown_adapters, &self.unusable_adapters, &self.queue_full];
        counts.iter().map(|count| count.load(Ordering::SeqCst)).sum()
    }
}

/// An adapter, or none; a sum of two now and then, and some that there are not.
fn adapter(random: &mut fastrand::Rng, names: &[String]) -> Option<AdapterChoice> {
    let mut named = || names[random.usize(0..names.len())].clone();
    let (one, other) = (named(), named());
    match random.u8(0..12) {
        0 | 1 => None,
        2 => {
            let wrong = ["nobody", "../adapter-0", "/etc", "", "adapter-0/../adapter-1"][random.usize(0..5)];
            Some(AdapterChoice::Named(wrong.to_owned()))
        }
        3 if one != other => {
            let parts = [(one, 0.5), (other, -0.25)];
            Some(AdapterChoice::Composed(Composition::new(parts).expect("two adapters with weights")))
        }
        _ => Some(AdapterChoice::Named(one)),
    }
}

/// What some prompts begin with: longer than a block of the cache.
fn prefix(number: u64, vocabulary: u32) -> Vec<u32> {
    let mut random = fastrand::Rng::with_seed(number);
    (0..48).map(|_| random.u32(0..vocabulary)).collect()
}

fn request(random: &mut fastrand::Rng, vocabulary: u32, names: &[String]) -> Request {
    let mut prompt = if random.bool() { prefix(random.u64(0..4), vocabulary) } else { Vec::new() };
    prompt.extend((0..random.usize(1..80 - prompt.len())).map(|_| random.u32(0..vocabulary)));
    let own = adapter(random, names);
    let spans = match random.u8(0..4) {
        0 => {
            let start = random.usize(0..prompt.len());
            let end = random.bool().then(|| start + random.usize(1..30));
            vec![Span { start, end, adapter: adapter(random, names) }]
        }
        _ => Vec::new(),
    };
    let adapters = AdapterSpans::new(own, spans).expect("one span, which holds a token");
    let sampling = match random.bool() {
        true => Sampling::Random { temperature: 0.8, top_p: 0.9, seed: random.u64(..) },
        false => Sampling::Greedy,
    };
    let stop = StopAt { max_tokens: random.u32(1..40), strings: vec!["\u{1}never".to_owned()], tokens: Vec::new() };
    Request {
        prompt,
        adapters,
        sampling,
        rules: LogitRules::default(),
        stop,
        grammar: None,
        log_probabilities: LogProbabilities::default(),
    }
}

/// Sends one request after the other until `stop`.
fn client(number: u64, replicas: &[EngineHandle], vocabulary: u32, names: &[String], tally: &Tally, stop: &AtomicBool) {
    let mut random = fastrand::Rng::with_seed(1000 + number);
    while !stop.load(Ordering::SeqCst) {
        let handle = &replicas[random.usize(0..replicas.len())];
        // Whoever goes away does so after so many events.
        let patience = (random.u8(0..6) == 0).then(|| random.usize(0..10));
        tally.sent.fetch_add(1, Ordering::SeqCst);
        let mut stream = match handle.submit(request(&mut random, vocabulary, names)) {
            Ok(stream) => stream,
            Err(RequestError::QueueFull { .. }) => {
                tally.queue_full.fetch_add(1, Ordering::SeqCst);
                thread::sleep(Duration::from_millis(random.u64(1..50)));
                continue;
            }
            Err(error) => panic!("a request that is right was refused: {error}"),
        };
        let mut heard = 0;
        let count = loop {
            if patience == Some(heard) {
                break &tally.cancelled;
            }
            heard += 1;
            match stream.blocking_recv().expect("a stream says how it ends") {
                Event::Prompt(_) => {}
                Event::Text { tokens, .. } => {
                    tally.tokens.fetch_add(tokens.len() as u64, Ordering::SeqCst);
                }
                Event::Finished { .. } => break &tally.finished,
                Event::Failed(RequestError::Adapter(AdapterFailure::Unknown(_))) => break &tally.unknown_adapters,
                Event::Failed(RequestError::Adapter(AdapterFailure::Unusable { .. })) => {
                    break &tally.unusable_adapters;
                }
                // Others came first after it was sent.
                Event::Failed(RequestError::QueueFull { .. }) => break &tally.queue_full,
                Event::Failed(error) => panic!("{error}"),
            }
        };
        count.fetch_add(1, Ordering::SeqCst);
        if random.u8(0..4) == 0 {
            thread::sleep(Duration::from_millis(random.u64(0..30)));
        }
    }
}

/// Gaps between the tokens of a request that always runs, in milliseconds, by whether an adapter was being loaded.
fn watch(handle: &EngineHandle, stop: &AtomicBool) -> BTreeMap<bool, Vec<f64>> {
    let mut gaps: BTreeMap<bool, Vec<f64>> = BTreeMap::new();
    while !stop.load(Ordering::SeqCst) {
        let forever = StopAt { max_tokens: 64, strings: Vec::new(), tokens: Vec::new() };
        let request = Request {
            prompt: vec![1],
            adapters: AdapterSpans::default(),
            sampling: Sampling::Greedy,
            rules: LogitRules::default(),
            stop: forever,
            grammar: None,
            log_probabilities: LogProbabilities::default(),
        };
        let Ok(mut stream) = handle.submit(request) else { continue };
        let (mut last, mut preemptions) = (None, handle.metrics().preemptions);
        while let Some(Event::Text { .. }) = stream.blocking_recv() {
            let (now, metrics) = (Instant::now(), handle.metrics());
            // A pre-empted sequence waits for its turn, not for an adapter.
            if let Some(last) = last.filter(|_| metrics.preemptions == preemptions) {
                let gap = now.duration_since(last).as_secs_f64() * 1e3;
                gaps.entry(metrics.adapters.loading > 0).or_default().push(gap);
            }
            preemptions = metrics.preemptions;
            last = Some(now);
        }
    }
    gaps
}

fn model_path() -> PathBuf {
    let tiny = Path::new(env!("CARGO_MANIFEST_DIR")).join("../tests/golden/llama_tiny/model");
    std::env::var_os("FLORA_SOAK_MODEL").map_or(tiny, PathBuf::from)
}

#[test]
fn an_engine_survives_everything_at_once() {
    let seconds = std::env::var("FLORA_SOAK_SECONDS").ok().and_then(|seconds| seconds.parse().ok()).unwrap_or(20);
    let model = Arc::new(Model::open(&model_path()).expect("a model"));
    let folder = tempfile::tempdir().expect("a temporary folder");
    let names = adapters::write_all(folder.path(), &model);

    let adapted = adapters::adapted(&model);
    let options = Options {
        sequences: 8,
        tokens_per_step: 96,
        chunk_tokens: 64,
        // Three of the longest requests, of eight that would run.
        cache_tokens: 384,
        block_tokens: BLOCK_TOKENS,
        waiting: 10,
        adapters: AdapterOptions { resident: 6, ..AdapterOptions::default() },
        ..Options::default()
    };
    // Room for about six.
    let adapter_bytes = adapters::bytes(&model) * 6;
    let serve = ServeOptions { adapted, adapter_bytes, cache_tokens: 384, ..ServeOptions::default() };
    let vocabulary = model.decoder().expect("a decoder").vocabulary() as u32;
    let replica = || {
        let decoder = flora_model::load(&flora_devices::host(), &model, &serve).expect("a decoder");
        let source = AdapterDirectory::new(Some(folder.path()), &model, serve.adapters).expect("built-in layers");
        Engine::start(decoder, source, Vocabulary::new(Vec::new()), options.clone()).expect("options that fit")
    };
    let engines = [replica(), replica()];
    let handles = engines.each_ref().map(Engine::handle);
    let metrics = || handles.each_ref().map(EngineHandle::metrics);

    let (tally, stop) = (Tally::default(), AtomicBool::new(false));
    let (gaps, memory, changes) = thread::scope(|scope| {
        for number in 0..CLIENTS {
            let (handles, tally, stop, names) = (&handles, &tally, &stop, &names);
            scope.spawn(move || client(number, handles, vocabulary, names, tally, stop));
        }
        let watched = scope.spawn(|| watch(&handles[0], &stop));
        let changed = scope.spawn(|| adapters::change(folder.path(), &model, &names, &stop));
        let start = Instant::now();
        let (mut memory, mut ended, mut progress) = (Vec::new(), 0, Instant::now());
        while start.elapsed() < Duration::from_secs(seconds) {
            thread::sleep(Duration::from_millis(250));
            memory.push(memory::resident());
            if tally.ended() > ended {
                (ended, progress) = (tally.ended(), Instant::now());
            }
            assert!(progress.elapsed() < HANG, "no request ended for {HANG:?}: {:?}", metrics());
        }
        stop.store(true, Ordering::SeqCst);
        (watched.join().expect("no panic"), memory, changed.join().expect("no panic"))
    });

    let metrics = metrics();
    println!("{seconds} s, {CLIENTS} clients, {} replicas, {}", engines.len(), model.name());
    println!(
        "sent {} = finished {} + cancelled {} + unknown adapters {} + unusable adapters {} + queue full {}; {} tokens",
        tally.sent.load(Ordering::SeqCst),
        tally.finished.load(Ordering::SeqCst),
        tally.cancelled.load(Ordering::SeqCst),
        tally.unknown_adapters.load(Ordering::SeqCst),
        tally.unusable_adapters.load(Ordering::SeqCst),
        tally.queue_full.load(Ordering::SeqCst),
        tally.tokens.load(Ordering::SeqCst),
    );
    println!("adapter folders changed {changes} times; {metrics:?}");
    for (loading, mut gaps) in gaps {
        gaps.sort_by(f64::total_cmp);
        let at = |share: f64| gaps[((gaps.len() - 1) as f64 * share) as usize];
        let when = if loading { "while adapters load" } else { "otherwise" };
        println!(
            "between a running request's tokens {when}: {} gaps, median {:.1} ms, p95 {:.1}, p99 {:.1}, most {:.1}",
            gaps.len(),
            at(0.5),
            at(0.95),
            at(0.99),
            at(1.0)
        );
    }
    assert_eq!(tally.ended(), tally.sent.load(Ordering::SeqCst), "every request ends");
    for Metrics { preemptions, shared_tokens, adapters, .. } in metrics {
        assert!(preemptions > 0 && shared_tokens > 0 && adapters.evictions > 0 && adapters.failures > 0, "{metrics:?}");
    }

    for (engine, handle) in engines.into_iter().zip(&handles) {
        handle.shutdown(Duration::from_secs(10));
        engine.join();
        let after = handle.metrics();
        assert_eq!((after.running, after.waiting, after.cache_blocks_used), (0, 0, 0), "{after:?}");
    }
    memory::must_be_flat(&memory);
}
