//! Whole steps of training on request, beside another program's in one run: `benches/peers/torch_train.py` starts it and asks.
//!
//! `cargo bench -p flora-model --bench training_steps -- MODEL [stored|f32|int8]`. It greets with a line of JSON and answers each line
//! `{"kind": "lora", "jobs": 8, "sequences": 1}` with a step of as many jobs, each of as many sequences of 128 tokens: losses and
//! gradients, the way back to parameters, AdamW, and the new adapters in their places. Adapters are of rank 16, of queries and keys.

use std::cell::RefCell;
use std::collections::BTreeMap;
use std::io::{BufRead, Write};
use std::path::Path;
use std::rc::Rc;
use std::sync::Arc;
use std::time::Instant;

use flora_adapters::{BaseForm, Layers};
use flora_checkpoint::{AdapterRequest, Model};
use flora_ir::algebra::FoldedAdapter;
use flora_model::{TrainError, TrainOptions, TrainedModel};
use flora_train::data::{Document, Excess};
use flora_train::{
    AdamW, BatchGradients, Dataset, Decay, Evaluation, Happened, JobId, JobOptions, Length, NewJob, Places,
    SegmentLoss, Start, TargetLayer, TrainSegment, Trainee, Trainer, Warmup,
};
use serde::{Deserialize, Serialize};

const LENGTH: usize = 128;
const RANK: usize = 16;

/// One of several trainees that share a base: its jobs have numbers from `first` on.
struct Shared {
    model: Rc<RefCell<TrainedModel>>,
    layers: Vec<TargetLayer>,
    first: u32,
}

impl Shared {
    fn of(&self, job: JobId) -> JobId {
        JobId(self.first + job.0)
    }

    fn segments<'a>(&self, batch: &[TrainSegment<'a>]) -> Vec<TrainSegment<'a>> {
        batch.iter().map(|segment| TrainSegment { job: segment.job.map(|job| self.of(job)), ..*segment }).collect()
    }
}

impl Trainee for Shared {
    type Error = TrainError;

    fn layers(&self) -> &[TargetLayer] {
        &self.layers
    }

    fn base_weight(&self, layer: usize) -> Result<Vec<f32>, TrainError> {
        self.model.borrow().base_weight(layer)
    }

    fn identity(&self) -> Result<String, TrainError> {
        self.model.borrow().identity()
    }

    fn place(&mut self, job: JobId, layers: &[(usize, FoldedAdapter)]) -> Result<(), TrainError> {
        self.model.borrow_mut().place(self.of(job), layers)
    }

    fn remove(&mut self, job: JobId) {
        self.model.borrow_mut().remove(self.of(job));
    }

