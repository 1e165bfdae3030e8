//! A real decoder under the engine: what a request says doesn't depend on what else is in its batches. 200 random compositions of
//! requests with adapters of every kind, sums of them, and spans of both, which arrive, are cancelled and are pre-empted, each held against the same request alone.

use std::collections::BTreeMap;
use std::sync::Arc;
use std::time::Instant;

use flora_adapters::{BaseForm, Layers};
use flora_checkpoint::{AdapterFolder, AdapterModule, Model, Operand};
use flora_engine::{
    AdapterChoice, AdapterOptions, AdapterSpans, Composition, Core, Event, LoadOutcome, Loaded, LogProbabilities,
    LogitRules, Metrics, Options, Request, RequestId, Sampling, Span, Spans, StopAt, Vocabulary,
};
use flora_model::{DeviceModel, PreparedAdapter, ServeOptions};
use flora_plan::layer::Element;

use crate::served::golden;
use crate::{device, is_host};

const MODULES: [&str; 7] = ["q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj"];

/// (name, built-in layer, rank, modules); some leave layers alone.
const ADAPTERS: [(&str, &str, usize, &[&str]); 9] = [
    ("lora", "lora", 3, &["q_proj", "k_proj"]),
    ("lora-all", "lora", 8, &MODULES),
    ("dora", "dora", 2, &["v_proj", "down_proj"]),
    ("ia3", "ia3", 0, &["k_proj", "v_proj"]),
    ("ia3-feedforward", "ia3_feedforward", 0, &["down_proj"]),
    ("hira", "hira", 4, &["q_proj", "up_proj"]),
    ("flora", "flora", 2, &["q_proj", "k_proj"]),
    ("flora-wide", "flora", 9, &MODULES),
    ("flora-mean", "flora_mean", 5, &["o_proj", "gate_proj"]),
];

pub(crate) fn random_module(random: &mut fastrand::Rng, layer: &str, rank: usize, d: usize, k: usize) -> AdapterModule {
    let mut operand = |shape: Vec<usize>, centre: f32, half_width: f32| {
        let count = shape.iter().product();
        let values = (0..count).map(|_| centre + half_width * (2.0 * random.f32() - 1.0)).collect();
        Operand { shape, values }
    };
    let operands = match layer {
        "ia3" => BTreeMap::from([("l", operand(vec![k], 1.0, 0.5))]),
        "ia3_feedforward" => BTreeMap::from([("l", operand(vec![d], 1.0, 0.5))]),
        _ => {
            let centre = if layer.starts_with("flora") { 1.0 } else { 0.0 };
            let (b, a) = (operand(vec![d, rank], centre, 0.5), operand(vec![rank, k], centre, 0.5));
            let mut operands = BTreeMap::from([("b", b), ("a", a)]);
            if matches!(layer, "lora" | "dora") {
                operands.insert("s", Operand { shape: Vec::new(), values: vec![0.5] });
            }
            if layer == "dora" {
                operands.insert("m", operand(vec![k], 1.0, 0.5));
            }
            operands
        }
    };
    let operands = operands.into_iter().map(|(name, operand): (&str, Operand)| (name.to_owned(), operand)).collect();
    AdapterModule { layer: layer.to_owned(), rank, operands }
}

