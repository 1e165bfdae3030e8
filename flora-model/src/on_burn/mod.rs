//! Decoders on the devices that Burn has backends for: attention, norms and rotations are Burn's, on tensors that are the buffers
//! that projections read and write.

mod attention;
mod cache;
mod rotary;

use burn::module::Param;
use burn::nn::{LayerNorm, LayerNormConfig, RmsNorm, RmsNormConfig};
use burn::tensor::{Int, Shape, Tensor, TensorData, TensorPrimitive};
use flora_burn::{BurnDevice, FloraBackend};
use flora_host::decoder::{Heads, RotaryFrequencies};
use flora_plan::layer::Element;
use flora_runtime::{Buffer, Device, PlannedProjection, StepBatch};

use crate::error::ServeError;
use crate::on_burn::cache::LayerCache;
use crate::on_burn::rotary::RotaryRows;
use crate::operations::{AttentionConfig, AttentionInputs, NormParameters, Operations, SegmentRows, Serving};

/// The operations of a model on a Burn backend.
pub(crate) struct BurnOperations<B: FloraBackend> {
    device: BurnDevice<B>,
    heads: Heads,
    rotary: Option<RotaryFrequencies>,
    element: Element,
    block_tokens: usize,
}

/// A norm of Burn's.
pub(crate) enum Norm<B: FloraBackend> {
    Rms(RmsNorm<B>),
    Layer(LayerNorm<B>),
}

impl<B: FloraBackend> BurnOperations<B> {
    fn tensor<const D: usize>(&self, buffer: &Buffer, shape: [usize; D]) -> Result<Tensor<B, D>, ServeError> {
        let tensor = B::tensor(&self.device.burn, buffer.clone(), Shape::from(shape))?;
        Ok(Tensor::from_primitive(TensorPrimitive::Float(tensor)))
    }

    /// Rows of `width` numbers.
    fn matrix(&self, buffer: &Buffer, width: usize) -> Result<Tensor<B, 2>, ServeError> {
        self.tensor(buffer, [buffer.len() / width.max(1), width])
    }

    fn buffer<const D: usize>(&self, tensor: Tensor<B, D>) -> Result<Buffer, ServeError> {
        Ok(B::buffer(&self.device.flora, tensor.into_primitive().tensor())?)
    }

    fn parameter(&self, values: &[f32]) -> Result<Param<Tensor<B, 1>>, ServeError> {
        Ok(Param::from_tensor(self.device.upload(values, [values.len()], self.element)?))
    }

    /// Queries, keys and values, each `[rows, its heads, size]`.
    fn inputs(&self, inputs: &AttentionInputs<Buffer>) -> Result<[Tensor<B, 3>; 3], ServeError> {
        let Heads { queries: query_heads, keys: key_heads, size } = self.heads;
        let by_head = |tensor: Tensor<B, 2>, heads: usize| {
            let rows = tensor.dims()[0];
            tensor.reshape([rows, heads, size])
        };
        Ok(match inputs {
            AttentionInputs::Separate { queries, keys, values } => {
                let of = |buffer, heads: usize| Ok::<_, ServeError>(by_head(self.matrix(buffer, heads * size)?, heads));
                [of(queries, query_heads)?, of(keys, key_heads)?, of(values, key_heads)?]
            }
            AttentionInputs::Joined(joined) => {
                let all = self.matrix(joined, (query_heads + 2 * key_heads) * size)?;
                let rows = all.dims()[0];
                let part = |first: usize, heads: usize| {
                    by_head(all.clone().slice([0..rows, first * size..(first + heads) * size]), heads)
                };
                [part(0, query_heads), part(query_heads, key_heads), part(query_heads + key_heads, key_heads)]
            }
        })
    }
}

impl<B: FloraBackend> Operations for BurnOperations<B> {
    type Matrix = Buffer;
    type Linear = PlannedProjection;
    type Norm = Norm<B>;
    type Cache = LayerCache<B>;
    type Positions = Option<RotaryRows<B>>;

