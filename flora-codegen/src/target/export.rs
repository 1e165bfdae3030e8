//! One batch's launches as data: the kernels, the buffers that they take, and their order, for programs that launch them by
//! themselves. It is recorded from the code that launches on a card, so that nothing is said twice.

use std::collections::HashMap;

use cubecl::prelude::*;
use cubecl::server::Handle;
use cubecl_runtime::storage::StorageId;
use serde::{Deserialize, Serialize};

use super::nowhere::Place;
use super::recorder::{Offline, OfflineDevice, Records};
use super::stable::shared_bytes;
use super::{Buffers, Capability, Emission, EmitError, EmittedKernel, LaidOut, Pass};
use crate::launch::{LaunchError, LowRankSums, launch};
use crate::routine::Hardware;
use crate::target::cuda::Cuda;

/// A batch's launches on one stream, in order.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct LaunchList {
    /// The kernels, each once.
    pub kernels: Vec<ExportedKernel>,
    /// The buffers, each as long as the launches need it.
    pub buffers: Vec<ExportedBuffer>,
    /// The launches.
    pub launches: Vec<ExportedLaunch>,
}

/// A kernel.
#[derive(Clone, Debug, PartialEq, Eq, Hash, Serialize, Deserialize)]
pub struct ExportedKernel {
    /// The name of its function.
    pub name: String,
    /// Threads of a block.
    pub block: [u32; 3],
    /// Bytes of shared memory that a launch asks for.
    pub dynamic_shared_bytes: u32,
    /// CUDA C++.
    pub source: String,
}

/// A buffer, aligned to 256 bytes at least, as CUDA's allocations are.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct ExportedBuffer {
    /// Its length.
    pub bytes: u64,
    /// What has to be in it.
    pub contents: Contents,
}

/// What has to be in a buffer.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "snake_case")]
pub enum Contents {
    /// A tensor of the caller's.
    Operand(Operand),
    /// These words, before the first launch; no launch changes them, so that they are written once for a batch of this composition.
    Table(Vec<u32>),
    /// These words, before the launches are made each time.
    State(Vec<u32>),
    /// Nothing: what launches leave for those after them.
    Scratch,
}

/// A tensor of the caller's, row-major, in the layer's types.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash, Serialize, Deserialize)]
#[serde(rename_all = "snake_case")]
pub enum Operand {
    /// `[tokens, d]`
    X,
    /// `[tokens, k]`
    Residual,
    /// `[d, k]`, or the words of a quantised weight.
    BaseWeight,
    /// The scales of a quantised one.
    WeightScales,
    /// `[k]`, f32
    Bias,
    /// `[slots, d]`
    InPool,
    /// `[slots, k]`
    OutPool,
    /// `[d, k]`, W_i of the one adapter of the batch.
    MergedWeight,
    /// `[tokens, k]`, which is written.
    Y,
}

/// A launch: pointers to the arguments one after the other, then one to what is passed by value.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct ExportedLaunch {
    /// Which kernel, by its position.
    pub kernel: usize,
    /// Blocks.
    pub grid: [u32; 3],
    /// The kernel's pointers.
    pub arguments: Vec<Argument>,
    /// What follows them: the words of one structure that is passed by value, aligned to 8 bytes.
    pub by_value: Vec<u32>,
}

/// A pointer into a buffer.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct Argument {
    /// Which buffer, by its position.
    pub buffer: usize,
    /// The byte that it points to.
    pub offset: u64,
    /// How many bytes from there on belong to it.
    pub bytes: u64,
}

/// The launches of a batch's forward pass on a card; of [`Emission`], `pass` has to be [`Pass::Forward`]. The pools are as long as the
/// batch needs them.
///
/// # Errors
/// As [`super::emit`].
pub fn export(capability: Capability, emission: &Emission) -> Result<LaunchList, EmitError> {
    export_with_pools(capability, emission, (0, 0))
}

/// The same with pools of so many in-slots and out-slots, or more where the batch needs more. Launches are told how long their buffers
/// are: where pools are of one length, batches that differ in their adapters' slots differ in tables alone.
///
/// # Errors
/// As [`super::emit`].
pub fn export_with_pools(
    capability: Capability,
    emission: &Emission,
    (in_slots, out_slots): (u32, u32),
) -> Result<LaunchList, EmitError> {
    let emission = &Emission { pass: Pass::Forward, ..emission.clone() };
    let laid_out = LaidOut::of(emission)?;
    let (needed_in, needed_out, tokens, merged) = laid_out.needs();
    let needs = (needed_in.max(in_slots), needed_out.max(out_slots), tokens, merged);
    let client = Offline::<Cuda>::client(&OfflineDevice { variant: capability.version() });
    let (hardware, sums) = (Hardware::of(client.properties()), LowRankSums::default());
    let place = |handle: &Handle| client.get_resource(handle.clone()).ok().map(|found| found.resource().buffer);
    let (named, records) = client.info().record(
        || Buffers::new(&client, emission, needs),
        |Buffers { layer, x, outputs }| -> Result<_, LaunchError> {
            let LaidOut::Forward(schedule) = &laid_out else { return Ok(Named::default()) };
            // SAFETY: a recorder has no memory that a kernel could miss.
            let y = unsafe { launch(&client, &hardware, &layer, &sums, schedule, &x, outputs.as_ref())? };
            let handles = [
                (Operand::X, Some(&x)),
                (Operand::Residual, outputs.as_ref()),
                (Operand::BaseWeight, Some(&layer.base_weight)),
                (Operand::WeightScales, layer.weight_scales.as_ref()),
                (Operand::Bias, layer.bias.as_ref()),
                (Operand::InPool, Some(&layer.in_pool.handle)),
                (Operand::OutPool, Some(&layer.out_pool.handle)),
                (Operand::MergedWeight, layer.merged.as_ref().map(|merged| &merged.weight)),
                (Operand::Y, Some(&y)),
            ];
            let operands = handles.into_iter().filter_map(|(operand, handle)| Some((place(handle?)?, operand)));
            Ok(Named { operands: operands.collect(), states: sums.handles().iter().filter_map(place).collect() })
        },
    );
    List::of(&named?, records)
}