fn prepared(model: &Model) -> BTreeMap<String, PreparedAdapter> {
    let layers = Layers::builtin().expect("built-in layers");
    let mut random = fastrand::Rng::with_seed(5);
    let one = |(name, layer, rank, modules): (&str, &str, usize, &[&str])| {
        let kind = layers.kinds().kind_of_layer(layer).expect("a built-in layer");
        let adapted = model.projections().iter().filter(|own| modules.iter().any(|module| own.path.ends_with(module)));
        let adapted = adapted.map(|own| (own.path.clone(), random_module(&mut random, layer, rank, own.d, own.k)));
        let folder = AdapterFolder::new(name, kind, adapted.collect());
        let folded = layers.prepare(&folder, model).expect("an adapter of the model's shapes");
        (folder, PreparedAdapter::new(name.to_owned(), folded, Element::F32))
    };
    let (folders, prepared): (Vec<_>, Vec<_>) = ADAPTERS.into_iter().map(one).unzip();
    let composed = SUMS.into_iter().map(|parts| {
        let folder = |name: &str| folders.iter().find(|folder| folder.name == name).expect("a part");
        let weighted: Vec<_> = parts.iter().map(|(name, weight)| (*weight, folder(name))).collect();
        let folded = layers.compose(&weighted, model, BaseForm::default()).expect("parts that are weighted");
        PreparedAdapter::new(sum(parts).to_string(), folded, Element::F32)
    });
    prepared.into_iter().chain(composed).map(|prepared| (prepared.name.clone(), prepared)).collect()
}

fn sum(parts: &[(&str, f64)]) -> Composition {
    Composition::new(parts.iter().map(|(name, weight)| ((*name).to_owned(), *weight))).expect("names that differ")
}

/// One of the adapters, or of the sums.
fn choice(random: &mut fastrand::Rng) -> AdapterChoice {
    match random.usize(0..ADAPTERS.len() + SUMS.len()) {
        index if index < ADAPTERS.len() => ADAPTERS[index].0.into(),
        index => sum(SUMS[index - ADAPTERS.len()]).into(),
    }
}

/// What acts on a request's tokens: one adapter or none for half of them, and up to three with their own spans for the others.
fn adapters(random: &mut fastrand::Rng) -> AdapterSpans {
    let own = (random.u8(0..5) > 0).then(|| choice(random));
    let (mut spans, mut free) = (Vec::new(), random.usize(0..8));
    for _ in 0..[0, 0, 1, 2][random.usize(0..4)] {
        let start = free;
        free = start + random.usize(1..24);
        let adapter = (random.u8(0..5) > 0).then(|| choice(random));
        spans.push(Span { start, end: random.bool().then_some(free), adapter });
        if spans.last().is_some_and(|span| span.end.is_none()) {
            break;
        }
        free += random.usize(0..3);
    }
    Spans::new(own, spans).expect("one after the other")
}

/// Sums of them, over layers that some parts leave alone.
const SUMS: [&[(&str, f64)]; 3] = [
    &[("lora", 0.7), ("lora-all", 0.3)],
    &[("dora", 0.5), ("flora-wide", -0.25), ("lora", 1.5)],
    &[("ia3-feedforward", 0.5), ("hira", 1.0), ("flora-mean", 0.125)],
];

/// The model with its adapters at hand.
struct Bench {
    model: Arc<Model>,
    adapters: BTreeMap<String, PreparedAdapter>,
}

/// What a request said, with the bits of each token's log-probability, or that it was cancelled.
type Said = Option<Vec<(u32, u32)>>;

impl Bench {
    fn new() -> Self {
        let model = Arc::new(Model::open(&golden("llama_tiny").join("model")).expect("a golden model"));
        let adapters = prepared(&model);
        Self { model, adapters }
    }

    fn core(&self, options: Options) -> Core<DeviceModel> {
        let adapted = MODULES.map(str::to_owned).to_vec();
        let cache_tokens = options.cache_tokens;
        let serve = ServeOptions { adapted, adapter_bytes: 4 << 20, cache_tokens, ..ServeOptions::default() };
        let decoder = flora_model::load(&device(), &self.model, &serve).expect("a decoder of a known family");
        Core::new(decoder, Arc::new(Vocabulary::new(Vec::new())), options).expect("options that fit")
    }

