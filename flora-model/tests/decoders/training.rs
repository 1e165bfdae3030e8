//! Losses and gradients of whole decoders: against central differences of the loss in f64, and the promise that a job's are its own.

use flora_checkpoint::{Model, TensorFile};
use flora_ir::algebra::{FoldedAdapter, RankOne, VirtualRow};
use flora_ir::gradient::FoldedGradient;
use flora_model::{TrainError, TrainOptions, TrainedModel};
use flora_train::{BatchGradients, JobId, TargetLayer, TrainSegment, Trainee};

use crate::golden::prompts;
use crate::reference::{Adapters, Reference};
use crate::served::golden;
use crate::{device, families, gguf, is_host};

/// A kind of adapter by its vectors.
struct Kind {
    name: &'static str,
    /// Virtual rows as (in-scale, out-scale).
    rows: &'static [(bool, bool)],
    /// Low-rank pairs.
    rank: usize,
}

const KINDS: [Kind; 7] = [
    Kind { name: "LoRA", rows: &[(false, false)], rank: 3 },
    Kind { name: "fLoRA", rows: &[(true, true), (true, true)], rank: 0 },
    Kind { name: "IA3 of outputs", rows: &[(false, true)], rank: 0 },
    Kind { name: "IA3 of inputs", rows: &[(true, false)], rank: 0 },
    Kind { name: "HiRA", rows: &[(false, false), (true, true), (true, true)], rank: 0 },
    Kind { name: "DoRA", rows: &[(false, true)], rank: 2 },
    Kind { name: "two-sided, with a low-rank part", rows: &[(true, true)], rank: 2 },
];

/// What is in Q8_0 has the file's blocks on the device.
const IN_BLOCKS: &str = "qwen3_tied in Q8_0";

const MODELS: [&str; 8] =
    ["llama_tiny", "gpt_bigcode", "mistral", "qwen2", "qwen2_window", "qwen3", "qwen3_tied", IN_BLOCKS];

/// A golden model, opened.
fn open(name: &str) -> Model {
    let folder;
    let path = match name {
        "llama_tiny" | "gpt_bigcode" => golden(name).join("model"),
        IN_BLOCKS => {
            folder = tempfile::tempdir().expect("a temporary folder");
            let path = folder.path().join("model.gguf");
            std::fs::write(&path, gguf::in_blocks("qwen3_tied", "qwen3")).expect("writing a file");
            path
        }
        case => {
            folder = families::folder(case);
            folder.path().to_owned()
        }
    };
    Model::open(&path).expect("a golden model")
}

fn load(model: &Model, activation_bytes: u64) -> TrainedModel {
    let options = TrainOptions { activation_bytes, ..TrainOptions::default() };
    TrainedModel::load(&device(), model, options).expect("a decoder of a known family")
}

/// Tokens of a job, or of the base, and which of the tokens after them are targets.
#[derive(Clone, Debug)]
struct Document {
    job: Option<JobId>,
    tokens: Vec<u32>,
    targets: Vec<Option<u32>>,
}

impl Document {
    fn new(job: Option<u32>, count: usize, vocabulary: u32, random: &mut fastrand::Rng) -> Self {
        let tokens = (0..count).map(|_| random.u32(0..vocabulary)).collect();
        let targets = (0..count).map(|_| (random.u8(0..4) > 0).then(|| random.u32(0..vocabulary))).collect();
        Self { job: job.map(JobId), tokens, targets }
    }

    fn segment(&self) -> TrainSegment<'_> {
        TrainSegment { job: self.job, tokens: &self.tokens, targets: &self.targets }
    }
}

fn segments(documents: &[Document]) -> Vec<TrainSegment<'_>> {
    documents.iter().map(Document::segment).collect()
}

