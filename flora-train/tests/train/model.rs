//! A model of two adapted layers: the embedding of a token, one layer, another, and the softmax over the vocabulary. Small enough for
//! f64, and everything in it is the oracle's: [`FoldedAdapter::apply`] and [`FoldedAdapter::gradient`].

use std::collections::BTreeMap;
use std::path::Path;
use std::sync::Arc;

use flora_adapters::Layers;
use flora_checkpoint::AdapterRequest;
use flora_ir::algebra::{FoldedAdapter, VirtualRow};
use flora_ir::gradient::{FoldedGradient, RankOneGradient, VirtualRowGradient};
use flora_ir::{Activation, Value};
use flora_plan::layer::LayerShape;
use flora_train::data::{Document, Excess};
use flora_train::{
    AdamW, BatchGradients, Dataset, Decay, Evaluation, JobGradients, JobId, JobOptions, Length, NewJob, Places,
    SegmentLoss, Start, TargetLayer, TrainSegment, Trainee, Trainer, Warmup,
};

pub(crate) const VOCABULARY: usize = 13;
const D: usize = 5;
const H: usize = 7;

#[derive(Debug, thiserror::Error)]
#[error("the segment of {0} can't be computed: {1}")]
pub(crate) struct Failed(String, &'static str);

#[derive(Debug)]
pub(crate) struct Small {
    layers: Vec<TargetLayer>,
    embedding: Vec<f64>,
    weights: [Value; 2],
    placed: BTreeMap<JobId, Vec<(usize, FoldedAdapter)>>,
    /// How many tokens each call had.
    pub(crate) calls: Vec<usize>,
    name: String,
}

/// A weight of a layer that no adapter is on.
fn plain() -> FoldedAdapter {
    FoldedAdapter { virtual_rows: vec![VirtualRow::default()], ..FoldedAdapter::default() }
}

impl Small {
    pub(crate) fn new() -> Self {
        let mut random = fastrand::Rng::with_seed(11);
        // Rounded to f32, which is what an adapter may be folded with.
        let mut numbers =
            |count: usize| -> Vec<f64> { (0..count).map(|_| f64::from(random.f32() * 2.0 - 1.0)).collect() };
        let layer = |path: &str, d: usize, k: usize| TargetLayer {
            path: path.to_owned(),
            shape: LayerShape { d: d as u32, k: k as u32 },
            has_bias: path.contains("biased"),
        };
        Self {
            layers: vec![
                layer("model.layers.0.self_attn.q_proj", D, H),
                layer("model.layers.0.mlp.down_proj", H, VOCABULARY),
            ],
            embedding: numbers(VOCABULARY * D),
            weights: [
                Value::matrix(D, H, numbers(D * H)).expect("as many numbers"),
                Value::matrix(H, VOCABULARY, numbers(H * VOCABULARY)).expect("as many numbers"),
            ],
            placed: BTreeMap::new(),
            calls: Vec::new(),
            name: "small".to_owned(),
        }
    }

    pub(crate) fn named(mut self, name: &str) -> Self {
        self.name = name.to_owned();
        self
    }

    pub(crate) fn with_bias(mut self) -> Self {
        self.layers[0].has_bias = true;
        self
    }

    fn adapters(&self, job: Option<JobId>) -> Result<[FoldedAdapter; 2], Failed> {
        let mut adapters = [plain(), plain()];
        if let Some(job) = job {
            let placed = self.placed.get(&job).ok_or_else(|| Failed(format!("{job:?}"), "it has no adapters"))?;
            placed.iter().for_each(|(layer, adapter)| adapters[*layer] = adapter.clone());
        }
        Ok(adapters)
    }

    /// The loss, and the gradients of both layers' adapters.
    fn segment(&self, segment: &TrainSegment<'_>) -> Result<(SegmentLoss, [FoldedGradient; 2]), Failed> {
        let fail = |problem| Failed(format!("{:?}", segment.job), problem);
        let rows = segment.tokens.len();
        if rows == 0 || segment.targets.len() != rows {
            return Err(fail("it has no tokens, or other targets"));
        }
        let known = segment.tokens.iter().chain(segment.targets.iter().flatten());
        if known.into_iter().any(|token| *token as usize >= VOCABULARY) {
            return Err(fail("a token is beyond the vocabulary"));
        }
        let [first, second] = self.adapters(segment.job)?;
        let x = segment.tokens.iter().flat_map(|token| self.embedding[*token as usize * D..][..D].to_vec());
        let x = Value::matrix(rows, D, x.collect()).expect("rows of the embedding");
        let hidden =
            first.apply(&x, &self.weights[0], None, Activation::Identity).map_err(|_| fail("it doesn't fit"))?;
        let logits = second.apply(&hidden, &self.weights[1], None, Activation::Identity);
        let logits = logits.map_err(|_| fail("it doesn't fit"))?;
        let mut loss = SegmentLoss::default();
        let mut slopes = vec![0.0; rows * VOCABULARY];
        for (row, target) in segment.targets.iter().enumerate() {
            let Some(target) = target else { continue };
            let logits = &logits.data()[row * VOCABULARY..][..VOCABULARY];
            let largest = logits.iter().copied().fold(f64::NEG_INFINITY, f64::max);
            let sum: f64 = logits.iter().map(|logit| (logit - largest).exp()).sum();
            loss.nats -= logits[*target as usize] - largest - sum.ln();
            loss.targets += 1;
            let slopes = &mut slopes[row * VOCABULARY..][..VOCABULARY];
            slopes.iter_mut().zip(logits).for_each(|(slope, logit)| *slope = (logit - largest).exp() / sum);
            slopes[*target as usize] -= 1.0;
        }
        let slopes = Value::matrix(rows, VOCABULARY, slopes).expect("rows of logits");
        let back = second.gradient(&hidden, &self.weights[1], None, Activation::Identity, &slopes).expect("shapes");
        let start = first.gradient(&x, &self.weights[0], None, Activation::Identity, &back.input).expect("shapes");
        Ok((loss, [start.adapter, back.adapter]))
    }
}

impl Trainee for Small {
    type Error = Failed;

    fn layers(&self) -> &[TargetLayer] {
        &self.layers
    }

    fn base_weight(&self, layer: usize) -> Result<Vec<f32>, Failed> {
        let weight = self.weights.get(layer).ok_or_else(|| Failed(String::new(), "there is no such layer"))?;
        Ok(weight.data().iter().map(|weight| *weight as f32).collect())
    }

    fn identity(&self) -> Result<String, Failed> {
        Ok(self.name.clone())
    }

    fn place(&mut self, job: JobId, layers: &[(usize, FoldedAdapter)]) -> Result<(), Failed> {
        self.placed.insert(job, layers.to_vec());
        Ok(())
    }

    fn remove(&mut self, job: JobId) {
        self.placed.remove(&job);
    }

    fn gradients(&mut self, batch: &[TrainSegment<'_>]) -> Result<BatchGradients, Failed> {
        self.calls.push(batch.iter().map(|segment| segment.tokens.len()).sum());
        let mut answer = BatchGradients::default();
        for segment in batch {
            let (loss, gradients) = self.segment(segment)?;
            answer.losses.push(loss);
            let Some(job) = segment.job else { continue };
            let layers = self.placed[&job].iter().map(|(layer, _)| gradients[*layer].clone()).collect();
            match answer.jobs.iter_mut().find(|known| known.job == job) {
                Some(known) => add(&mut known.layers, &layers),
                None => answer.jobs.push(JobGradients { job, layers }),
            }
        }
        Ok(answer)
    }

    fn losses(&mut self, batch: &[TrainSegment<'_>]) -> Result<Vec<SegmentLoss>, Failed> {
        batch.iter().map(|segment| Ok(self.segment(segment)?.0)).collect()
    }
}

fn add(sums: &mut [FoldedGradient], gradients: &Vec<FoldedGradient>) {
    let sum = |sum: &mut Vec<f64>, other: &Vec<f64>| sum.iter_mut().zip(other).for_each(|(sum, other)| *sum += other);
    let some = |one: &mut Option<Vec<f64>>, other: &Option<Vec<f64>>| {
        if let (Some(one), Some(other)) = (one, other) {
            sum(one, other);
        }
    };
    for (one, other) in sums.iter_mut().zip(gradients) {
        for (one, other) in one.virtual_rows.iter_mut().zip(&other.virtual_rows) {
            let VirtualRowGradient { in_scale, out_scale } = one;
            some(in_scale, &other.in_scale);
            some(out_scale, &other.out_scale);
        }
        for (one, other) in one.low_rank.iter_mut().zip(&other.low_rank) {
            let RankOneGradient { shrink, expand } = one;
            sum(shrink, &other.shrink);
            sum(expand, &other.expand);
        }
    }
}

/// Every built-in layer, with a rank where it has one.
pub(crate) const KINDS: [(&str, Option<usize>); 6] = [
    ("lora", Some(3)),
    ("dora", Some(2)),
    ("ia3", None),
    ("hira", Some(4)),
    ("flora", Some(3)),
    ("flora_mean", Some(2)),
];

pub(crate) fn options(name: &str, layer: &str, rank: Option<usize>) -> JobOptions {
    JobOptions {
        name: name.to_owned(),
        adapter: AdapterRequest {
            layer: layer.to_owned(),
            rank,
            alpha: None,
            targets: vec!["q_proj".to_owned(), "down_proj".to_owned()],
            options: serde_json::Map::new(),
        },
        start: Start::Default,
        seed: 5,
        learning_rate: 0.02,
        decay: Decay::Cosine,
        warmup: Warmup::Steps(2),
        length: Length::Steps(12),
        sequence_length: 6,
        batch: 2,
        accumulation: 1,
        optimizer: AdamW { weight_decay: 0.01, ..AdamW::default() },
        largest_norm: Some(1.0),
        evaluation: Evaluation { every: 5, patience: None, least_gain: 0.0 },
        save_every: None,
    }
}

/// Sequences in which a token mostly follows from the one before.
pub(crate) fn data(seed: u64, documents: usize, length: usize) -> Arc<Dataset> {
    let mut random = fastrand::Rng::with_seed(seed);
    let mut made = Vec::new();
    for _ in 0..documents {
        let mut document = Document::new(Excess::Continued);
        let mut token = random.u32(0..VOCABULARY as u32);
        for _ in 0..random.usize(3..20) {
            document.push([token], true);
            let follows = (token * 3 + 1) % VOCABULARY as u32;
            token = if random.u8(0..8) == 0 { random.u32(0..VOCABULARY as u32) } else { follows };
        }
        made.push(document);
    }
    Arc::new(Dataset::new(&made, length).expect("sequences"))
}

pub(crate) fn job(options: JobOptions) -> NewJob {
    let seed = options.name.bytes().map(u64::from).sum();
    let length = options.sequence_length;
    let held_out = Some(data(seed + 1, 6, length));
    NewJob { data: data(seed, 14, length), held_out, begin: None, options, places: Places::default() }
}

pub(crate) fn layers() -> Layers {
    Layers::builtin().expect("the built-in kinds")
}

pub(crate) fn add_job(trainer: &mut Trainer<Small>, job: NewJob) -> JobId {
    trainer.add(job, Path::new("jobs.toml"), &layers()).expect("a job").0
}

/// All that jobs gave until none was left: bits of parameters and losses by name.
pub(crate) fn finish(trainer: &mut Trainer<Small>) -> BTreeMap<String, Outcome> {
    let mut outcomes = BTreeMap::new();
    for _ in 0..10_000 {
        if trainer.is_idle() {
            break;
        }
        for event in trainer.step() {
            let outcome: &mut Outcome = outcomes.entry(event.job.clone()).or_default();
            outcome.events.push(serde_json::to_string(&event).expect("a line"));
        }
    }
    assert!(trainer.is_idle(), "jobs that go on for ever");
    for ended in trainer.take_ended() {
        let outcome = outcomes.entry(ended.name).or_default();
        outcome.reason = Some(ended.reason);
        outcome.parameters = ended
            .adapter
            .parameters()
            .map(|own| own.values.values.iter().map(|value| value.to_bits()).collect())
            .collect();
    }
    outcomes
}

/// What became of one job.
#[derive(Clone, Debug, Default, PartialEq)]
pub(crate) struct Outcome {
    pub(crate) events: Vec<String>,
    pub(crate) reason: Option<flora_train::Ending>,
    pub(crate) parameters: Vec<Vec<u32>>,
}