    /// Runs requests that arrive at the given steps, some of them cancelled at others.
    fn run(&self, options: Options, requests: &[(usize, Request, Option<usize>)]) -> (Vec<Said>, Metrics) {
        let mut core = self.core(options);
        let now = Instant::now();
        let mut ids: Vec<Option<RequestId>> = vec![None; requests.len()];
        let mut said: Vec<Said> = vec![Some(Vec::new()); requests.len()];
        let mut ended = vec![false; requests.len()];
        let mut step = 0;
        while ended.iter().any(|ended| !ended) {
            for (own, (arrival, request, cancelled)) in requests.iter().enumerate() {
                if *arrival == step {
                    ids[own] = Some(core.submit(request.clone(), now).expect("a request that can be run"));
                }
                if let (Some(at), Some(id), false) = (cancelled, ids[own], ended[own])
                    && *at == step
                {
                    core.cancel(id);
                    said[own] = None;
                    ended[own] = true;
                }
            }
            for order in core.take_orders() {
                let prepared = self.adapters[&order.adapter.to_string()].clone();
                let facts = prepared.facts();
                let outcome = LoadOutcome::Prepared { version: 1, prepared, facts };
                core.loaded(Loaded { adapter: order.adapter, outcome });
            }
            for (id, event) in core.step(now) {
                let own = ids.iter().position(|own| *own == Some(id)).expect("an event of a request");
                match event {
                    Event::Prompt(_) => {}
                    Event::Text { scored, .. } => {
                        let said = said[own].as_mut().expect("one that isn't cancelled");
                        said.extend(scored.into_iter().map(|own| (own.token, own.log_probability.to_bits())));
                    }
                    Event::Finished { .. } => ended[own] = true,
                    Event::Failed(error) => panic!("{error}"),
                }
            }
            step += 1;
            assert!(step < 5000, "the engine makes no progress");
        }
        (said, core.metrics())
    }
}

fn vocabulary() -> u32 {
    let model = Model::open(&golden("llama_tiny").join("model")).expect("a golden model");
    model.decoder().expect("a decoder").vocabulary() as u32
}

fn request(random: &mut fastrand::Rng, vocabulary: u32) -> Request {
    let prompt = (0..random.usize(1..40)).map(|_| random.u32(0..vocabulary)).collect();
    let sampling = match random.u8(0..4) {
        0 => Sampling::Random { temperature: 0.9, top_p: 0.95, seed: random.u64(..) },
        _ => Sampling::Greedy,
    };
    let stop = StopAt { max_tokens: random.u32(1..24), strings: Vec::new(), tokens: Vec::new() };
    let log_probabilities = LogProbabilities { generated: Some(0), prompt: None };
    Request {
        prompt,
        adapters: adapters(random),
        sampling,
        rules: LogitRules::default(),
        stop,
        grammar: None,
        log_probabilities,
    }
}

/// Holds random compositions of requests against the same requests alone, without anything in common: their tokens, and the bits of
/// these where each token is run once, so that it is always run beside the same of its own sequence. Gives their pre-emptions, their
/// cancellations, and the tokens that they had in common.
fn compare(
    requests: &[Request],
    options: &Options,
    cache_tokens: std::ops::Range<usize>,
    random: &mut fastrand::Rng,
) -> (u64, usize, u64) {
    let bench = Bench::new();
    let by_itself = Options { share_prefixes: false, ..options.clone() };
    let alone: Vec<_> = requests
        .iter()
        .map(|request| bench.run(by_itself.clone(), &[(0, request.clone(), None)]).0.remove(0).expect("not cancelled"))
        .collect();
    let (mut preemptions, mut cancelled, mut shared) = (0, 0, 0);
    for round in 0..rounds() {
        let chosen: Vec<usize> = (0..random.usize(2..12)).map(|_| random.usize(0..requests.len())).collect();
        let crowd: Vec<_> = chosen
            .iter()
            .map(|own| {
                let arrival = random.usize(0..20);
                let cancel = (random.u8(0..6) == 0).then(|| arrival + random.usize(1..20));
                (arrival, requests[*own].clone(), cancel)
            })
            .collect();
        let options = Options {
            sequences: random.usize(1..9),
            tokens_per_step: random.usize(24..80),
            cache_tokens: random.usize(cache_tokens.clone()),
            adapters: AdapterOptions { resident: random.usize(3..6), ..AdapterOptions::default() },
            ..options.clone()
        };
        let (said, metrics) = bench.run(options.clone(), &crowd);
        preemptions += metrics.preemptions;
        shared += metrics.shared_tokens;
        for (position, (own, said)) in chosen.iter().zip(said).enumerate() {
            match said {
                Some(said) => {
                    let what = || format!("round {round}, request {position} of {crowd:?} under {options:?}");
                    let tokens = |said: &[(u32, u32)]| said.iter().map(|(token, _)| *token).collect::<Vec<_>>();
                    assert_eq!(tokens(&said), tokens(&alone[*own]), "{}", what());
                    let is_run_once = metrics.preemptions == 0 && !options.share_prefixes;
                    assert!(!is_run_once || said == alone[*own], "the bits in {}", what());
                }
                None => cancelled += 1,
            }
        }
    }
    println!(
        "{} compositions, {preemptions} pre-emptions, {cancelled} cancellations, {shared} tokens shared",
        rounds()
    );
    (preemptions, cancelled, shared)
}

