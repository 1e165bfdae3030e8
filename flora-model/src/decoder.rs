//! A model on a device as the engine drives it: sequences with their keys and values, resident adapters, one batch a step.

use std::collections::BTreeMap;

use flora_checkpoint::Model;
use flora_engine::{AdapterFailure, AdapterId, Decoder, DecoderLimits, PlaceError, SequenceId, StepSegment};
use flora_plan::layer::Element;
use flora_runtime::{Device, PlannedProjection, ProjectionError, StepBatch};
use rustc_hash::FxHashMap;

use crate::block::Step;
use crate::build::{Parts, build};
use crate::error::ServeError;
use crate::operations::{Operations, SegmentRows};
use crate::options::ServeOptions;
use crate::source::PreparedAdapter;

/// A model on a device.
pub(crate) struct ServedModel<O: Operations> {
    device: Device,
    parts: Parts<O>,
    activations: Element,
    sequences: FxHashMap<SequenceId, Sequence<O>>,
    adapters: Positions,
}

/// What is kept of one sequence.
struct Sequence<O: Operations> {
    /// Tokens whose keys and values are there.
    length: usize,
    /// One a block.
    layers: Vec<O::Cache>,
}

/// Where the resident adapters are in the tables of the projections: at the same position in all.
#[derive(Default)]
struct Positions {
    of: FxHashMap<AdapterId, u32>,
    free: Vec<u32>,
}

impl Positions {
    /// A free position; not taken yet. The base has 0.
    fn next(&self) -> u32 {
        self.free.last().copied().unwrap_or(self.of.len() as u32 + 1)
    }

    fn take(&mut self, adapter: AdapterId, position: u32) {
        self.free.retain(|free| *free != position);
        self.of.insert(adapter, position);
    }

    fn give_back(&mut self, adapter: AdapterId) -> Option<u32> {
        let position = self.of.remove(&adapter)?;
        self.free.push(position);
        Some(position)
    }
}

impl<O: Operations> ServedModel<O> {
    /// Puts a model on a device.
    ///
    /// # Errors
    /// Files that aren't a decoder's, a device that can't hold it.
    pub(crate) fn load(device: &Device, model: &Model, options: &ServeOptions<'_>) -> Result<Self, ServeError> {
        let parts = build::<O>(device, model, options)?;
        reserve(&parts.adapted, options)?;
        Ok(Self {
            device: device.clone(),
            parts,
            activations: options.activations,
            sequences: FxHashMap::default(),
            adapters: Positions::default(),
        })
    }

    /// The caches of the segments' sequences, taken out of the model: they come back when the step is done, and are gone where it
    /// failed.
    fn take_sequences(&mut self, segments: &[StepSegment<'_>]) -> Result<Vec<Sequence<O>>, ServeError> {
        let (blocks, operations) = (self.parts.blocks.len(), &self.parts.operations);
        let take = |segment: &StepSegment<'_>| {
            if segment.tokens.is_empty() {
                return Err(ServeError::Step(format!("no token of the sequence {}", segment.sequence.0)));
            }
            let held = self.sequences.remove(&segment.sequence);
            let new = || Sequence { length: 0, layers: (0..blocks).map(|_| operations.cache()).collect() };
            let sequence = held.unwrap_or_else(new);
            if sequence.length != segment.first_position as usize {
                let found = segment.first_position;
                return Err(ServeError::Step(format!(
                    "position {found} of a sequence that has {} tokens",
                    sequence.length
                )));
            }
            let end = sequence.length + segment.tokens.len();
            if end > self.parts.context_length {
                let limit = self.parts.context_length;
                return Err(ServeError::Step(format!("position {end} of a model that knows {limit}")));
            }
            Ok(sequence)
        };
        segments.iter().map(take).collect()
    }

    /// The adapters of the segments by their positions.
    fn batch(&self, segments: &[StepSegment<'_>]) -> Result<StepBatch, ServeError> {
        let position = |segment: &StepSegment<'_>| match segment.adapter {
            None => Ok((0, segment.tokens.len() as u32)),
            Some(adapter) => match self.adapters.of.get(&adapter) {
                Some(position) => Ok((*position, segment.tokens.len() as u32)),
                None => Err(ServeError::Step(format!("the adapter {}, which isn't resident", adapter.0))),
            },
        };
        Ok(StepBatch::new(segments.iter().map(position).collect::<Result<Vec<_>, _>>()?))
    }