fn words(bytes: &[u8]) -> Vec<u32> {
    bytes.chunks_exact(4).map(|word| u32::from_le_bytes([word[0], word[1], word[2], word[3]])).collect()
}

/// The lower half of each first.
fn halves(words: &[u64]) -> Vec<u32> {
    words.iter().flat_map(|word| [*word as u32, (*word >> 32) as u32]).collect()
}

/// What is known of the places of a recording.
#[derive(Default)]
struct Named {
    operands: HashMap<StorageId, Operand>,
    /// Those that launches change and read again in the next batch.
    states: Vec<StorageId>,
}

/// A list that comes together.
struct List<'a> {
    named: &'a Named,
    uploads: HashMap<StorageId, Vec<u32>>,
    positions: HashMap<StorageId, usize>,
    list: LaunchList,
}

impl<'a> List<'a> {
    fn of(named: &'a Named, records: Records) -> Result<LaunchList, EmitError> {
        let uploads = records.uploads.iter().map(|(place, bytes)| (place.buffer, words(bytes)));
        let list = LaunchList { kernels: Vec::new(), buffers: Vec::new(), launches: Vec::new() };
        let mut own = Self { named, uploads: uploads.collect(), positions: HashMap::new(), list };
        for (kernel, arguments) in records.kernels.into_iter().zip(records.arguments) {
            let kernel = kernel?;
            let grid = kernel.cube_count.ok_or_else(|| EmitError::Compile {
                kernel: kernel.name.clone(),
                reason: "the number of its blocks is known on the card alone".to_owned(),
            })?;
            let EmittedKernel { name, cube_dim: block, source, .. } = kernel;
            let Some(dynamic_shared_bytes) = shared_bytes(&source) else {
                let reason = "how much shared memory it takes can't be read from its text".to_owned();
                return Err(EmitError::Compile { kernel: name, reason });
            };
            let exported = ExportedKernel { name, block, dynamic_shared_bytes, source };
            let known = own.list.kernels.iter().position(|known| *known == exported);
            let position = known.unwrap_or_else(|| {
                own.list.kernels.push(exported);
                own.list.kernels.len() - 1
            });
            let mut pointers: Vec<_> = arguments.buffers.iter().map(|place| own.argument(*place)).collect();
            if !arguments.dynamic.is_empty() {
                let words = halves(&arguments.dynamic);
                let bytes = 4 * words.len() as u64;
                own.list.buffers.push(ExportedBuffer { bytes, contents: Contents::Table(words) });
                pointers.push(Argument { buffer: own.list.buffers.len() - 1, offset: 0, bytes });
            }
            let by_value = halves(&arguments.by_value);
            own.list.launches.push(ExportedLaunch { kernel: position, grid, arguments: pointers, by_value });
        }
        Ok(own.list)
    }

    fn argument(&mut self, Place { buffer, offset, bytes }: Place) -> Argument {
        let buffers = &mut self.list.buffers;
        let position = *self.positions.entry(buffer).or_insert_with(|| {
            let written = self.uploads.remove(&buffer);
            let contents = match (self.named.operands.get(&buffer), written) {
                (Some(operand), _) => Contents::Operand(*operand),
                (None, Some(words)) if self.named.states.contains(&buffer) => Contents::State(words),
                (None, Some(words)) => Contents::Table(words),
                (None, None) => Contents::Scratch,
            };
            buffers.push(ExportedBuffer { bytes: 0, contents });
            buffers.len() - 1
        });
        let own = &mut buffers[position];
        own.bytes = own.bytes.max(offset + bytes);
        Argument { buffer: position, offset, bytes }
    }
}

impl LaunchList {
    /// The buffers that hold operands, with their positions.
    pub fn operands(&self) -> impl Iterator<Item = (usize, Operand, u64)> {
        self.buffers.iter().enumerate().filter_map(|(position, buffer)| match buffer.contents {
            Contents::Operand(operand) => Some((position, operand, buffer.bytes)),
            _ => None,
        })
    }
}