/// An adapter of a kind that changes its layer as much as a trained one does.
fn adapter(kind: usize, layer: &TargetLayer, random: &mut fastrand::Rng) -> FoldedAdapter {
    let Kind { rows, rank, .. } = KINDS[kind];
    let (d, k) = (layer.shape.d as usize, layer.shape.k as usize);
    let vector = |random: &mut fastrand::Rng, width: usize, size: f32| {
        (0..width).map(|_| size * (2.0 * random.f32() - 1.0)).collect()
    };
    let near_one = |random: &mut fastrand::Rng, width: usize| (0..width).map(|_| 0.5 + random.f32()).collect();
    let row = |random: &mut fastrand::Rng, (inner, outer): (bool, bool)| VirtualRow {
        in_scale: inner.then(|| near_one(random, d)),
        out_scale: outer.then(|| if rows.len() > 1 { vector(random, k, 0.5) } else { near_one(random, k) }),
    };
    let pair = |random: &mut fastrand::Rng| RankOne { shrink: vector(random, d, 0.3), expand: vector(random, k, 0.3) };
    FoldedAdapter {
        virtual_rows: rows.iter().map(|scales| row(random, *scales)).collect(),
        low_rank: (0..rank).map(|_| pair(random)).collect(),
        ..FoldedAdapter::default()
    }
}

/// Adapters of a kind for some of the layers, at least one.
fn adapters(kind: usize, layers: &[TargetLayer], random: &mut fastrand::Rng) -> Adapters {
    let chosen = |random: &mut fastrand::Rng| (0..layers.len()).filter(|_| random.u8(0..3) == 0).collect::<Vec<_>>();
    let mut some = chosen(random);
    if some.is_empty() {
        some.push(random.usize(0..layers.len()));
    }
    some.into_iter().map(|layer| (layer, adapter(kind, &layers[layer], random))).collect()
}

/// The numbers of an adapter's vectors, one vector after the other.
fn vectors(adapter: &mut FoldedAdapter) -> Vec<&mut Vec<f32>> {
    let rows = adapter.virtual_rows.iter_mut().flat_map(|row| row.in_scale.iter_mut().chain(&mut row.out_scale));
    rows.chain(adapter.low_rank.iter_mut().flat_map(|pair| [&mut pair.shrink, &mut pair.expand])).collect()
}

fn gradient_vectors(gradient: &FoldedGradient) -> Vec<&Vec<f64>> {
    let rows = gradient.virtual_rows.iter().flat_map(|row| row.in_scale.iter().chain(&row.out_scale));
    rows.chain(gradient.low_rank.iter().flat_map(|pair| [&pair.shrink, &pair.expand])).collect()
}

/// Every number of a batch's results, as bits.
fn bits(found: &BatchGradients) -> Vec<u64> {
    let losses = found.losses.iter().flat_map(|loss| [loss.nats.to_bits(), loss.targets]);
    let layers = found.jobs.iter().flat_map(|job| &job.layers);
    losses.chain(layers.flat_map(gradient_vectors).flatten().map(|number| number.to_bits())).collect()
}

/// What a job gets of a batch.
fn of_job(found: &BatchGradients, documents: &[Document], job: Option<JobId>) -> BatchGradients {
    let own = documents.iter().zip(&found.losses).filter(|(document, _)| document.job == job);
    BatchGradients {
        losses: own.map(|(_, loss)| *loss).collect(),
        jobs: found.jobs.iter().filter(|gradients| Some(gradients.job) == job).cloned().collect(),
    }
}

/// How far rounding may take a result, of the largest number beside it: as logits may be (see `Served::rounding`), twice the steps,
/// because the backward pass has as many as the forward pass, and goes over what that has rounded.
fn rounding(model: &Model, layers: &[TargetLayer]) -> f64 {
    let width = layers.iter().map(|layer| layer.shape.d.max(layer.shape.k)).max().unwrap_or(1);
    let blocks = model.decoder().map(|config| match config {
        flora_checkpoint::model::DecoderConfig::Llama(config) => config.layers,
        flora_checkpoint::model::DecoderConfig::GptBigCode(config) => config.layers,
    });
    let steps = 2 * (8 * blocks.expect("a decoder") + 2);
    4.0 * f64::from(f32::EPSILON) / 2.0 * (steps as f64 * 2.0 * f64::from(width)).sqrt()
}

