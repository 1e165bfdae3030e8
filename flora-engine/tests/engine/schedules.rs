//! Random schedules: whatever comes, goes, fails and is late, each request says what it says alone, and nothing is left behind.

use std::collections::{BTreeMap, BTreeSet};

use flora_engine::{
    AdapterChoice, AdapterOptions, AdapterSpans, Composition, LoadOrder, LogProbabilities, LogitRules, Options,
    Request, RequestError, RequestId, Sampling, Span, Spans, StopAt,
};
use proptest::collection::vec;
use proptest::option;
use proptest::prelude::*;
use proptest::sample::{select, subsequence};
use proptest::strategy::ValueTree;
use proptest::test_runner::{RngSeed, TestRunner};

use crate::support::decoder::{NextStep, POISON};
use crate::support::disk::{Disk, Files, Stored};
use crate::support::drive::{Drive, End, alone};
use crate::support::grammar::Letters;
use crate::support::{TOKENS, options};

const NAMES: [&str; 6] = ["ann", "bob", "cat", "dan", "eve", "fay"];

/// A request and its fate.
#[derive(Clone, Debug)]
struct Arrival {
    step: usize,
    request: Request,
    /// Steps after it came.
    cancelled: Option<usize>,
}

/// Something that happens to the disk or the device.
#[derive(Clone, Debug)]
enum Mishap {
    Write { adapter: usize, bytes: u64, files: Files },
    Remove { adapter: usize },
    StepFails,
}

#[derive(Clone, Debug)]
struct Schedule {
    options: Options,
    capacity: Option<u64>,
    arrivals: Vec<Arrival>,
    mishaps: Vec<(usize, Mishap)>,
    /// Steps that orders take, one after the other.
    delays: Vec<usize>,
}

fn files() -> impl Strategy<Value = Files> {
    prop_oneof![6 => Just(Files::Good), 1 => Just(Files::Broken), 1 => Just(Files::Unfit)]
}

fn mishap() -> impl Strategy<Value = Mishap> {
    prop_oneof![
        4 => (0..NAMES.len(), 1u64..7, files()).prop_map(|(adapter, bytes, files)| Mishap::Write { adapter, bytes, files }),
        1 => (0..NAMES.len()).prop_map(|adapter| Mishap::Remove { adapter }),
        1 => Just(Mishap::StepFails),
    ]
}

fn sampling() -> impl Strategy<Value = Sampling> {
    prop_oneof![
        Just(Sampling::Greedy),
        (0.2f32..2.0, 0.1f32..=1.0, any::<u64>()).prop_map(|(temperature, top_p, seed)| Sampling::Random {
            temperature,
            top_p,
            seed
        }),
    ]
}

fn choice() -> impl Strategy<Value = AdapterChoice> {
    let composed = subsequence(&NAMES[..], 1..3).prop_map(|names| {
        let parts = names.into_iter().zip([0.5, -2.0]).map(|(name, weight)| (name.to_owned(), weight));
        Composition::new(parts).expect("names that differ").into()
    });
    prop_oneof![11 => select(&NAMES[..]).prop_map(AdapterChoice::from), 1 => composed]
}

/// The adapters of a request: one or none for most, and spans of others for some.
fn adapters() -> impl Strategy<Value = AdapterSpans> {
    let span = (1usize..8, 0usize..6, option::weighted(0.8, choice()));
    let spans = prop_oneof![9 => Just(Vec::new()), 1 => vec(span, 1..4)];
    (option::weighted(0.6, choice()), spans, any::<bool>()).prop_map(|(own, spans, is_open)| {
        let last = spans.len().wrapping_sub(1);
        let mut start = 0;
        let spans = spans.into_iter().enumerate().map(|(index, (length, gap, adapter))| {
            let own_start = start + gap;
            start = own_start + length;
            let end = (!is_open || index != last).then_some(start);
            Span { start: own_start, end, adapter }
        });
        Spans::new(own, spans.collect::<Vec<_>>()).expect("one after the other")
    })
}

/// The adapters that a request has at the same time.
fn choices(request: &Request) -> BTreeSet<&AdapterChoice> {
    request.adapters.adapters().collect()
}

