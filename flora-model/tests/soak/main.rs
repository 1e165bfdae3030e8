//! An engine on a real decoder under everything at once: random arrivals and cancellations, adapters that change, break, vanish and
//! come back while they are asked for, a cache far too small. Every request ends, nothing leaks, running requests go on.
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
    AdapterFailure, AdapterOptions, AdapterSpans, Engine, EngineHandle, Event, LogProbabilities, LogitRules, Options,
    Request, RequestError, Sampling, StopAt, Vocabulary,
};
use flora_model::{AdapterDirectory, ServeOptions};

/// Clients at a time.
const CLIENTS: u64 = 12;
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

fn request(random: &mut fastrand::Rng, vocabulary: u32, names: &[String]) -> Request {
    let prompt = (0..random.usize(1..80)).map(|_| random.u32(0..vocabulary)).collect();
    let adapter = match random.u8(0..10) {
        0 | 1 => None,
        2 => Some(["nobody", "../adapter-0", "/etc", "", "adapter-0/../adapter-1"][random.usize(0..5)].to_owned()),
        _ => Some(names[random.usize(0..names.len())].clone()),
    };
    let sampling = match random.bool() {
        true => Sampling::Random { temperature: 0.8, top_p: 0.9, seed: random.u64(..) },
        false => Sampling::Greedy,
    };
    let stop = StopAt { max_tokens: random.u32(1..40), strings: vec!["\u{1}never".to_owned()], tokens: Vec::new() };
    Request {
        prompt,
        adapters: adapter.into(),
        sampling,
        rules: LogitRules::default(),
        stop,
        grammar: None,
        log_probabilities: LogProbabilities::default(),
    }
}

/// Sends one request after the other until `stop`.
fn client(number: u64, handle: &EngineHandle, vocabulary: u32, names: &[String], tally: &Tally, stop: &AtomicBool) {
    let mut random = fastrand::Rng::with_seed(1000 + number);
    while !stop.load(Ordering::SeqCst) {
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
        // Three of the longest requests, of eight that would run.
        cache_tokens: 384,
        block_tokens: 16,
        waiting: 10,
        adapters: AdapterOptions { resident: 6, ..AdapterOptions::default() },
        ..Options::default()
    };
    // Room for about six.
    let adapter_bytes = adapters::bytes(&model) * 6;
    let serve = ServeOptions { adapted, adapter_bytes, block_tokens: 16, ..ServeOptions::default() };
    let decoder = flora_model::load(&flora_devices::host(), &model, &serve).expect("a decoder");
    let source = AdapterDirectory::new(Some(folder.path()), &model, serve.adapters).expect("built-in layers");
    let vocabulary = model.decoder().expect("a decoder").vocabulary() as u32;
    let engine = Engine::start(decoder, source, Vocabulary::new(Vec::new()), options).expect("options that fit");

    let (tally, stop) = (Tally::default(), AtomicBool::new(false));
    let (gaps, memory, changes) = thread::scope(|scope| {
        for number in 0..CLIENTS {
            let (handle, tally, stop, names) = (engine.handle(), &tally, &stop, &names);
            scope.spawn(move || client(number, &handle, vocabulary, names, tally, stop));
        }
        let (handle, stopped) = (engine.handle(), &stop);
        let watched = scope.spawn(move || watch(&handle, stopped));
        let changed = scope.spawn(|| adapters::change(folder.path(), &model, &names, &stop));
        let start = Instant::now();
        let (mut memory, mut ended, mut progress) = (Vec::new(), 0, Instant::now());
        while start.elapsed() < Duration::from_secs(seconds) {
            thread::sleep(Duration::from_millis(250));
            memory.push(memory::resident());
            if tally.ended() > ended {
                (ended, progress) = (tally.ended(), Instant::now());
            }
            assert!(progress.elapsed() < HANG, "no request ended for {HANG:?}: {:?}", engine.handle().metrics());
        }
        stop.store(true, Ordering::SeqCst);
        (watched.join().expect("no panic"), memory, changed.join().expect("no panic"))
    });

    let metrics = engine.handle().metrics();
    println!("{seconds} s, {CLIENTS} clients, {}", model.name());
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
    assert!(metrics.preemptions > 0 && metrics.adapters.evictions > 0 && metrics.adapters.failures > 0, "{metrics:?}");

    let handle = engine.handle();
    handle.shutdown(Duration::from_secs(10));
    engine.join();
    let after = handle.metrics();
    assert_eq!((after.running, after.waiting, after.cache_blocks_used), (0, 0, 0), "{after:?}");
    memory::must_be_flat(&memory);
}