#[test]
fn gradients_equal_differences() {
    if !is_host() {
        println!("NOT RUN: gradients of decoders are computed on the host alone");
        return;
    }
    const STEP: f32 = 1.0 / 1024.0;
    let mut random = fastrand::Rng::with_seed(16);
    for name in MODELS {
        let model = open(name);
        let mut trained = load(&model, u64::MAX);
        let layers = trained.layers().to_vec();
        let vocabulary = model.decoder().expect("a decoder").vocabulary() as u32;
        let reference = Reference::new(&model, &layers);
        let rounding = rounding(&model, &layers);
        let mut jobs: Vec<_> = (0..KINDS.len()).map(|kind| adapters(kind, &layers, &mut random)).collect();
        for (job, adapters) in jobs.iter().enumerate() {
            trained.place(JobId(job as u32), adapters).expect("adapters that fit");
        }
        // Two documents of each job, the base's among them.
        let mut document = |job: Option<u32>| Document::new(job, random.usize(2..40), vocabulary, &mut random);
        let mut documents: Vec<_> = (0..KINDS.len() as u32).map(|job| document(Some(job))).collect();
        documents.extend((0..KINDS.len() as u32).rev().map(|job| document(Some(job))));
        documents.insert(3, document(None));
        let found = trained.gradients(&segments(&documents)).expect("known jobs");
        assert_eq!(
            bits(&found),
            bits(&load_with(&model, 0, &jobs).gradients(&segments(&documents)).expect("the same"))
        );
        let losses = trained.losses(&segments(&documents)).expect("known jobs");
        assert_eq!(losses, found.losses);

        for (document, loss) in documents.iter().zip(&found.losses) {
            let adapters = document.job.map_or(Vec::new(), |job| jobs[job.0 as usize].clone());
            let right = reference.loss(&document.segment(), &adapters);
            let allowed = rounding * (right + 8.0 * loss.targets as f64);
            assert!((loss.nats - right).abs() <= allowed, "{name}: {} not {right} ± {allowed}", loss.nats);
            assert_eq!(loss.targets, document.targets.iter().flatten().count() as u64);
        }
        let mut worst = 0.0f64;
        for (kind, adapters) in jobs.iter_mut().enumerate() {
            let job = JobId(kind as u32);
            let gradients =
                &found.jobs.iter().find(|gradients| gradients.job == job).expect("a job of the batch").layers;
            assert_eq!(gradients.len(), adapters.len());
            let own: Vec<_> = documents.iter().filter(|document| document.job == Some(job)).collect();
            let chosen: Vec<usize> = (0..3).map(|_| random.usize(0..adapters.len())).collect();
            for layer in chosen {
                let found = gradient_vectors(&gradients[layer]);
                let largest = found.iter().copied().flatten().fold(0.0f64, |largest, number| largest.max(number.abs()));
                assert_eq!(found.len(), vectors(&mut adapters[layer].1).len());
                for (vector, found) in found.into_iter().enumerate() {
                    let at = random.usize(0..found.len());
                    let before = vectors(&mut adapters[layer].1)[vector][at];
                    let mut loss = |value: f32| {
                        vectors(&mut adapters[layer].1)[vector][at] = value;
                        let loss: f64 = own.iter().map(|document| reference.loss(&document.segment(), adapters)).sum();
                        vectors(&mut adapters[layer].1)[vector][at] = before;
                        loss
                    };
                    let mut difference = |step: f32| {
                        let (above, below) = (before + step, before - step);
                        (loss(above) - loss(below)) / (f64::from(above) - f64::from(below))
                    };
                    let (right, doubled) = (difference(STEP), difference(2.0 * STEP));
                    let allowed = 1.1 * (doubled - right).abs() / 3.0 + 1e-9 + rounding * largest;
                    let error = (found[at] - right).abs();
                    worst = worst.max(error / allowed);
                    assert!(
                        error <= allowed,
                        "{name}, {}, {}, vector {vector}, {at}: {} not {right} ± {allowed}",
                        KINDS[kind].name,
                        layers[adapters[layer].0].path,
                        found[at]
                    );
                }
            }
        }
        println!("{name}: gradients off by {worst:.3} of what is allowed");
    }
}

