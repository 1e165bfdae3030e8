//! A model on a device as the engine drives it: sequences with their keys and values, resident adapters, one batch a step.

use flora_adapters::{AdaptedEmbedding, AdaptedModel};
use flora_checkpoint::Model;
use flora_engine::phases::{EMBEDDING, NORMS, OUTPUT};
use flora_engine::{
    AdapterFailure, AdapterId, BlockId, BlockSharing, Decoder, DecoderLimits, PlaceError, SequenceId, StepSegment,
};
use flora_plan::layer::Element;
use flora_runtime::{Buffer, Device, DeviceError, ProjectionError, RowGates, StepBatch};
use rustc_hash::FxHashMap;
use tracing::trace_span;

use crate::block::Step;
use crate::build::{Parts, build};
use crate::error::ServeError;
use crate::head::OwnHead;
use crate::memory::make_room;
use crate::mixture::ResidentGates;
use crate::operations::{SegmentRows, Serving};
use crate::options::ServeOptions;
use crate::shared::LayerBlocks;
use crate::source::PreparedAdapter;

/// A model on a device.
pub(crate) struct ServedModel<O: Serving> {
    pub(crate) device: Device,
    pub(crate) parts: Parts<O>,
    activations: Element,
    pub(crate) sequences: FxHashMap<SequenceId, Sequence<O>>,
    /// What several of them may have.
    pub(crate) shared: FxHashMap<BlockId, LayerBlocks<O>>,
    adapters: Residents,
    /// The most that they may take.
    adapter_bytes: u64,
    /// The name of the one whose weights are kept.
    merged: Option<String>,
}

/// A row whose logits are wanted.
#[derive(Clone, Copy)]
pub(crate) struct WantedRow {
    /// Of the batch.
    row: usize,
    /// The segment that it is of.
    segment: usize,
}