fn arrival() -> impl Strategy<Value = Arrival> {
    let prompt = prop_oneof![9 => vec(0..TOKENS, 1..20), 1 => Just(POISON.to_vec())];
    let stop = (1u32..30, vec("[a-hé]{1,3}", 0..3), vec(0..TOKENS, 0..2));
    let letters = prop_oneof![4 => Just(None), 1 => Just(Some(Letters::Nested)), 1 => Just(Some(Letters::Pairs))];
    (0usize..40, prompt, adapters(), sampling(), stop, option::weighted(0.2, 0usize..30), letters).prop_map(
        |(step, prompt, adapters, sampling, (max_tokens, strings, tokens), cancelled, letters)| Arrival {
            step,
            request: Request {
                prompt,
                adapters,
                sampling,
                rules: LogitRules::default(),
                stop: StopAt { max_tokens, strings, tokens },
                grammar: letters.map(Letters::grammar),
                log_probabilities: LogProbabilities::default(),
            },
            cancelled,
        },
    )
}

fn schedule() -> impl Strategy<Value = Schedule> {
    // A request comes to 48 tokens at most, so that the smallest cache holds any of them, and little more.
    let sizes = (1usize..8, 1usize..6, 0usize..10, 1usize..5, 0usize..40);
    let adapters = (1usize..5, 3u64..8, 1usize..4, 0u64..12, vec(0..NAMES.len(), 0..2));
    (
        sizes,
        adapters,
        option::of(2u64..8),
        vec(arrival(), 1..24),
        vec((0usize..60, mishap()), 0..12),
        vec(0usize..12, 1..8),
    )
        .prop_map(|(sizes, adapters, capacity, mut arrivals, mishaps, delays)| {
            let (sequences, chunk_tokens, spare, block_tokens, more_cache) = sizes;
            let (resident, bytes, loading, bytes_per_step, pinned) = adapters;
            for arrival in &mut arrivals {
                // More is refused when it comes.
                if choices(&arrival.request).len() > resident {
                    let first = arrival.request.adapters.adapters().next().cloned();
                    arrival.request.adapters = Spans::whole(first);
                }
            }
            let options = Options {
                sequences,
                chunk_tokens,
                tokens_per_step: chunk_tokens + sequences - 1 + spare,
                cache_tokens: 48 + block_tokens + more_cache,
                block_tokens,
                adapters: AdapterOptions {
                    resident,
                    bytes,
                    loading,
                    bytes_per_step,
                    pinned: pinned.into_iter().map(|index| NAMES[index].to_string()).collect(),
                    ..AdapterOptions::default()
                },
                ..options()
            };
            Schedule { options, capacity, arrivals, mishaps, delays }
        })
}

/// Steps in which every request is served though they are run one after the other, each for as long as it can take, and waits
/// for all loads before that.
fn bound(schedule: &Schedule) -> usize {
    let longest = schedule.delays.iter().max().copied().unwrap_or_default() + 3;
    let work: usize = schedule
        .arrivals
        .iter()
        .map(|arrival| 2 * (arrival.request.prompt.len() + arrival.request.stop.max_tokens as usize) + 3 * longest)
        .sum();
    100 + work
}

/// What is ever written of an adapter: its bytes, and whether it can be used.
fn written<'a>(schedule: &'a Schedule, name: &'a str) -> impl Iterator<Item = (u64, bool)> + 'a {
    let original = [(1, true)].into_iter();
    original.chain(schedule.mishaps.iter().filter_map(move |(_, mishap)| match mishap {
        Mishap::Write { adapter, bytes, files } if NAMES[*adapter] == name => Some((*bytes, *files == Files::Good)),
        Mishap::Remove { adapter } if NAMES[*adapter] == name => Some((0, false)),
        _ => None,
    }))
}

