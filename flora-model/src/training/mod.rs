//! Decoders in training, on the host: losses and gradients of a batch of segments of many jobs over one frozen base, in whatever form
//! the base is kept.
//!
//! ```text
//! segments ──embed──▶ x ──block──▶ x … ──rows with targets──▶ norm ──output, some rows at a time──▶ losses, g
//!                         │                                                                          │
//!                        tape ◀──────────────── backward, block by block ◀───────────────────────────┘
//! ```
//!
//! The decoder is the one that serves: its operations are recorded as they run (`recorder`), and the backward pass goes over the
//! records (`tape`). Blocks whose records don't fit the memory for them are computed again when the backward pass comes to
//! them, to the same bits.

mod batch;
mod error;
mod output;
mod recorder;
mod scores;
mod tape;

use std::sync::{Mutex, PoisonError};

use flora_adapters::BaseForm;
use flora_checkpoint::Model;
use flora_ir::algebra::FoldedAdapter;
use flora_plan::layer::Element;
use flora_runtime::{Buffer, Device, PlannedProjection};
use flora_train::{BatchGradients, JobGradients, JobId, SegmentLoss, TargetLayer, TrainSegment, Trainee};
use rustc_hash::FxHashMap;

use crate::block::Step;
use crate::build::{OUTPUT, Parts, build};
use crate::operations::Operations;
use crate::options::ServeOptions;
use crate::training::batch::Rows;
use crate::training::output::{Beside, RowLosses};
use crate::training::recorder::{Recorded, Recorder};
use crate::training::tape::{AdapterGradients, Place, Tape, buffer};

pub use error::TrainError;
pub use scores::TargetScore;

/// How a model is trained.
#[derive(Clone, Copy, Debug)]
pub struct TrainOptions {
    /// The form of base weights.
    pub base: BaseForm,
    /// The most bytes of intermediate results that are kept for the backward pass. Blocks whose results have no room are computed
    /// again: 0 keeps the inputs of blocks alone. Which it is changes no bit of a result.
    pub activation_bytes: u64,
}

impl Default for TrainOptions {
    fn default() -> Self {
        Self { base: BaseForm::Stored, activation_bytes: 1 << 30 }
    }
}

/// A model with jobs' adapters, on the host.
pub struct TrainedModel {
    device: Device,
    /// Its files, in which the base weights are.
    model: Model,
    parts: Parts<Recorder>,
    layers: Vec<TargetLayer>,
    /// Of each layer.
    projections: Vec<PlannedProjection>,
    jobs: FxHashMap<JobId, Job>,
    free: Vec<u32>,
    base: BaseForm,
    activation_bytes: u64,
}

/// What is kept of a job, beside what the projections hold.
#[derive(Clone, Debug)]
struct Job {
    /// Where its adapters are in the tables of the projections. The base has 0.
    position: u32,
    layers: Vec<usize>,
}

/// What is kept of a block for the backward pass.
enum Pass {
    /// Nothing: neither its input nor anything in it is trained.
    Frozen,
    Kept(Recording),
    /// Its input, and whether that's gradient is wanted.
    Again(Buffer, bool),
}

/// The tape of a block, and where its result is.
struct Recording {
    tape: Tape,
    last: Place,
}

impl TrainedModel {
    /// Puts a model on the host, to train adapters for it.
    ///
    /// # Errors
    /// Files that aren't a decoder's, another device than the host, a weight that can't be had in the form that is asked for.
    pub fn load(device: &Device, model: &Model, options: TrainOptions) -> Result<Self, TrainError> {
        let serve = ServeOptions { base: options.base, activations: Element::F32, ..ServeOptions::default() };
        let parts = build::<Recorder>(device, model, &serve)?;
        let known = model.projections().iter().filter_map(|projection| {
            let linear = parts.adapted.get(&projection.path).filter(|_| projection.path != OUTPUT)?;
            let (path, has_bias) = (projection.path.clone(), projection.has_bias);
            Some((TargetLayer { path, shape: linear.shape(), has_bias }, linear.clone()))
        });
        let (layers, projections) = known.unzip();
        let (jobs, free) = (FxHashMap::default(), Vec::new());
        Ok(Self {
            device: device.clone(),
            model: model.clone(),
            layers,
            projections,
            jobs,
            free,
            base: options.base,
            activation_bytes: options.activation_bytes,
            parts,
        })
    }