fn load_with(model: &Model, activation_bytes: u64, jobs: &[Adapters]) -> TrainedModel {
    let mut trained = load(model, activation_bytes);
    for (job, adapters) in jobs.iter().enumerate() {
        trained.place(JobId(job as u32), adapters).expect("adapters that fit");
    }
    trained
}

#[test]
fn company_changes_no_bit() {
    if !is_host() {
        println!("NOT RUN: gradients of decoders are computed on the host alone");
        return;
    }
    let mut random = fastrand::Rng::with_seed(7);
    for name in ["llama_tiny", "gpt_bigcode", IN_BLOCKS] {
        let model = open(name);
        let mut trained = load(&model, 200_000);
        let layers = trained.layers().to_vec();
        let vocabulary = model.decoder().expect("a decoder").vocabulary() as u32;
        let mut jobs: Vec<_> = (0..8).map(|job| adapters(job % KINDS.len(), &layers, &mut random)).collect();
        for (job, adapters) in jobs.iter().enumerate() {
            trained.place(JobId(job as u32), adapters).expect("adapters that fit");
        }
        let mut document = |job: Option<u32>| Document::new(job, random.usize(1..70), vocabulary, &mut random);
        let mut documents: Vec<_> = (0..8).map(|job| document(Some(job))).collect();
        documents.extend([Some(2), None, Some(0), Some(7), Some(2)].map(&mut document));
        let all = trained.gradients(&segments(&documents)).expect("known jobs");
        let alone = |trained: &mut TrainedModel, job: Option<JobId>| {
            let own: Vec<_> = documents.iter().filter(|document| document.job == job).cloned().collect();
            trained.gradients(&segments(&own)).expect("known jobs")
        };
        for job in (0..8).map(|job| Some(JobId(job))).chain([None]) {
            let right = of_job(&all, &documents, job);
            assert!(right.losses.iter().all(|loss| loss.nats.is_finite()));
            assert_eq!(bits(&right), bits(&alone(&mut trained, job)), "{name}, {job:?} in one model");
            // In a model that knows no other job, so that its vectors lie elsewhere.
            let mut own = load(&model, u64::MAX);
            if let Some(job) = job {
                own.place(job, &jobs[job.0 as usize]).expect("adapters that fit");
            }
            assert_eq!(bits(&right), bits(&alone(&mut own, job)), "{name}, {job:?} in a model of its own");
        }

        // A job that went wrong is alone with it.
        for (_, adapter) in &mut jobs[3] {
            vectors(adapter).into_iter().flatten().for_each(|number| *number = f32::NAN);
        }
        trained.place(JobId(3), &jobs[3]).expect("adapters that fit");
        let beside = trained.gradients(&segments(&documents)).expect("NaN is no error");
        for job in (0..8).map(|job| Some(JobId(job))).chain([None]) {
            let (right, found) = (of_job(&all, &documents, job), of_job(&beside, &documents, job));
            if job == Some(JobId(3)) {
                assert!(found.losses.iter().all(|loss| loss.nats.is_nan() || loss.targets == 0));
            } else {
                assert_eq!(bits(&right), bits(&found), "{name}, {job:?} beside NaN");
            }
        }

        // Jobs come and go, and what they leave behind is nobody's.
        for job in [1, 3, 4] {
            trained.remove(JobId(job));
        }
        trained.place(JobId(40), &jobs[4]).expect("adapters that fit");
        trained.place(JobId(4), &jobs[1]).expect("adapters that fit");
        trained.place(JobId(4), &jobs[4]).expect("adapters that fit");
        let own: Vec<_> = documents.iter().filter(|document| document.job == Some(JobId(4))).cloned().collect();
        let right = of_job(&all, &documents, Some(JobId(4)));
        assert_eq!(bits(&right), bits(&trained.gradients(&segments(&own)).expect("a job that came back")));
    }
}

