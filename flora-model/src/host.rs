//! Decoders on the processor, without a tensor library: operations are the host engine's, on slices of the buffers that projections
//! read and write.

use std::ops::Range;

use flora_host::decoder::{
    Attention, AttentionSegment, Heads, KeyValueBlock, KeyValueCache, Matrix, RotaryFrequencies, RotaryRows,
};
use flora_host::{HostEngine, HostPlace, OwnedValues, Values, ValuesMut};
use flora_plan::layer::Element;
use flora_runtime::{Buffer, Device, PlannedProjection, StepBatch};

use crate::error::ServeError;
use crate::operations::{AttentionConfig, AttentionInputs, NormParameters, Operations, SegmentRows, Serving};

/// The operations of a model on the host.
pub(crate) struct HostOperations {
    pub(crate) device: Device,
    pub(crate) engine: HostEngine,
    pub(crate) heads: Heads,
    rotary: Option<RotaryFrequencies>,
    element: Element,
}

impl HostOperations {
    /// A buffer of `count` numbers, all of which `fill` writes.
    pub(crate) fn filled<E>(
        &self,
        count: usize,
        fill: impl FnOnce(ValuesMut<'_>) -> Result<(), E>,
    ) -> Result<Buffer, ServeError>
    where
        ServeError: From<E>,
    {
        flora_host::filled(&self.device, count, self.element, |out| Ok(fill(out)?))
    }
}

impl HostOperations {
    /// Attention over queries, keys and values where they lie.
    pub(crate) fn attention<'a>(
        &self,
        inputs: &'a AttentionInputs<Buffer>,
        window: Option<usize>,
        rotary: Option<&'a RotaryRows>,
    ) -> Result<Attention<'a>, ServeError> {
        let Heads { queries, keys, size } = self.heads;
        let (query_width, key_width) = (queries * size, keys * size);
        let [queries, keys, values] = match inputs {
            AttentionInputs::Separate { queries, keys, values } => {
                let whole =
                    |buffer, width| Ok::<_, ServeError>(Matrix::new(flora_host::values(buffer)?, width, 0..width)?);
                [whole(queries, query_width)?, whole(keys, key_width)?, whole(values, key_width)?]
            }
            AttentionInputs::Joined(joined) => {
                let (values_at, width) = (query_width + key_width, query_width + 2 * key_width);
                let joined = flora_host::values(joined)?;
                [
                    Matrix::new(joined, width, 0..query_width)?,
                    Matrix::new(joined, width, query_width..values_at)?,
                    Matrix::new(joined, width, values_at..width)?,
                ]
            }
        };
        Ok(Attention { heads: self.heads, queries, keys, values, rotary, window })
    }
}

impl Operations for HostOperations {
    type Matrix = Buffer;
    type Linear = PlannedProjection;
    type Norm = NormParameters;
    type Cache = KeyValueCache;
    type Positions = Option<RotaryRows>;

    fn new(device: &Device, attention: AttentionConfig, element: Element) -> Result<Self, ServeError> {
        if device.place::<HostPlace>().is_none() {
            return Err(ServeError::NoDecoder(device.info().id.clone()));
        }
        let AttentionConfig { heads, rotary, .. } = attention;
        Ok(Self { device: device.clone(), engine: HostEngine::new(), heads, rotary, element })
    }

    fn project(
        &self,
        linear: &PlannedProjection,
        x: &Buffer,
        batch: &StepBatch,
        residual: Option<&Buffer>,
    ) -> Result<Buffer, ServeError> {
        Ok(linear.forward(x, batch, residual)?)
    }

    fn norm(&self, parameters: NormParameters) -> Result<NormParameters, ServeError> {
        Ok(parameters)
    }