    /// What the rows with targets give, and the gradients of the jobs where those are wanted.
    fn run(
        &self,
        batch: &[TrainSegment<'_>],
        beside: Beside,
    ) -> Result<(Rows, RowLosses, Vec<JobGradients>), TrainError> {
        let wants_gradients = beside == Beside::Gradient;
        let rows = self.rows(batch)?;
        let recorder = &self.parts.operations;
        let step = Step {
            operations: recorder,
            batch: &rows.batch,
            segments: &rows.segments,
            positions: recorder.positions(&rows.segments)?,
        };
        let mut x = Recorded { buffer: buffer(&self.device, self.embed(batch, &rows)?)?, place: None };
        let mut passes = Vec::new();
        let mut room = self.activation_bytes;
        for block in &self.parts.blocks {
            if wants_gradients {
                let (input, is_wanted) = (x.buffer.clone(), x.place.is_some());
                let (output, tape) = recorder.record(x, |x| block.forward(x, &step, &mut []))?;
                passes.push(match output.place {
                    None => Pass::Frozen,
                    Some(last) => match room.checked_sub(tape.bytes()) {
                        None => Pass::Again(input, is_wanted),
                        Some(rest) => {
                            room = rest;
                            Pass::Kept(Recording { tape, last })
                        }
                    },
                });
                x = output;
            } else {
                x = block.forward(&x, &step, &mut [])?;
            }
        }

        let beside = if wants_gradients && x.place.is_none() { Beside::Nothing } else { beside };
        let (normed, tape) = recorder.record(x, |x| {
            let selected = recorder.select(x, rows.batch.rows(), &rows.selected)?;
            recorder.normalise(&self.parts.norm, &selected)
        })?;
        let host = &recorder.host;
        let mut found = output::losses(host, &self.parts.output, &normed.buffer, &rows.targets, beside)?;
        let mut adapters = AdapterGradients::default();
        if let Some(last) = normed.place {
            let g = tape.backward(host, &rows.batch, (last, std::mem::take(&mut found.g)), &mut adapters)?;
            self.backward(passes, &step, g, &mut adapters)?;
        }
        let jobs = if wants_gradients { self.collect(batch, &mut adapters)? } else { Vec::new() };
        Ok((rows, found, jobs))
    }

    /// The backward pass through the blocks, from the last to the first in which something is trained.
    fn backward(
        &self,
        passes: Vec<Pass>,
        step: &Step<'_, Recorder>,
        mut g: Option<Vec<f32>>,
        adapters: &mut AdapterGradients,
    ) -> Result<(), TrainError> {
        let recorder = &self.parts.operations;
        for (block, pass) in self.parts.blocks.iter().zip(passes).rev() {
            let Some(of_output) = g else { return Ok(()) };
            let recording = match pass {
                Pass::Frozen => return Ok(()),
                Pass::Kept(recording) => recording,
                Pass::Again(buffer, is_wanted) => {
                    let input = Recorded { buffer, place: is_wanted.then_some(Place::GIVEN) };
                    let (output, tape) = recorder.record(input, |x| block.forward(x, step, &mut []))?;
                    let Some(last) = output.place else { return Ok(()) };
                    Recording { tape, last }
                }
            };
            let Recording { tape, last } = recording;
            g = tape.backward(&recorder.host, step.batch, (last, of_output), adapters)?;
        }
        Ok(())
    }

    /// The first numbers of the rows, `[rows, d]`.
    fn embed(&self, batch: &[TrainSegment<'_>], rows: &Rows) -> Result<Vec<f32>, TrainError> {
        let tokens: Vec<_> = batch.iter().flat_map(|segment| segment.tokens).map(|token| *token as usize).collect();
        let positions: Vec<_> = rows.segments.iter().flat_map(|segment| segment.positions()).collect();
        let mut embedded = self.parts.embedding.rows(None, &tokens)?;
        self.parts.embedding.add_positions(&mut embedded, &positions)?;
        Ok(embedded)
    }

    /// The gradients of the jobs in a batch, in the order of their first segments.
    fn collect(
        &self,
        batch: &[TrainSegment<'_>],
        adapters: &mut AdapterGradients,
    ) -> Result<Vec<JobGradients>, TrainError> {
        let mut jobs: Vec<JobGradients> = Vec::new();
        for id in batch.iter().filter_map(|segment| segment.job) {
            let Some(job) = self.jobs.get(&id).filter(|_| jobs.iter().all(|known| known.job != id)) else { continue };
            let gradient = |layer: &usize| {
                let path = self.layers[*layer].path.as_str();
                let found = adapters.remove(&(path.into(), job.position));
                found.ok_or_else(|| TrainError::NoGradient(path.to_owned()))
            };
            let layers = job.layers.iter().map(gradient).collect::<Result<_, _>>()?;
            jobs.push(JobGradients { job: id, layers });
        }
        Ok(jobs)
    }

    /// Puts a job's adapters at a position of the tables. Where that fails, some of them may be there.
    fn put(&self, job: JobId, position: u32, layers: &[(usize, FoldedAdapter)]) -> Result<(), TrainError> {
        for (at, (index, folded)) in layers.iter().enumerate() {
            let unknown = || TrainError::UnknownLayer { job, index: *index, layers: self.layers.len() };
            let projection = self.projections.get(*index).ok_or_else(unknown)?;
            let path = || self.layers[*index].path.clone();
            if layers[..at].iter().any(|(before, _)| before == index) {
                return Err(TrainError::Twice { job, path: path() });
            }
            let placed = projection.change(|projection| {
                let (in_slots, out_slots) = projection.slots_with(folded);
                projection.reserve(in_slots, out_slots)?;
                projection.place(position, folded)
            });
            placed.map_err(|source| TrainError::Place { job, path: path(), source: Box::new(source) })?;
        }
        Ok(())
    }
}

/// What `step` gives, on the first thread of the pool. An allocator keeps for a thread what that gave back, so the results of steps on
/// any thread would be in memory as often as there are threads.
fn on_first_thread<R: Send>(step: impl FnOnce() -> R + Send) -> R {
    let (step, result) = (Mutex::new(Some(step)), Mutex::new(None));
    rayon::broadcast(|context| {
        let own = if context.index() == 0 { take(&step) } else { None };
        if let Some(step) = own {
            let made = step();
            *result.lock().unwrap_or_else(PoisonError::into_inner) = Some(made);
        }
    });
    take(&result).expect("a pool has a first thread")
}

fn take<T>(from: &Mutex<Option<T>>) -> Option<T> {
    from.lock().unwrap_or_else(PoisonError::into_inner).take()
}

impl Trainee for TrainedModel {
    type Error = TrainError;

    fn layers(&self) -> &[TargetLayer] {
        &self.layers
    }

    fn base_weight(&self, layer: usize) -> Result<Vec<f32>, TrainError> {
        let unknown = TrainError::NoLayer { index: layer, layers: self.layers.len() };
        Ok(self.base.weight(&self.model, &self.layers.get(layer).ok_or(unknown)?.path)?.values)
    }

    fn identity(&self) -> Result<String, TrainError> {
        let base = match self.base {
            BaseForm::Stored => "stored",
            BaseForm::F32 => "f32",
            BaseForm::Int8 => "int8",
        };
        Ok(format!("{} in {base}", self.model.digest()?))
    }

    fn place(&mut self, job: JobId, layers: &[(usize, FoldedAdapter)]) -> Result<(), TrainError> {
        self.remove(job);
        let position = self.free.pop().unwrap_or(self.jobs.len() as u32 + 1);
        let placed = self.put(job, position, layers);
        let layers = layers.iter().map(|(layer, _)| *layer).filter(|layer| *layer < self.layers.len()).collect();
        self.jobs.insert(job, Job { position, layers });
        if placed.is_err() {
            self.remove(job);
        }
        placed
    }

    fn remove(&mut self, job: JobId) {
        let Some(Job { position, layers }) = self.jobs.remove(&job) else { return };
        for layer in layers {
            self.projections[layer].change(|projection| projection.remove(position));
        }
        self.free.push(position);
    }

    fn gradients(&mut self, batch: &[TrainSegment<'_>]) -> Result<BatchGradients, TrainError> {
        let this = &*self;
        on_first_thread(|| {
            let (rows, found, jobs) = this.run(batch, Beside::Gradient)?;
            Ok(BatchGradients { losses: rows.losses(&found.nats), jobs })
        })
    }

    fn losses(&mut self, batch: &[TrainSegment<'_>]) -> Result<Vec<SegmentLoss>, TrainError> {
        let this = &*self;
        on_first_thread(|| {
            let (rows, found, _) = this.run(batch, Beside::Nothing)?;
            Ok(rows.losses(&found.nats))
        })
    }
}