/// From the logits that transformers gave for every token.
#[test]
fn losses_are_transformers() {
    if !is_host() {
        println!("NOT RUN: losses of training are computed on the host alone");
        return;
    }
    for name in ["llama_tiny", "gpt_bigcode"] {
        let model = open(name);
        let mut trained = load(&model, 0);
        let rounding = rounding(&model, trained.layers());
        let vocabulary = model.decoder().expect("a decoder").vocabulary();
        let (prompts, _) = prompts(&golden(name).join("outputs"), "base");
        for prompt in prompts {
            assert_eq!(prompt.vocabulary, (0..vocabulary).collect::<Vec<_>>(), "logits of all tokens");
            let targets: Vec<_> = prompt.tokens.iter().skip(1).map(|token| Some(*token)).chain([None]).collect();
            let mut right = 0.0;
            for (logits, target) in prompt.logits.chunks_exact(vocabulary).zip(targets.iter().flatten()) {
                let powers: f64 = logits.iter().map(|logit| f64::from(*logit).exp()).sum();
                right += powers.ln() - f64::from(logits[*target as usize]);
            }
            let segment = TrainSegment { job: None, tokens: &prompt.tokens, targets: &targets };
            let loss = trained.losses(&[segment]).expect("tokens of the model")[0];
            let allowed = rounding * (right + 8.0 * loss.targets as f64);
            assert!((loss.nats - right).abs() <= allowed, "{name}: {} not {right} ± {allowed}", loss.nats);

            let scores = trained.scores(&[segment]).expect("tokens of the model").remove(0);
            let sum = scores.iter().fold(0.0, |sum, score| sum + score.nats);
            assert_eq!((scores.len() as u64, sum.to_bits()), (loss.targets, loss.nats.to_bits()), "{name}");
            for (logits, score) in prompt.logits.chunks_exact(vocabulary).zip(scores) {
                let largest = logits.iter().copied().fold(f32::NEG_INFINITY, f32::max);
                let below = f64::from(largest - logits[score.likeliest as usize]);
                assert!(below <= 2.0 * rounding * f64::from(largest.abs()), "{name}: {below} below the largest logit");
            }
        }
    }
}

/// Against what the first block reads by its definition: the normalised embedding.
#[test]
fn inputs_of_adapted_projections_are_what_they_read() {
    if !is_host() {
        println!("NOT RUN: training is on the host alone");
        return;
    }
    let model = open("llama_tiny");
    let mut random = fastrand::Rng::with_seed(23);
    let mut trained = load(&model, 0);
    let layers = trained.layers().to_vec();
    let adapted: Vec<usize> = (0..layers.len()).filter(|layer| !layers[*layer].path.ends_with("up_proj")).collect();
    let own: Vec<_> = adapted.iter().map(|layer| (*layer, adapter(0, &layers[*layer], &mut random))).collect();
    trained.place(JobId(3), &own).expect("adapters that fit");
    let documents = [Document::new(Some(3), 7, 173, &mut random), Document::new(Some(3), 5, 173, &mut random)];
    let mut read = Vec::new();
    let gather = |path: &str, x: &[f32]| read.push((path.to_owned(), x.to_vec()));
    trained.adapted_inputs(&segments(&documents), gather).expect("a batch");
    assert_eq!(read.len(), adapted.len(), "each once, and no other");
    for (path, x) in &read {
        let layer = layers.iter().find(|layer| layer.path == *path).expect("a layer of the model");
        assert_eq!(x.len(), 12 * layer.shape.d as usize, "{path}");
        assert!(!path.ends_with("up_proj"), "{path} isn't adapted");
    }
    let tensors = TensorFile::read(&golden("llama_tiny").join("model/model.safetensors")).expect("a file").tensors;
    let (embedding, gamma) =
        (&tensors["model.embed_tokens.weight"], &tensors["model.layers.0.input_layernorm.weight"].values);
    let d = gamma.len();
    let (_, x) = read.iter().find(|(path, _)| path == "model.layers.0.self_attn.q_proj").expect("it is adapted");
    let tokens = documents.iter().flat_map(|document| &document.tokens);
    for (token, x) in tokens.zip(x.chunks_exact(d)) {
        let row = &embedding.values[*token as usize * d..][..d];
        let square = row.iter().map(|number| f64::from(*number).powi(2)).sum::<f64>() / d as f64;
        for ((number, gamma), x) in row.iter().zip(gamma).zip(x) {
            let right = f64::from(*number) * f64::from(*gamma) / (square + 1e-5).sqrt();
            // A sum of d squares, a root, a quotient and two products, in f32.
            let allowed = (d + 8) as f64 * 2f64.powi(-24) * right.abs();
            assert!((right - f64::from(*x)).abs() <= allowed, "{x} not {right}");
        }
    }
}