    fn normalise(&self, norm: &NormParameters, x: &Buffer) -> Result<Buffer, ServeError> {
        let NormParameters { gamma, beta, epsilon } = norm;
        let x = flora_host::values(x)?;
        self.filled(x.len(), |out| match beta {
            None => self.engine.rms_norm(x, gamma, *epsilon, out),
            Some(beta) => self.engine.layer_norm(x, [gamma, beta], *epsilon, out),
        })
    }

    fn multiply(&self, one: Buffer, other: Buffer) -> Result<Buffer, ServeError> {
        let (one, other) = (flora_host::values(&one)?, flora_host::values(&other)?);
        self.filled(one.len(), |out| self.engine.multiply(one, other, out))
    }

    fn select(&self, x: &Buffer, of: usize, rows: &[usize]) -> Result<Buffer, ServeError> {
        fn selected<T: Copy>(x: &[T], of: usize, rows: &[usize]) -> Vec<T> {
            let width = x.len() / of.max(1);
            rows.iter().flat_map(|row| &x[row * width..(row + 1) * width]).copied().collect()
        }
        let values = match flora_host::values(x)? {
            Values::F32(x) => OwnedValues::F32(selected(x, of, rows)),
            Values::F16(x) => OwnedValues::F16(selected(x, of, rows)),
            Values::Bf16(x) => OwnedValues::Bf16(selected(x, of, rows)),
        };
        Ok(flora_host::buffer(&self.device, values)?)
    }

    fn positions(&self, segments: &[SegmentRows]) -> Result<Option<RotaryRows>, ServeError> {
        let Some(rotary) = &self.rotary else { return Ok(None) };
        let positions: Vec<_> = segments.iter().flat_map(SegmentRows::positions).collect();
        Ok(Some(rotary.rows(&positions)))
    }

    fn attend(
        &self,
        inputs: AttentionInputs<Buffer>,
        window: Option<usize>,
        segments: &[SegmentRows],
        rotary: &Option<RotaryRows>,
        caches: &mut [&mut KeyValueCache],
    ) -> Result<Buffer, ServeError> {
        let attention = self.attention(&inputs, window, rotary.as_ref())?;
        let of_caches = segments.iter().zip(caches.iter_mut());
        let segments = of_caches.map(|(segment, cache)| AttentionSegment { rows: segment.rows.clone(), cache });
        let mut segments: Vec<_> = segments.collect();
        let numbers = attention.queries.rows() * self.heads.queries * self.heads.size;
        self.filled(numbers, |out| self.engine.attend(&attention, &mut segments, out))
    }

    /// Threads that finish one early help with the other, where they would wait at the end of each.
    fn both<X: Send, Y: Send>(one: impl FnOnce() -> X + Send, other: impl FnOnce() -> Y + Send) -> (X, Y) {
        rayon::join(one, other)
    }
}

impl Serving for HostOperations {
    fn cache(&self, _layer: usize) -> Result<KeyValueCache, ServeError> {
        Ok(KeyValueCache::new(self.heads, self.element))
    }

    fn cache_bytes_per_token(&self) -> u64 {
        KeyValueCache::bytes_per_token(self.heads, self.element)
    }

    type Block = KeyValueBlock;

    const BLOCK_TOKENS: u32 = KeyValueCache::BLOCK_TOKENS as u32;

    fn blocks(cache: &KeyValueCache, positions: Range<usize>) -> Vec<KeyValueBlock> {
        cache.blocks(positions)
    }

    fn replace(cache: &mut KeyValueCache, first: usize, blocks: &[KeyValueBlock]) {
        cache.replace(first, blocks);
    }

    fn beginning(&self, _layer: usize, blocks: &[KeyValueBlock], tokens: usize) -> Result<KeyValueCache, ServeError> {
        Ok(KeyValueCache::beginning(self.heads, self.element, blocks, tokens))
    }

    /// On a thread of the pool, which works along with the others; any other would sleep through every operation and be woken after
    /// it.
    fn run<R: Send>(step: impl FnOnce() -> R + Send) -> R {
        rayon::scope(|_| step())
    }
}
