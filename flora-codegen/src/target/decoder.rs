//! What a decoder launches between its projections, as text.

use cubecl::prelude::*;
use flora_plan::layer::Element;
use flora_plan::schedule::Kept;
use flora_runtime::Storage;
use flora_runtime::decoding::{AttentionOperands, BLOCK_TOKENS, Columns, Heads, KeyValuePool, Norm, SegmentOperands};

use super::recorder::{self, OfflineDevice};
use super::{EmitError, EmittedKernel, Target, by_target};
use crate::launch::LaunchError;
use crate::launch::decoder::{AttentionHandles, attend, multiply, normalise, select};
use crate::routine::Hardware;

/// One step of a layer of a decoder.
#[derive(Clone, Debug)]
pub struct DecoderStep<'a> {
    /// Heads.
    pub heads: Heads,
    /// Whether queries and keys are turned.
    pub rotates: bool,
    /// Tokens that a token sees; `None`: all.
    pub window: Option<u32>,
    /// Whether norms subtract the mean and add an offset.
    pub centred: bool,
    /// Numbers of a row between blocks.
    pub width: usize,
    /// The type of rows, keys and values.
    pub element: Element,
    /// Of each sequence the tokens before the step's, and how many those are.
    pub sequences: &'a [(usize, usize)],
}

/// The launches that a step makes between the projections of a layer, in order: a norm, keys and values, attention, the product of a
/// gated network, and the rows whose logits are wanted.
///
/// # Errors
/// Whatever keeps the step from being launched there.
pub fn emit_decoder(target: Target, step: &DecoderStep<'_>) -> Result<Vec<EmittedKernel>, EmitError> {
    by_target!(target, record, step)
}

fn record<R>(variant: u16, step: &DecoderStep<'_>) -> Result<Vec<EmittedKernel>, EmitError>
where
    R: Runtime<Device = OfflineDevice>,
    R::Server: cubecl::server::ComputeServer<Info = recorder::Recording>,
{
    let client = R::client(&OfflineDevice { variant });
    let (launched, records) = client.info().record(|| (), |()| launches(&client, step));
    launched?;
    records.kernels.into_iter().collect()
}

fn launches<R: Runtime>(client: &ComputeClient<R>, step: &DecoderStep<'_>) -> Result<(), LaunchError> {
    let DecoderStep { heads, rotates, window, centred, width, element, sequences } = *step;
    let hardware = Hardware::of(client.properties());
    let buffer = |bytes: usize| client.empty(bytes.max(1).next_multiple_of(4));
    let rows: usize = sequences.iter().map(|(_, tokens)| tokens).sum();
    let numbers = |count: usize| buffer(count * element.bytes() as usize);

    let (x, gamma) = (numbers(rows * width), buffer(4 * width));
    let beta = centred.then_some(&gamma);
    // SAFETY: a recorder has no memory that a kernel could miss; here and below.
    let normed = unsafe {
        normalise(client, &hardware, &x, [rows, width], Norm { gamma: &gamma, beta, epsilon: 1e-5 }, element)
    }?;

    let mut blocks = 0;
    let mut first_row = 0;
    let segment = |(before, tokens): &(usize, usize)| {
        let count = (before + tokens).div_ceil(BLOCK_TOKENS) as u32;
        let segment = SegmentOperands {
            rows: first_row..first_row + tokens,
            first_position: *before,
            blocks: (blocks..blocks + count).collect(),
        };
        (first_row, blocks) = (first_row + tokens, blocks + count);
        segment
    };
    let segments: Vec<_> = sequences.iter().map(segment).collect();
    // The launches take handles; what holds them on a device isn't looked at.
    let storage = Storage::new(());
    let columns = |heads: usize, size: usize| Columns { matrix: &storage, width: heads * size, first: 0 };
    let operands = AttentionOperands {
        heads,
        element,
        rows,
        queries: columns(heads.queries, heads.size),
        keys: columns(heads.keys, heads.size),
        values: columns(heads.keys, heads.size),
        rotary: rotates.then_some(&storage),
        window,
        pool: &storage,
        pool_blocks: blocks as usize,
        copies: Vec::new(),
        segments,
        kept: &Kept::default(),
    };
    let [queries, keys] = [heads.queries, heads.keys].map(|heads| numbers(rows * heads * operands.heads.size));
    let rotary = rotates.then(|| buffer(4 * rows * heads.size));
    let bytes = KeyValuePool::bytes_per_token(heads, element) as usize * BLOCK_TOKENS;
    let pool = buffer(blocks as usize * bytes);
    let handles = AttentionHandles { rows: [&queries, &keys, &keys], rotary: rotary.as_ref(), pool: &pool };
    // SAFETY: as above.
    let attended = unsafe { attend(client, &hardware, &operands, handles) }?;

    // SAFETY: as above.
    let product = unsafe { multiply(client, &hardware, [&normed, &x], rows * width, element) }?;
    let last = operands.segments.iter().filter_map(|segment| segment.rows.clone().last());
    let last: Vec<u32> = last.map(|row| row as u32).collect();
    // SAFETY: as above.
    let selected = unsafe { select(client, &hardware, &product, width, &last, element) }?;
    // A read waits for the recorder's thread.
    let _ = client.read_one(attended);
    let _ = client.read_one(selected);
    Ok(())
}
