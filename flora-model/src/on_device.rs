//! Decoders on devices that keep keys and values in pools: what is between projections are the device's own kernels, on the buffers
//! that projections read and write.

use std::ops::Range;
use std::sync::{Arc, Mutex, PoisonError};

use flora_host::decoder::RotaryFrequencies;
use flora_plan::layer::Element;
use flora_plan::schedule::Kept;
use flora_runtime::decoding::{
    Attention, AttentionSegment, BLOCK_TOKENS, Columns, DecoderOperations, Heads, KeyValueBlock, KeyValueCache,
    KeyValuePool, Norm, Rotary,
};
use flora_runtime::{Buffer, Device, PlannedProjection, StepBatch};

use crate::error::ServeError;
use crate::operations::{AttentionConfig, AttentionInputs, NormParameters, Operations, SegmentRows, Serving};

/// The operations of a model on a device that has kernels for them.
pub(crate) struct DeviceOperations {
    device: Device,
    heads: Heads,
    rotary: Option<RotaryFrequencies>,
    element: Element,
    /// Tokens that all sequences have at most, as far as is known.
    cache_tokens: usize,
    /// One a layer, as far as there are caches of them.
    pools: Mutex<Vec<Arc<KeyValuePool>>>,
}

/// What attention of all layers of a step shares.
pub(crate) struct StepPositions {
    rotary: Option<Rotary>,
    tables: Kept,
}

impl DeviceOperations {
    fn kernels(&self) -> Result<DecoderOperations<'_>, ServeError> {
        self.device.decoder_operations().ok_or_else(|| ServeError::NoDecoder(self.device.info().id.clone()))
    }

    fn pool(&self, layer: usize) -> Result<Arc<KeyValuePool>, ServeError> {
        let mut pools = self.pools.lock().unwrap_or_else(PoisonError::into_inner);
        while pools.len() <= layer {
            let pool = KeyValuePool::new(&self.device, self.heads, self.element, self.cache_tokens)?;
            pools.push(Arc::new(pool));
        }
        Ok(Arc::clone(&pools[layer]))
    }
}

impl Operations for DeviceOperations {
    type Matrix = Buffer;
    type Linear = PlannedProjection;
    type Norm = Norm;
    type Cache = KeyValueCache;
    type Positions = StepPositions;

    fn new(device: &Device, attention: AttentionConfig, element: Element) -> Result<Self, ServeError> {
        let AttentionConfig { heads, rotary, cache_tokens } = attention;
        let pools = Mutex::default();
        let operations = Self { device: device.clone(), heads, rotary, element, cache_tokens, pools };
        operations.kernels()?;
        // A cache that no buffer holds is refused before a model is read.
        operations.pool(0)?;
        Ok(operations)
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

    fn norm(&self, NormParameters { gamma, beta, epsilon }: NormParameters) -> Result<Norm, ServeError> {
        Ok(self.kernels()?.norm(&gamma, beta.as_deref(), epsilon)?)
    }

    fn normalise(&self, norm: &Norm, x: &Buffer) -> Result<Buffer, ServeError> {
        Ok(self.kernels()?.normalise(norm, x)?)
    }

    fn multiply(&self, one: Buffer, other: Buffer) -> Result<Buffer, ServeError> {
        Ok(self.kernels()?.multiply(&one, &other)?)
    }

    fn select(&self, x: &Buffer, of: usize, rows: &[usize]) -> Result<Buffer, ServeError> {
        Ok(self.kernels()?.select(x, of, rows)?)
    }

    fn positions(&self, segments: &[SegmentRows]) -> Result<StepPositions, ServeError> {
        let rotary = self.rotary.as_ref().map(|frequencies| {
            let positions: Vec<_> = segments.iter().flat_map(SegmentRows::positions).collect();
            let rows = frequencies.rows(&positions);
            Ok::<_, ServeError>(self.kernels()?.rotary(rows.cosines(), rows.sines(), rows.pairs())?)
        });
        Ok(StepPositions { rotary: rotary.transpose()?, tables: Kept::default() })
    }

    fn attend(
        &self,
        inputs: AttentionInputs<Buffer>,
        window: Option<usize>,
        segments: &[SegmentRows],
        positions: &StepPositions,
        caches: &mut [&mut KeyValueCache],
    ) -> Result<Buffer, ServeError> {
        let Heads { queries: query_heads, keys: key_heads, size } = self.heads;
        let (query_width, key_width) = (query_heads * size, key_heads * size);
        let [queries, keys, values] = match &inputs {
            AttentionInputs::Separate { queries, keys, values } => {
                [(queries, query_width), (keys, key_width), (values, key_width)].map(|(matrix, width)| Columns {
                    matrix,
                    width,
                    first: 0,
                })
            }
            AttentionInputs::Joined(matrix) => {
                let width = query_width + 2 * key_width;
                [0, query_width, query_width + key_width].map(|first| Columns { matrix, width, first })
            }
        };
        let StepPositions { rotary, tables } = positions;
        let rotary = rotary.as_ref();
        let attention = Attention { heads: self.heads, queries, keys, values, rotary, window, kept: tables };
        let of_caches = segments.iter().zip(caches.iter_mut());
        let segments = of_caches.map(|(segment, cache)| AttentionSegment { rows: segment.rows.clone(), cache });
        Ok(self.kernels()?.attend(&attention, &mut segments.collect::<Vec<_>>())?)
    }
}

impl Serving for DeviceOperations {
    fn cache(&self, layer: usize) -> Result<KeyValueCache, ServeError> {
        Ok(KeyValueCache::new(&self.pool(layer)?))
    }

    fn cache_bytes_per_token(&self) -> u64 {
        KeyValuePool::bytes_per_token(self.heads, self.element)
    }

    type Block = KeyValueBlock;

    const BLOCK_TOKENS: u32 = BLOCK_TOKENS as u32;

    fn blocks(cache: &KeyValueCache, positions: Range<usize>) -> Vec<KeyValueBlock> {
        cache.blocks(positions)
    }

    fn replace(cache: &mut KeyValueCache, first: usize, blocks: &[KeyValueBlock]) {
        cache.replace(first, blocks);
    }

    fn beginning(&self, layer: usize, blocks: &[KeyValueBlock], tokens: usize) -> Result<KeyValueCache, ServeError> {
        Ok(KeyValueCache::beginning(&self.pool(layer)?, blocks, tokens))
    }
}