/// Whether something is ever wrong with the adapters of a request, or there may be no room for them beside those that are pinned.
fn may_fail(schedule: &Schedule, request: &Request) -> bool {
    let most_bytes = |name| written(schedule, name).map(|(bytes, _)| bytes).max().unwrap_or_default();
    let adapters = &schedule.options.adapters;
    let own = choices(request);
    let names = || own.iter().flat_map(|choice| choice.names());
    let is_own = |pinned: &String| own.contains(&AdapterChoice::from(pinned.as_str()));
    let pinned: BTreeSet<&String> = adapters.pinned.iter().filter(|pinned| !is_own(pinned)).collect();
    let needed = names().map(most_bytes).sum::<u64>() + pinned.iter().map(|pinned| most_bytes(pinned)).sum::<u64>();
    names().any(|name| written(schedule, name).any(|(_, good)| !good))
        || own.len() + pinned.len() > adapters.resident
        || needed > adapters.bytes.min(schedule.capacity.unwrap_or(u64::MAX))
}

/// What requests begin with that begin alike.
const ALIKE: [u32; 12] = [3, 1, 4, 1, 5, 9, 2, 6, 5, 3, 5, 8];

/// Requests that begin alike, and an engine that makes use of it.
fn alike() -> impl Strategy<Value = Schedule> {
    (schedule(), vec(0..=ALIKE.len(), 24)).prop_map(|(mut schedule, lengths)| {
        schedule.options.share_prefixes = true;
        for (arrival, length) in schedule.arrivals.iter_mut().zip(lengths) {
            let prompt = &mut arrival.request.prompt;
            if !prompt.ends_with(&POISON) {
                prompt.splice(0..length.min(prompt.len() - 1), ALIKE[..length].iter().copied());
                prompt.truncate(19);
            }
        }
        schedule
    })
}

struct Run {
    drive: Drive,
    requests: BTreeMap<RequestId, Arrival>,
    cancelled: Vec<RequestId>,
    step_failed: bool,
}

fn run(schedule: &Schedule) -> Run {
    let disk = Disk::default();
    for name in NAMES {
        disk.write(name, 1, Files::Good);
    }
    let drive = Drive::new(schedule.options.clone(), disk);
    drive.decoder.state().adapter_capacity = schedule.capacity;
    let mut run = Run { drive, requests: BTreeMap::new(), cancelled: Vec::new(), step_failed: false };
    let mut cancellations: Vec<(usize, RequestId)> = Vec::new();
    let mut loads: Vec<(usize, LoadOrder)> = Vec::new();
    let mut delays = schedule.delays.iter().cycle();
    let last = 60;
    for step in 0..last + bound(schedule) {
        let drive = &mut run.drive;
        for (_, mishap) in schedule.mishaps.iter().filter(|(at, _)| *at == step) {
            match mishap {
                Mishap::Write { adapter, bytes, files } => drive.disk.write(NAMES[*adapter], *bytes, *files),
                Mishap::Remove { adapter } => drop(drive.disk.all().remove(NAMES[*adapter])),
                Mishap::StepFails => {
                    drive.decoder.state().next_step = NextStep::Fails;
                    run.step_failed = true;
                }
            }
        }
        for arrival in schedule.arrivals.iter().filter(|arrival| arrival.step == step) {
            let id = drive.submit(arrival.request.clone());
            run.requests.insert(id, arrival.clone());
            cancellations.extend(arrival.cancelled.map(|after| (step + after, id)));
        }
        for (_, id) in cancellations.extract_if(.., |(at, _)| *at <= step) {
            if drive.heard[&id].end.is_none() {
                drive.core.cancel(id);
                run.cancelled.push(id);
            }
        }
        for (_, order) in loads.extract_if(.., |(at, _)| *at <= step) {
            let loaded = drive.disk.load(order);
            drive.core.loaded(loaded);
        }
        drive.step();
        for order in std::mem::take(&mut drive.orders) {
            loads.push((step + 1 + delays.next().copied().unwrap_or_default(), order));
        }
        if step > last && drive.core.is_empty() && loads.is_empty() {
            return run;
        }
    }
    panic!("requests are left: {:?}", run.drive.core.metrics());
}

/// The disk with the versions of the adapters that a request began with; none where one was replaced while they were read, so that
/// they are of different versions.
fn disk_of(run: &Run, id: RequestId) -> Option<Disk> {
    let disk = Disk::with(&NAMES);
    let mut versions = BTreeMap::new();
    let state = run.drive.decoder.state();
    let adapters = state.known.get(&id.sequence()).into_iter().flat_map(|known| &known.adapters);
    for (name, version) in adapters.flat_map(|adapter| adapter.parts.clone()) {
        if *versions.entry(name.clone()).or_insert(version) != version {
            return None;
        }
        disk.all().insert(name, Stored { version, bytes: 1, state: Files::Good, reads: 0 });
    }
    Some(disk)
}