#[test]
fn what_can_not_be_trained_is_refused() {
    if !is_host() {
        assert!(TrainedModel::load(&device(), &open("llama_tiny"), TrainOptions::default()).is_err());
        return;
    }
    let model = open("llama_tiny");
    let mut trained = load(&model, 0);
    let mut random = fastrand::Rng::with_seed(5);
    let layers = trained.layers().to_vec();
    assert!(layers.iter().all(|layer| layer.path.starts_with("model.layers.")), "neither embedding nor output matrix");
    let own = adapter(0, &layers[0], &mut random);
    let refused = trained.place(JobId(1), &[(layers.len(), own.clone())]);
    assert!(matches!(refused, Err(TrainError::UnknownLayer { job: JobId(1), .. })));
    let refused = trained.place(JobId(1), &[(0, own.clone()), (0, own.clone())]);
    assert!(matches!(refused, Err(TrainError::Twice { job: JobId(1), .. })));
    let other = layers.iter().position(|layer| layer.shape.d != layers[0].shape.d).expect("layers differ");
    let refused = trained.place(JobId(1), &[(0, own.clone()), (other, own.clone())]);
    assert!(matches!(refused, Err(TrainError::Place { job: JobId(1), .. })));

    let refuse = |trained: &mut TrainedModel, job: Option<u32>, tokens: &[u32], targets: &[Option<u32>]| {
        let segment = TrainSegment { job: job.map(JobId), tokens, targets };
        assert!(trained.losses(&[segment]).is_err());
        trained.gradients(&[segment]).expect_err("no batch")
    };
    let refused = refuse(&mut trained, Some(1), &[1], &[None]);
    assert!(matches!(refused, TrainError::UnknownJob { segment: 0, job: JobId(1) }), "what failed isn't placed");
    for (tokens, targets) in [
        (vec![], vec![]),
        (vec![1, 2], vec![None]),
        (vec![173], vec![None]),
        (vec![1], vec![Some(173)]),
        (vec![1; 97], vec![None; 97]),
    ] {
        assert!(matches!(refuse(&mut trained, None, &tokens, &targets), TrainError::Segment { segment: 0, .. }));
    }
    // A batch without targets, and none at all, are no mistake.
    trained.place(JobId(1), &[(0, own)]).expect("it fits");
    let segment = TrainSegment { job: Some(JobId(1)), tokens: &[1, 2], targets: &[None, None] };
    let found = trained.gradients(&[segment]).expect("a batch");
    assert_eq!((found.losses[0].nats.to_bits(), found.losses[0].targets), (0, 0));
    assert!(gradient_vectors(&found.jobs[0].layers[0]).into_iter().flatten().all(|number| *number == 0.0));
    assert_eq!(trained.gradients(&[]).expect("an empty batch"), BatchGradients::default());
}