    fn gradients(&mut self, batch: &[TrainSegment<'_>]) -> Result<BatchGradients, TrainError> {
        let mut found = self.model.borrow_mut().gradients(&self.segments(batch))?;
        found.jobs.iter_mut().for_each(|gradients| gradients.job.0 -= self.first);
        Ok(found)
    }

    fn losses(&mut self, batch: &[TrainSegment<'_>]) -> Result<Vec<SegmentLoss>, TrainError> {
        self.model.borrow_mut().losses(&self.segments(batch))
    }
}

#[derive(Clone, Debug, PartialEq, Eq, PartialOrd, Ord, Deserialize)]
#[serde(deny_unknown_fields)]
struct Request {
    kind: String,
    jobs: usize,
    sequences: usize,
}

#[derive(Serialize)]
struct Answer {
    seconds: f64,
    /// In nats a target, of each job before the step.
    losses: Vec<f64>,
    /// The most memory that the process has had.
    peak_bytes: Option<u64>,
}

/// Sequence `number`, one token longer than what goes in. The other program makes the same.
fn tokens(number: usize) -> impl Iterator<Item = u32> {
    (0..=LENGTH).map(move |at| ((at * 37 + number * 1009 + 7) % 49_000) as u32)
}

fn job(request: &Request, number: usize) -> NewJob {
    let documents = (0..request.sequences).map(|sequence| {
        let mut document = Document::new(Excess::Dropped);
        document.push(tokens(number * request.sequences + sequence), true);
        document
    });
    let rank = (request.kind != "ia3").then_some(RANK);
    let adapter = AdapterRequest {
        layer: request.kind.clone(),
        rank,
        // A scale of 1 where there is one.
        alpha: (request.kind == "lora").then_some(RANK as f64),
        targets: ["q_proj", "k_proj"].map(str::to_owned).to_vec(),
        options: serde_json::Map::new(),
    };
    let options = JobOptions {
        name: format!("job {number}"),
        adapter,
        start: Start::Default,
        seed: number as u64,
        learning_rate: 1e-3,
        decay: Decay::Constant,
        warmup: Warmup::Steps(0),
        length: Length::Steps(1 << 40),
        sequence_length: LENGTH,
        batch: request.sequences,
        accumulation: 1,
        optimizer: AdamW::default(),
        largest_norm: None,
        evaluation: Evaluation { every: 1 << 40, patience: None, least_gain: 0.0 },
        save_every: None,
    };
    let data = Dataset::new(&documents.collect::<Vec<_>>(), LENGTH).expect("sequences");
    NewJob { options, data: Arc::new(data), held_out: None, begin: None, places: Places::default() }
}

/// The peak of the process's memory, where the system tells.
fn peak_bytes() -> Option<u64> {
    let status = std::fs::read_to_string("/proc/self/status").ok()?;
    let line = status.lines().find_map(|line| line.strip_prefix("VmHWM:"))?;
    Some(line.trim().strip_suffix("kB")?.trim().parse::<u64>().ok()? << 10)
}

fn main() {
    // Cargo adds an argument of its own.
    let arguments: Vec<String> = std::env::args().skip(1).filter(|argument| argument != "--bench").collect();
    let Some(path) = arguments.first() else {
        println!("NOT RUN: it answers benches/peers/torch_train.py; the first argument is a model");
        return;
    };
    let base = match arguments.get(1).map(String::as_str) {
        None | Some("stored") => BaseForm::Stored,
        Some("f32") => BaseForm::F32,
        Some("int8") => BaseForm::Int8,
        Some(other) => panic!("`{other}` is no form of a base: stored, f32 or int8"),
    };
    let layers = Layers::builtin().expect("the built-in kinds");
    let model = Model::open(Path::new(path)).expect("a model");
    let device = flora_devices::host();
    let options = TrainOptions { base, ..TrainOptions::default() };
    let model = Rc::new(RefCell::new(TrainedModel::load(&device, &model, options).expect("a decoder")));
    let targets = model.borrow().layers().to_vec();
    let mut trainers = BTreeMap::<Request, Trainer<Shared>>::new();
    let mut first = 0;
    println!("{}", serde_json::json!({ "device": device.info().name }));
    for line in std::io::stdin().lock().lines() {
        let request: Request = serde_json::from_str(&line.expect("a line")).expect("a request");
        let trainer = trainers.entry(request.clone()).or_insert_with(|| {
            let shared = Shared { model: Rc::clone(&model), layers: targets.clone(), first };
            first += request.jobs as u32;
            let mut trainer = Trainer::new(shared, request.jobs * request.sequences * LENGTH);
            for number in 0..request.jobs {
                trainer.add(job(&request, number), Path::new("training_steps.rs"), &layers).expect("a job");
            }
            trainer
        });
        let start = Instant::now();
        let events = trainer.step();
        let seconds = start.elapsed().as_secs_f64();
        let losses: Vec<f64> = events
            .into_iter()
            .map(|event| match event.what {
                Happened::Step { loss, .. } => loss,
                other => panic!("{}: {other:?}", event.job),
            })
            .collect();
        assert_eq!(losses.len(), request.jobs, "all jobs share a batch");
        let answer = Answer { seconds, losses, peak_bytes: peak_bytes() };
        println!("{}", serde_json::to_string(&answer).expect("JSON"));
        std::io::stdout().flush().expect("a reader");
    }
}