/// More where PROPTEST_CASES asks for more.
fn cases() -> u32 {
    let asked = std::env::var("PROPTEST_CASES").ok().and_then(|cases| cases.parse().ok()).unwrap_or(0);
    asked.max(400)
}

proptest! {
    #![proptest_config(ProptestConfig {
        cases: 2 * cases(),
        rng_seed: RngSeed::Fixed(0xF10A),
        failure_persistence: None,
        ..ProptestConfig::default()
    })]

    #[test]
    fn each_request_says_what_it_says_alone(schedule in prop_oneof![schedule(), alike()]) {
        let run = run(&schedule);
        run.drive.check_nothing_is_held();
        let metrics = run.drive.core.metrics();
        let mut counts = (0, 0);
        for (id, arrival) in &run.requests {
            let heard = &run.drive.heard[id];
            let cancelled = run.cancelled.contains(id);
            prop_assert_eq!(heard.end.is_some(), !cancelled);
            let disk = disk_of(&run, *id);
            let expected = disk.map(|disk| alone(arrival.request.clone(), schedule.options.chunk_tokens, disk));
            match &heard.end {
                Some(End::Finished(..)) => {
                    counts.0 += 1;
                    prop_assert!(expected.as_ref().is_none_or(|expected| heard == expected));
                }
                Some(End::Failed(error)) => {
                    counts.1 += 1;
                    match error {
                        RequestError::Adapter(_) => {
                            prop_assert!(may_fail(&schedule, &arrival.request), "{}", error);
                        }
                        RequestError::Model(_) => {
                            prop_assert!(run.step_failed || arrival.request.prompt.ends_with(&POISON));
                        }
                        other => prop_assert!(false, "{}", other),
                    }
                }
                None => {}
            }
            let Some(expected) = expected else { continue };
            prop_assert!(heard.tokens.is_empty() || expected.tokens.starts_with(&heard.tokens));
            prop_assert!(heard.text.is_empty() || expected.text.starts_with(&heard.text));
        }
        prop_assert_eq!(counts, (metrics.finished, metrics.failed));
        prop_assert_eq!(run.cancelled.len() as u64, metrics.cancelled);
    }
}

/// The schedules above mean something: what is rare in a real engine is common in them.
#[test]
fn schedules_meet_what_they_are_for() {
    let mut runner = TestRunner::deterministic();
    let (mut preemptions, mut evictions, mut failures, mut recomputed, mut finished) = (0, 0, 0, 0, 0);
    let (mut varying, mut composed) = (0, 0);
    for _ in 0..1000 {
        let schedule = schedule().new_tree(&mut runner).expect("a schedule").current();
        let run = run(&schedule);
        let metrics = run.drive.core.metrics();
        let state = run.drive.decoder.state();
        for known in state.known.values() {
            varying += usize::from(known.adapters.len() > 1);
            composed += usize::from(known.adapters.iter().any(|adapter| adapter.parts.len() > 1));
        }
        preemptions += metrics.preemptions;
        recomputed += metrics.recomputed_tokens;
        evictions += metrics.adapters.evictions;
        failures += metrics.adapters.failures;
        finished += metrics.finished;
    }
    let all = format!("{preemptions} {recomputed} {evictions} {failures} {finished}");
    assert!(preemptions > 500 && recomputed > 5000 && evictions > 1000 && failures > 500 && finished > 5000, "{all}");
    println!("{varying} {composed}");
    assert!(varying > 150 && composed > 150, "{varying} {composed}");
    let mut shared = (0, 0);
    for _ in 0..200 {
        let schedule = alike().new_tree(&mut runner).expect("a schedule").current();
        let metrics = run(&schedule).drive.core.metrics();
        shared = (shared.0 + metrics.shared_tokens, shared.1 + metrics.preemptions);
    }
    assert!(shared.0 > 3000 && shared.1 > 100, "{shared:?}");
}
