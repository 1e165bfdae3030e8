//! A real decoder under the engine: what a request says doesn't depend on what else is in its batches. 200 random compositions of
//! requests with adapters of every kind, which arrive, are cancelled and are pre-empted, each held against the same request alone.

use std::collections::BTreeMap;
use std::sync::Arc;
use std::time::Instant;

use flora_adapters::Layers;
use flora_checkpoint::{AdapterFolder, AdapterModule, Model, Operand};
use flora_engine::{
    AdapterOptions, Core, Event, LoadOutcome, Loaded, LogProbabilities, LogitRules, Metrics, Options, Request,
    RequestId, Sampling, StopAt, Vocabulary,
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
        (name.to_owned(), PreparedAdapter::new(name.to_owned(), folded, Element::F32))
    };
    ADAPTERS.into_iter().map(one).collect()
}

/// The model with its adapters at hand.
struct Bench {
    model: Arc<Model>,
    adapters: BTreeMap<String, PreparedAdapter>,
}

/// What a request said, or that it was cancelled.
type Said = Option<Vec<u32>>;

impl Bench {
    fn new() -> Self {
        let model = Arc::new(Model::open(&golden("llama_tiny").join("model")).expect("a golden model"));
        let adapters = prepared(&model);
        Self { model, adapters }
    }

    fn core(&self, options: Options) -> Core<DeviceModel> {
        let adapted = MODULES.map(str::to_owned).to_vec();
        let block_tokens = options.block_tokens as u32;
        let serve = ServeOptions { adapted, adapter_bytes: 4 << 20, block_tokens, ..ServeOptions::default() };
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
                let prepared = self.adapters[&order.name].clone();
                let facts = prepared.facts();
                let outcome = LoadOutcome::Prepared { version: 1, prepared, facts };
                core.loaded(Loaded { name: order.name, outcome });
            }
            for (id, event) in core.step(now) {
                let own = ids.iter().position(|own| *own == Some(id)).expect("an event of a request");
                match event {
                    Event::Prompt(_) => {}
                    Event::Text { tokens, .. } => {
                        said[own].as_mut().expect("one that isn't cancelled").extend(tokens);
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
    let adapter = random.usize(0..ADAPTERS.len() + 2);
    let sampling = match random.u8(0..4) {
        0 => Sampling::Random { temperature: 0.9, top_p: 0.95, seed: random.u64(..) },
        _ => Sampling::Greedy,
    };
    let stop = StopAt { max_tokens: random.u32(1..24), strings: Vec::new(), tokens: Vec::new() };
    let adapter = ADAPTERS.get(adapter).map(|own| own.0.to_owned());
    Request {
        prompt,
        adapter,
        sampling,
        rules: LogitRules::default(),
        stop,
        grammar: None,
        log_probabilities: LogProbabilities::default(),
    }
}

/// Holds random compositions of requests against the same requests alone, without anything in common. Gives their pre-emptions, their
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
            adapters: AdapterOptions { resident: random.usize(1..6), ..AdapterOptions::default() },
            ..options.clone()
        };
        let (said, metrics) = bench.run(options.clone(), &crowd);
        preemptions += metrics.preemptions;
        shared += metrics.shared_tokens;
        for (position, (own, said)) in chosen.iter().zip(said).enumerate() {
            match said {
                Some(said) => {
                    assert_eq!(said, alone[*own], "round {round}, request {position} of {crowd:?} under {options:?}");
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

/// The same of requests that begin alike, some as far as to their answers, so that they have keys and values in common.
#[test]
fn what_requests_have_in_common_changes_nothing() {
    if !is_host() {
        println!("NOT RUN: on devices sequences have no keys and values in common");
        return;
    }
    let vocabulary = vocabulary();
    let mut random = fastrand::Rng::with_seed(29);
    let texts: Vec<Vec<u32>> = (0..3).map(|_| (0..64).map(|_| random.u32(0..vocabulary)).collect()).collect();
    let requests: Vec<_> = (0..40)
        .map(|_| {
            let own = request(&mut random, vocabulary);
            let (text, begun) = (&texts[random.usize(0..3)], random.usize(20..=64));
            let tail = random.usize(0..own.prompt.len().min(72 - begun));
            Request { prompt: [&text[..begun], &own.prompt[..tail]].concat(), ..own }
        })
        .collect();
    let whole = Options { chunk_tokens: 16, block_tokens: 32, ..Options::default() };
    let (preemptions, cancelled, shared) = compare(&requests, &whole, 96..352, &mut random);
    assert!(preemptions > 20 && cancelled > 20 && shared > 5_000, "the test doesn't test what it is for");
}