/// A software rasteriser takes long over each.
fn rounds() -> usize {
    if is_host() { 200 } else { 4 }
}

#[test]
fn what_a_request_says_does_not_depend_on_the_others() {
    let vocabulary = vocabulary();
    let mut random = fastrand::Rng::with_seed(17);
    let requests: Vec<_> = (0..rounds().min(40)).map(|_| request(&mut random, vocabulary)).collect();
    let wide = Options { chunk_tokens: 16, block_tokens: 8, ..Options::default() };
    // Two of the longest at most.
    let (preemptions, cancelled, _) = compare(&requests, &wide, 64..160, &mut random);
    assert!(!is_host() || preemptions > 20 && cancelled > 20, "the test doesn't test what it is for");
}

/// Where there is room for all of them, nothing is computed twice.
#[test]
fn the_bits_of_what_a_request_says_are_its_own() {
    let vocabulary = vocabulary();
    let mut random = fastrand::Rng::with_seed(41);
    let requests: Vec<_> = (0..rounds().min(40)).map(|_| request(&mut random, vocabulary)).collect();
    let several = requests.iter().filter(|request| request.adapters.runs().count() > 1).count();
    let roomy = Options { chunk_tokens: 16, block_tokens: 8, share_prefixes: false, ..Options::default() };
    let (preemptions, ..) = compare(&requests, &roomy, 4096..4097, &mut random);
    assert!(preemptions == 0 && (!is_host() || several > 10), "the test doesn't test what it is for");
}

/// The same of requests that begin alike, some as far as to their answers, so that they have keys and values in common.
#[test]
fn what_requests_have_in_common_changes_nothing() {
    let vocabulary = vocabulary();
    let mut random = fastrand::Rng::with_seed(29);
    let texts: Vec<Vec<u32>> = (0..2).map(|_| (0..64).map(|_| random.u32(0..vocabulary)).collect()).collect();
    let requests: Vec<_> = (0..40)
        .map(|_| {
            let own = request(&mut random, vocabulary);
            let (text, begun) = (&texts[random.usize(0..2)], random.usize(20..=64));
            let tail = random.usize(0..own.prompt.len().min(72 - begun));
            // Half of them are the base model's, which all have in common.
            let adapters = if random.bool() { own.adapters } else { AdapterSpans::default() };
            Request { prompt: [&text[..begun], &own.prompt[..tail]].concat(), adapters, ..own }
        })
        .collect();
    let whole = Options { chunk_tokens: 16, block_tokens: 32, ..Options::default() };
    let (preemptions, cancelled, shared) = compare(&requests, &whole, 96..352, &mut random);
    let is_enough = if is_host() { preemptions > 20 && cancelled > 20 && shared > 5_000 } else { shared > 32 };
    assert!(is_enough, "the test doesn't test what it is for");
}