    fn run(&self, segments: &[StepSegment<'_>], sequences: &mut [Sequence<O>]) -> Result<Vec<f32>, ServeError> {
        let batch = self.batch(segments)?;
        let tokens: Vec<_> = segments.iter().flat_map(|segment| segment.tokens).map(|token| *token as usize).collect();
        if let Some(token) = tokens.iter().find(|token| **token >= self.parts.vocabulary) {
            return Err(ServeError::Step(format!("the token {token} of a vocabulary of {}", self.parts.vocabulary)));
        }
        let mut positions = Vec::with_capacity(tokens.len());
        let mut rows = Vec::with_capacity(segments.len());
        let mut last_rows = Vec::with_capacity(segments.len());
        for segment in segments {
            let first_row = positions.len();
            let own = SegmentRows {
                rows: first_row..first_row + segment.tokens.len(),
                first_position: segment.first_position as usize,
                prompt_rows: (segment.prompt_tokens as usize).min(segment.tokens.len()),
            };
            positions.extend(own.positions());
            rows.push(own);
            if segment.wants_logits {
                last_rows.push(positions.len() - 1);
            }
        }
        let operations = &self.parts.operations;
        let step = Step { operations, batch: &batch, segments: &rows, positions: operations.positions(&rows)? };
        let embedded = self.parts.embedding.rows(&tokens, &positions)?;
        let mut x = self.device.upload_as(&embedded, self.activations)?;
        for (at, block) in self.parts.blocks.iter().enumerate() {
            let mut caches: Vec<_> = sequences.iter_mut().filter_map(|sequence| sequence.layers.get_mut(at)).collect();
            x = block.forward(&x, &step, &mut caches)?;
        }
        if last_rows.is_empty() {
            return Ok(Vec::new());
        }
        let last = operations.select(&x, tokens.len(), &last_rows)?;
        let normed = operations.normalise(&self.parts.norm, &last)?;
        let logits = self.parts.output.forward(&normed, &StepBatch::new([(0, last_rows.len() as u32)]), None)?;
        Ok(self.device.read(&logits)?)
    }
}

/// The same number of vectors for every projection: an adapter adapts all of its kind in most cases.
fn reserve(adapted: &BTreeMap<String, PlannedProjection>, options: &ServeOptions<'_>) -> Result<(), ServeError> {
    let width = |linear: &PlannedProjection| u64::from(linear.shape().d) + u64::from(linear.shape().k);
    let one_each = adapted.values().map(width).sum::<u64>() * options.adapters.bytes();
    let slots = options.adapter_bytes.checked_div(one_each).unwrap_or(0);
    let slots = u32::try_from(slots).unwrap_or(u32::MAX).max(1);
    for linear in adapted.values() {
        linear.change(|projection| projection.reserve(slots, slots))?;
    }
    Ok(())
}

impl<O: Operations> Decoder for ServedModel<O> {
    type Prepared = PreparedAdapter;
    type Error = ServeError;

    fn limits(&self) -> DecoderLimits {
        DecoderLimits {
            vocabulary: self.parts.vocabulary as u32,
            context_length: self.parts.context_length as u32,
            cache_bytes_per_token: self.parts.blocks.len() as u64 * self.parts.operations.cache_bytes_per_token(),
        }
    }

    fn step(&mut self, segments: &[StepSegment<'_>]) -> Result<Vec<f32>, ServeError> {
        let mut sequences = self.take_sequences(segments)?;
        let logits = O::run(|| self.run(segments, &mut sequences))?;
        for (segment, mut sequence) in segments.iter().zip(sequences) {
            sequence.length += segment.tokens.len();
            self.sequences.insert(segment.sequence, sequence);
        }
        Ok(logits)
    }

    fn release(&mut self, sequence: SequenceId) {
        self.sequences.remove(&sequence);
    }

    fn place(&mut self, adapter: AdapterId, prepared: PreparedAdapter) -> Result<(), PlaceError<PreparedAdapter>> {
        let unfit =
            |reason: String| PlaceError::Unfit(AdapterFailure::Unusable { name: prepared.name.clone(), reason });
        if let Some(path) = prepared.modules.keys().find(|path| !self.parts.adapted.contains_key(*path)) {
            return Err(unfit(format!("it adapts `{path}`, and this model was loaded to have other modules adapted")));
        }
        let position = self.adapters.next();
        for (path, folded) in &prepared.modules {
            let linear = &self.parts.adapted[path];
            let Err(error) = linear.change(|projection| projection.place(position, folded)) else { continue };
            for linear in self.parts.adapted.values() {
                linear.change(|projection| projection.remove(position));
            }
            return Err(match error {
                ProjectionError::PoolFull { .. } if !self.adapters.of.is_empty() => PlaceError::Full(prepared),
                ProjectionError::PoolFull { .. } => {
                    unfit(format!("it is larger than the device's memory for adapters: {error}"))
                }
                other => unfit(other.to_string()),
            });
        }
        self.adapters.take(adapter, position);
        Ok(())
    }

    fn remove(&mut self, adapter: AdapterId) {
        if let Some(position) = self.adapters.give_back(adapter) {
            for linear in self.parts.adapted.values() {
                linear.change(|projection| projection.remove(position));
            }
        }
    }
}