    fn new(device: &Device, attention: AttentionConfig, element: Element) -> Result<Self, ServeError> {
        let device = BurnDevice::of(device).ok_or_else(|| ServeError::NoDecoder(device.info().id.clone()))?;
        let AttentionConfig { heads, rotary, block_tokens } = attention;
        Ok(Self { device, heads, rotary, element, block_tokens })
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

    fn norm(&self, NormParameters { gamma, beta, epsilon }: NormParameters) -> Result<Norm<B>, ServeError> {
        let (device, width, epsilon) = (&self.device.burn, gamma.len(), f64::from(epsilon));
        let gamma = self.parameter(&gamma)?;
        Ok(match beta {
            None => Norm::Rms(RmsNorm { gamma, ..RmsNormConfig::new(width).with_epsilon(epsilon).init(device) }),
            Some(beta) => {
                let mut norm: LayerNorm<B> = LayerNormConfig::new(width).with_epsilon(epsilon).init(device);
                norm.gamma = gamma;
                norm.beta = Some(self.parameter(&beta)?);
                Norm::Layer(norm)
            }
        })
    }

    fn normalise(&self, norm: &Norm<B>, x: &Buffer) -> Result<Buffer, ServeError> {
        self.buffer(match norm {
            Norm::Rms(norm) => norm.forward(self.matrix(x, norm.gamma.dims()[0])?),
            Norm::Layer(norm) => norm.forward(self.matrix(x, norm.gamma.dims()[0])?),
        })
    }

    fn multiply(&self, one: Buffer, other: Buffer) -> Result<Buffer, ServeError> {
        self.buffer(self.tensor(&one, [one.len()])? * self.tensor(&other, [other.len()])?)
    }

    fn select(&self, x: &Buffer, of: usize, rows: &[usize]) -> Result<Buffer, ServeError> {
        let x = self.matrix(x, x.len() / of.max(1))?;
        self.buffer(x.select(0, indices(rows, &self.device)))
    }

    fn positions(&self, segments: &[SegmentRows]) -> Result<Self::Positions, ServeError> {
        let Some(frequencies) = &self.rotary else { return Ok(None) };
        let positions: Vec<_> = segments.iter().flat_map(SegmentRows::positions).collect();
        Ok(Some(RotaryRows::new(&self.device, frequencies, &positions, self.heads, self.element)?))
    }

    fn attend(
        &self,
        inputs: AttentionInputs<Buffer>,
        window: Option<usize>,
        segments: &[SegmentRows],
        positions: &Self::Positions,
        caches: &mut [&mut LayerCache<B>],
    ) -> Result<Buffer, ServeError> {
        let [queries, keys, values] = self.inputs(&inputs)?;
        let (queries, keys) = match positions {
            Some(rotary) => rotary.rotate(queries, keys),
            None => (queries, keys),
        };
        let sizes = attention::Sizes { heads: self.heads, window, block_tokens: self.block_tokens };
        self.buffer(attention::attend(sizes, [queries, keys, values], segments, caches))
    }
}

impl<B: FloraBackend> Serving for BurnOperations<B> {
    fn cache(&self) -> LayerCache<B> {
        LayerCache::new()
    }

    fn cache_bytes_per_token(&self) -> u64 {
        (2 * self.heads.keys * self.heads.size) as u64 * self.element.bytes()
    }

    /// None: a cache is one tensor, of its sequence alone.
    type Block = std::convert::Infallible;

    const BLOCK_TOKENS: Option<u32> = None;

    fn blocks(_cache: &LayerCache<B>, _positions: std::ops::Range<usize>) -> Vec<Self::Block> {
        Vec::new()
    }

    fn replace(_cache: &mut LayerCache<B>, _first: usize, _blocks: &[Self::Block]) {}

    fn beginning(&self, _blocks: &[Self::Block], _tokens: usize) -> LayerCache<B> {
        LayerCache::new()
    }
}

/// Rows by their numbers.
fn indices<B: FloraBackend>(rows: &[usize], device: &BurnDevice<B>) -> Tensor<B, 1, Int> {
    let rows: Vec<i32> = rows.iter().map(|row| *row as i32).collect();
    Tensor::from_data(TensorData::from(&rows[..]), &device.burn)
}