/// The rows whose logits segments want: the last ones of each.
pub(crate) fn wanted(segments: &[StepSegment<'_>]) -> Vec<WantedRow> {
    let mut wanted = Vec::with_capacity(segments.len());
    let mut end = 0;
    for (segment, StepSegment { tokens, logits, .. }) in segments.iter().enumerate() {
        end += tokens.len();
        wanted.extend((end - logits.of(tokens.len())..end).map(|row| WantedRow { row, segment }));
    }
    wanted
}

/// What is kept of one sequence.
pub(crate) struct Sequence<O: Serving> {
    /// Tokens whose keys and values are there.
    pub(crate) length: usize,
    /// One a block; behind them as many of the base model, where its adapter is gated.
    pub(crate) layers: Vec<O::Cache>,
}

/// The resident adapters.
#[derive(Default)]
struct Residents {
    of: FxHashMap<AdapterId, Resident>,
    free: Vec<u32>,
}

/// What is kept of one adapter, beside what the pools of the projections hold.
pub(crate) struct Resident {
    /// Where it is in the tables of the projections: at the same position in all.
    position: u32,
    embedding: Option<AdaptedEmbedding>,
    head: Option<OwnHead>,
    /// What weighs its parts for each token.
    pub(crate) gates: Option<ResidentGates>,
}

impl Residents {
    /// A free position; not taken yet. The base has 0.
    fn next(&self) -> u32 {
        self.free.last().copied().unwrap_or(self.of.len() as u32 + 1)
    }

    fn take(&mut self, adapter: AdapterId, resident: Resident) {
        self.free.retain(|free| *free != resident.position);
        self.of.insert(adapter, resident);
    }

    fn give_back(&mut self, adapter: AdapterId) -> Option<u32> {
        let position = self.of.remove(&adapter)?.position;
        self.free.push(position);
        Some(position)
    }

    /// Bytes of output matrices and classifiers of their own.
    fn own_bytes(&self) -> u64 {
        self.of.values().map(|resident| own_bytes(resident.head.as_ref(), resident.gates.as_ref())).sum()
    }
}

fn own_bytes(head: Option<&OwnHead>, gates: Option<&ResidentGates>) -> u64 {
    head.map_or(0, OwnHead::bytes) + gates.map_or(0, ResidentGates::bytes)
}

/// Why an adapter isn't placed.
enum PlaceFault {
    /// There is no room.
    Full,
    Other(String),
}

impl From<ProjectionError> for PlaceFault {
    fn from(error: ProjectionError) -> Self {
        match error {
            ProjectionError::PoolFull { .. } | ProjectionError::Device(DeviceError::BufferTooLarge { .. }) => {
                Self::Full
            }
            other => Self::Other(other.to_string()),
        }
    }
}

impl<O: Serving> ServedModel<O> {
    /// Puts a model on a device.
    ///
    /// # Errors
    /// Files that aren't a decoder's, a device that can't hold it.
    pub(crate) fn load(device: &Device, model: &Model, options: &ServeOptions<'_>) -> Result<Self, ServeError> {
        let parts = build::<O>(device, model, options)?;
        Ok(Self {
            device: device.clone(),
            parts,
            activations: options.activations,
            sequences: FxHashMap::default(),
            shared: FxHashMap::default(),
            adapters: Residents::default(),
            adapter_bytes: options.adapter_bytes,
            merged: options.merged.clone(),
        })
    }

    /// The caches of the segments' sequences, taken out of the model: they come back when the step is done, and are gone where it
    /// failed.
    fn take_sequences(&mut self, segments: &[StepSegment<'_>]) -> Result<Vec<Sequence<O>>, ServeError> {
        let take = |segment: &StepSegment<'_>| {
            let (blocks, operations) = (self.parts.blocks.len(), &self.parts.operations);
            if segment.tokens.is_empty() {
                return Err(ServeError::Step(format!("no token of the sequence {}", segment.sequence.0)));
            }
            let caches = blocks * if self.gates(segment.adapter).is_some() { 2 } else { 1 };
            let held = self.sequences.remove(&segment.sequence);
            let new = || {
                let layers = (0..caches).map(|at| operations.cache(at)).collect::<Result<_, _>>()?;
                Ok::<_, ServeError>(Sequence { length: 0, layers })
            };
            let sequence = held.map_or_else(new, Ok)?;
            if sequence.layers.len() != caches {
                return Err(ServeError::Step(
                    "a gated adapter for some tokens of a sequence, and another for others".to_owned(),
                ));
            }
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

    /// The adapters of the segments by their positions, with so many rows each.
    fn batch(
        &self,
        segments: &[StepSegment<'_>],
        rows: impl Fn(&StepSegment<'_>) -> usize,
    ) -> Result<StepBatch, ServeError> {
        let position = |segment: &StepSegment<'_>| match segment.adapter {
            None => Ok((0, rows(segment) as u32)),
            Some(adapter) => match self.adapters.of.get(&adapter) {
                Some(resident) => Ok((resident.position, rows(segment) as u32)),
                None => Err(ServeError::Step(format!("the adapter {}, which isn't resident", adapter.0))),
            },
        };
        Ok(StepBatch::new(segments.iter().map(position).collect::<Result<Vec<_>, _>>()?))
    }

    fn run(&self, segments: &[StepSegment<'_>], sequences: &mut [Sequence<O>]) -> Result<Vec<f32>, ServeError> {
        if segments.iter().any(|segment| self.gates(segment.adapter).is_some()) {
            return self.run_gated(segments, sequences);
        }
        let mut caches: Vec<_> = sequences.iter_mut().map(|sequence| &mut sequence.layers[..]).collect();
        let wanted = wanted(segments);
        let x = self.forward(segments, &mut caches, Vec::new(), Some(&wanted))?;
        self.logits_of(segments, &wanted, &x)
    }

    /// One pass through the blocks: what comes out of the last, of all rows or of those that are wanted, `[rows, d]`. `caches` has one a
    /// block for each segment, `gates` those of rows whose adapters are gated.
    pub(crate) fn forward(
        &self,
        segments: &[StepSegment<'_>],
        caches: &mut [&mut [O::Cache]],
        gates: Vec<RowGates>,
        wanted: Option<&[WantedRow]>,
    ) -> Result<Buffer, ServeError> {
        let batch = self.batch(segments, |segment| segment.tokens.len())?.with_gates(gates);
        let mut positions = Vec::with_capacity(batch.rows());
        let mut rows = Vec::with_capacity(segments.len());
        for segment in segments {
            let first_row = positions.len();
            let own = SegmentRows {
                rows: first_row..first_row + segment.tokens.len(),
                first_position: segment.first_position as usize,
            };
            positions.extend(own.positions());
            rows.push(own);
        }
        let operations = &self.parts.operations;
        let step = Step { operations, batch: &batch, segments: &rows, positions: operations.positions(&rows)? };
        let embedded = trace_span!(EMBEDDING).in_scope(|| self.embed(segments, &positions))?;
        let mut x = self.device.upload_as(&embedded, self.activations)?;
        let fewer = wanted.filter(|wanted| wanted.len() < batch.rows());
        let last = self.parts.blocks.len().saturating_sub(1);
        for (at, block) in self.parts.blocks.iter().enumerate() {
            let mut caches: Vec<_> = caches.iter_mut().filter_map(|caches| caches.get_mut(at)).collect();
            x = match fewer.filter(|_| at == last) {
                None => block.forward(&x, &step, &mut caches)?,
                // Of the others the last block's keys and values alone are needed.
                Some(wanted) => {
                    let attended = block.attended(&x, &step, &mut caches)?;
                    let batch = self.batch(segments, |segment| segment.logits.of(segment.tokens.len()))?;
                    let of = step.batch.rows();
                    let (x, attended) = (self.rows_of(&x, of, wanted)?, self.rows_of(&attended, of, wanted)?);
                    if wanted.is_empty() { x } else { block.finish(operations, &x, &attended, &batch)? }
                }
            };
        }
        Ok(x)
    }

    /// Some rows of a batch's.
    pub(crate) fn rows_of(&self, x: &Buffer, of: usize, rows: &[WantedRow]) -> Result<Buffer, ServeError> {
        let rows: Vec<usize> = rows.iter().map(|wanted| wanted.row).collect();
        self.parts.operations.select(x, of, &rows)
    }

    /// The logits of what came out of the last block, of the rows that are wanted.
    pub(crate) fn logits_of(
        &self,
        segments: &[StepSegment<'_>],
        wanted: &[WantedRow],
        x: &Buffer,
    ) -> Result<Vec<f32>, ServeError> {
        if wanted.is_empty() {
            return Ok(Vec::new());
        }
        let adapters: Vec<_> = wanted.iter().map(|wanted| segments[wanted.segment].adapter).collect();
        let normed = trace_span!(NORMS).in_scope(|| self.parts.operations.normalise(&self.parts.norm, x))?;
        trace_span!(OUTPUT).in_scope(|| self.logits(&adapters, &normed))
    }
}

impl<O: Serving> ServedModel<O> {
    fn resident(&self, adapter: Option<AdapterId>) -> Option<&Resident> {
        self.adapters.of.get(&adapter?)
    }

    /// What weighs the parts of an adapter for each token.
    pub(crate) fn gates(&self, adapter: Option<AdapterId>) -> Option<&ResidentGates> {
        self.resident(adapter)?.gates.as_ref()
    }

    /// The first numbers of the rows, `[rows, d]`.
    fn embed(&self, segments: &[StepSegment<'_>], positions: &[usize]) -> Result<Vec<f32>, ServeError> {
        let mut embedded = Vec::new();
        for segment in segments {
            let tokens: Vec<usize> = segment.tokens.iter().map(|token| *token as usize).collect();
            let vocabulary = self.vocabulary(segment.adapter) as usize;
            if let Some(token) = tokens.iter().find(|token| **token >= vocabulary) {
                return Err(ServeError::Step(format!("the token {token} of a vocabulary of {vocabulary}")));
            }
            let adapted = self.resident(segment.adapter).and_then(|resident| resident.embedding.as_ref());
            embedded.extend(self.parts.embedding.rows(adapted, &tokens)?);
        }
        self.parts.embedding.add_positions(&mut embedded, positions)?;
        Ok(embedded)
    }

    /// The logits of rows x `[adapters.len(), d]`, each with its adapter.
    fn logits(&self, adapters: &[Option<AdapterId>], x: &Buffer) -> Result<Vec<f32>, ServeError> {
        let residents: Vec<_> = adapters.iter().map(|adapter| self.resident(*adapter)).collect();
        let head = |row: usize| residents[row].and_then(|resident| resident.head.as_ref());
        let select = |rows: &[usize]| match rows.len() == residents.len() {
            true => Ok(x.clone()),
            false => self.parts.operations.select(x, residents.len(), rows),
        };
        // All rows of the model's own output matrix are one batch, whoever else is in it.
        let (shared, own): (Vec<usize>, Vec<usize>) =
            (0..residents.len()).partition(|row| head(*row).is_none_or(|head| head.vocabulary().is_none()));
        let mut logits: Vec<Vec<f32>> = vec![Vec::new(); residents.len()];
        if !shared.is_empty() {
            let mut segments: Vec<(u32, u32)> = Vec::with_capacity(shared.len());
            for row in &shared {
                let position = residents[*row].map_or(0, |resident| resident.position);
                // Rows of one adapter that follow one another are one segment.
                match segments.last_mut() {
                    Some((last, count)) if *last == position => *count += 1,
                    _ => segments.push((position, 1)),
                }
            }
            let output = self.parts.output.forward(&select(&shared)?, &StepBatch::new(segments), None)?;
            let values = self.device.read(&output)?;
            if own.is_empty() && shared.iter().all(|row| head(*row).is_none()) {
                return Ok(values);
            }
            for (row, values) in shared.iter().zip(values.chunks_exact(self.parts.vocabulary)) {
                logits[*row] = values.to_vec();
            }
        }
        for (row, logits) in logits.iter_mut().enumerate() {
            if let Some(head) = head(row) {
                head.apply(&self.device, &select(&[row])?, logits)?;
            }
        }
        Ok(logits.concat())
    }

    /// Puts an adapter at a position of all tables. Where that fails, some of it may be there.
    fn try_place(&self, position: u32, prepared: &PreparedAdapter) -> Result<Resident, PlaceFault> {
        let AdaptedModel { modules, bias_offsets, embedding, head } = &prepared.adapted;
        // What adapts an output matrix of the adapter's own isn't in the model's.
        let own_head = head.as_ref().filter(|head| head.weight.is_some()).map(|head| head.path.as_str());
        let shared: Vec<_> = modules.iter().filter(|(path, _)| Some(path.as_str()) != own_head).collect();
        let head = head.as_ref().map(|head| {
            let folded = own_head.and_then(|path| modules.get(path));
            let offset = own_head.and_then(|path| bias_offsets.get(path)).map(Vec::as_slice);
            OwnHead::new(&self.parts.form, head, folded, offset).map_err(|error| PlaceFault::Other(error.to_string()))
        });
        let head = head.transpose()?;
        let gates = prepared.gates.as_ref().map(|gates| ResidentGates::new(&self.parts.form, gates));
        let gates = gates.transpose().map_err(|error| PlaceFault::Other(error.to_string()))?;
        let own = self.adapters.own_bytes() + own_bytes(head.as_ref(), gates.as_ref());
        let limit = self.adapter_bytes.checked_sub(own).ok_or(PlaceFault::Full)?;
        let projections = &self.parts.adapted;
        if !make_room(projections, &shared, limit, self.parts.form.adapters.bytes())? {
            return Err(PlaceFault::Full);
        }
        for (path, folded) in shared {
            projections[path].change(|projection| projection.place(position, folded))?;
        }
        for (path, offset) in bias_offsets.iter().filter(|(path, _)| Some(path.as_str()) != own_head) {
            projections[path]
                .change(|projection| projection.set_offset(position, offset))
                .map_err(|error| PlaceFault::Other(format!("`{path}`: {error}")))?;
        }
        for (path, set, ranks) in prepared.gates.iter().flat_map(|gates| gates.modules(&self.parts.order)) {
            projections[path].change(|projection| projection.set_gates(position, set, ranks))?;
        }
        if self.merged.as_ref() == Some(&prepared.name) {
            self.merge(position, prepared)?;
        }
        Ok(Resident { position, embedding: embedding.clone(), head, gates })
    }
}

impl<O: Serving> ServedModel<O> {
    /// Keeps the weights of an adapter that is placed, in place of those of the version before.
    fn merge(&self, position: u32, prepared: &PreparedAdapter) -> Result<(), PlaceFault> {
        prepared.check_mergeable().map_err(|error| PlaceFault::Other(error.to_string()))?;
        for path in prepared.merged_paths() {
            // However much the others take, this has no place among them.
            self.parts.adapted[path]
                .change(|projection| projection.merge_at(position))
                .map_err(|error| PlaceFault::Other(format!("its weight of `{path}` can't be kept: {error}")))?;
        }
        Ok(())
    }
}

impl<O: Serving> Decoder for ServedModel<O> {
    type Prepared = PreparedAdapter;
    type Error = ServeError;

    fn limits(&self) -> DecoderLimits {
        DecoderLimits {
            vocabulary: self.parts.vocabulary as u32,
            context_length: self.parts.context_length as u32,
            cache_bytes_per_token: self.parts.blocks.len() as u64 * self.parts.operations.cache_bytes_per_token(),
        }
    }

    fn vocabulary(&self, adapter: Option<AdapterId>) -> u32 {
        let own = self.resident(adapter).and_then(|resident| resident.head.as_ref()?.vocabulary());
        own.unwrap_or(self.parts.vocabulary as u32)
    }

    fn step(&mut self, segments: &[StepSegment<'_>]) -> Result<Vec<f32>, ServeError> {
        let mut sequences = self.take_sequences(segments)?;
        let logits = O::run(|| self.run(segments, &mut sequences))?;
        if logits.is_empty() {
            // Nothing was read, so that nobody knows yet whether the kernels ran: others may be given these keys and values.
            self.device.synchronize()?;
        }
        for (segment, mut sequence) in segments.iter().zip(sequences) {
            sequence.length += segment.tokens.len();
            self.sequences.insert(segment.sequence, sequence);
        }
        Ok(logits)
    }

    fn release(&mut self, sequence: SequenceId) {
        self.sequences.remove(&sequence);
    }

    fn sharing(&mut self) -> Option<&mut dyn BlockSharing> {
        Some(self)
    }

    fn place(&mut self, adapter: AdapterId, prepared: PreparedAdapter) -> Result<(), PlaceError<PreparedAdapter>> {
        let unfit =
            |reason: String| PlaceError::Unfit(AdapterFailure::Unusable { name: prepared.name.clone(), reason });
        if let Some(path) = prepared.paths().find(|path| !self.parts.adaptable.has(path)) {
            return Err(unfit(format!(
                "it adapts `{path}`, and --adapted lets only {} be adapted; name this module there too, or leave --adapted out",
                self.parts.adaptable
            )));
        }
        let AdaptedModel { modules, bias_offsets, .. } = &prepared.adapted;
        let unknown = modules.keys().chain(bias_offsets.keys()).find(|path| !self.parts.adapted.contains_key(*path));
        if let Some(path) = unknown {
            return Err(unfit(format!("it adapts `{path}`, which is no part of the decoder")));
        }
        if prepared.gates.is_some() && !self.device.has_gates() {
            let device = &self.device.info().id;
            return Err(unfit(format!(
                "its parts are weighed for each token (X-LoRA), which the device `{device}` doesn't do; serve it on `host`"
            )));
        }
        let position = self.adapters.next();
        let fault = match self.try_place(position, &prepared) {
            Ok(resident) => {
                self.adapters.take(adapter, resident);
                return Ok(());
            }
            Err(fault) => fault,
        };
        for linear in self.parts.adapted.values() {
            linear.change(|projection| projection.remove(position));
        }
        Err(match fault {
            PlaceFault::Full if !self.adapters.of.is_empty() => PlaceError::Full(prepared),
            PlaceFault::Full => unfit(format!(
                "it takes {} bytes, and the device's memory for adapters has {} (--adapter-memory)",
                prepared.bytes, self.adapter_bytes
            )),
            PlaceFault::Other(reason) => unfit(reason),
        })
    }

    fn remove(&mut self, adapter: AdapterId) {
        if let Some(position) = self.adapters.give_back(adapter) {
            for linear in self.parts.adapted.values() {
                linear.change(|projection| projection.remove(position));
            }
        }
    }
}
