//! Base weights from a model's files in the form in which a device keeps them.

use flora_checkpoint::tensor::QuantisedBlock;
use flora_checkpoint::{BaseWeight, Encoding, Model, ModelError, StoredTensor, TensorProblem};
use flora_plan::layer::{Element, LayerShape, WeightFormat};
use flora_plan::weight::{Block, BlockPacker, PackedWeight, WeightError};

use flora_runtime::Device;

/// The form in which a device keeps base weights.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub enum BaseForm {
    /// As the model's file has them, where the device can decode that as it multiplies; else dequantised.
    #[default]
    Stored,
    /// Dequantised.
    F32,
    /// Projections rounded to 8 bits with a scale for each output, whatever the file has. The output matrix stays as the file has it,
    /// as where others load a model in 8 bits.
    Int8,
}

/// The encodings that are kept as they are.
const KEPT: [(Encoding, WeightFormat); 16] = [
    (Encoding::F32, WeightFormat::Float(Element::F32)),
    (Encoding::F16, WeightFormat::Float(Element::F16)),
    (Encoding::BF16, WeightFormat::Float(Element::Bf16)),
    (Encoding::Q8_0, WeightFormat::Q8_0),
    (Encoding::Q4_0, WeightFormat::Q4_0),
    (Encoding::Q4_1, WeightFormat::Q4_1),
    (Encoding::Q5_0, WeightFormat::Q5_0),
    (Encoding::Q5_1, WeightFormat::Q5_1),
    (Encoding::Q2_K, WeightFormat::Q2_K),
    (Encoding::Q3_K, WeightFormat::Q3_K),
    (Encoding::Q4_K, WeightFormat::Q4_K),
    (Encoding::Q5_K, WeightFormat::Q5_K),
    (Encoding::Q6_K, WeightFormat::Q6_K),
    (Encoding::IQ4_NL, WeightFormat::IQ4_NL),
    (Encoding::IQ4_XS, WeightFormat::IQ4_XS),
    (Encoding::MXFP4, WeightFormat::MXFP4),
];

/// Why a weight can't be had in a form.
#[derive(Debug, thiserror::Error)]
#[non_exhaustive]
pub enum BaseError {
    /// It can't be read.
    #[error(transparent)]
    Model(#[from] ModelError),
    /// Its numbers can't be read.
    #[error("the weight `{name}` {problem}")]
    Tensor {
        /// Which one.
        name: String,
        /// What is wrong with it.
        problem: TensorProblem,
    },
    /// It can't be packed.
    #[error("the weight `{name}` can't be packed: {source}")]
    Pack {
        /// Which one.
        name: String,
        /// Why.
        source: WeightError,
    },
    /// Larger than layers are.
    #[error("the weight `{name}` has an extent of {extent}, and layers have up to 2^32")]
    TooLarge {
        /// Which one.
        name: String,
        /// The extent.
        extent: usize,
    },
}

impl BaseForm {
    /// What becomes of a projection's encoding: f32 where it isn't kept, or where the device has no such buffers.
    pub fn format(self, encoding: Encoding, device: &Device) -> WeightFormat {
        let kept = KEPT.iter().find(|(kept, _)| *kept == encoding).map(|(_, format)| *format);
        let has = |format: &WeightFormat| match format {
            WeightFormat::Float(element) => device.info().element_types.iter().any(|name| name == element.name()),
            _ => true,
        };
        match self {
            Self::Stored => kept.filter(has).unwrap_or_default(),
            Self::F32 => WeightFormat::default(),
            Self::Int8 => WeightFormat::Int8,
        }
    }

    /// The numbers that the projection at `path` multiplies by: what an adapter is folded with whose equation reads its base weight.
    ///
    /// # Errors
    /// There is none, or it can't be read.
    pub fn weight(self, model: &Model, path: &str) -> Result<BaseWeight, BaseError> {
        let weight = model.weight(path)?;
        match self {
            // What a file has is f32 exactly, whatever encodes it.
            Self::Stored | Self::F32 => Ok(weight),
            Self::Int8 => Ok(BaseWeight { values: rounded(path, &weight, WeightFormat::Int8)?.to_f32(), ..weight }),
        }
    }

    /// The weight of the projection at `path`. What reading it took of a mapped file is given back to the system.
    ///
    /// # Errors
    /// There is none, or it can't be read.
    pub fn pack(self, model: &Model, path: &str, device: &Device) -> Result<PackedWeight, BaseError> {
        let packed = self.packed(model, path, device)?;
        model.release(path)?;
        Ok(packed)
    }

    fn packed(self, model: &Model, path: &str, device: &Device) -> Result<PackedWeight, BaseError> {
        if self == Self::Int8 {
            return rounded(path, &model.weight(path)?, WeightFormat::Int8);
        }
        let stored = model.stored(path)?;
        let format = self.format(stored.tensor.encoding(), device);
        if format.quantisation().is_some() && !stored.rows_are_inputs {
            return self.pack_rows(path, &stored.tensor, device);
        }
        let format = if format.quantisation().is_some() { WeightFormat::default() } else { format };
        rounded(path, &model.weight(path)?, format)
    }

    /// A tensor `[k, d]` that is no projection's, such as an embedding `[vocabulary, d]` that also makes the logits; its memory is
    /// given back likewise.
    ///
    /// # Errors
    /// It is no matrix, or its numbers aren't finite.
    pub fn pack_rows(self, name: &str, tensor: &StoredTensor, device: &Device) -> Result<PackedWeight, BaseError> {
        let problem = |problem| BaseError::Tensor { name: name.to_owned(), problem };
        let failed = |source| BaseError::Pack { name: name.to_owned(), source };
        let (k, d) = tensor.matrix_shape().map_err(problem)?;
        let shape = shape(name, d, k)?;
        let form = if self == Self::Int8 { Self::Stored } else { self };
        let format = form.format(tensor.encoding(), device);
        let packed = if format.quantisation().is_some() {
            pack_blocks(format, shape, tensor)
        } else {
            let values = flora_checkpoint::tensor::transpose(&tensor.to_finite_f32().map_err(problem)?, k, d);
            PackedWeight::from_f32(format, shape, &values)
        };
        tensor.release();
        packed.map_err(failed)
    }
}

/// A tensor `[k, d]` whose encoding is kept in `format`.
fn pack_blocks(format: WeightFormat, shape: LayerShape, tensor: &StoredTensor) -> Result<PackedWeight, WeightError> {
    let blocks = tensor.bytes().chunks_exact(tensor.encoding().block_bytes());
    let mut packer = BlockPacker::new(format, shape, blocks.len() as u64)?;
    let Some(mut block) = QuantisedBlock::empty(tensor.encoding()) else { return packer.finish() };
    for bytes in blocks {
        let Some(block) = block.read(bytes) else { break };
        packer.push(Block {
            scale: block.scale,
            minimum: block.minimum,
            scales: block.scales(),
            minima: block.minima(),
            stored: block.stored(),
        })?;
    }
    packer.finish()
}

/// The weight of the projection at `path`, rounded to a format.
fn rounded(path: &str, weight: &BaseWeight, format: WeightFormat) -> Result<PackedWeight, BaseError> {
    let shape = shape(path, weight.d, weight.k)?;
    let failed = |source| BaseError::Pack { name: path.to_owned(), source };
    PackedWeight::from_f32(format, shape, &weight.values).map_err(failed)
}

fn shape(name: &str, d: usize, k: usize) -> Result<LayerShape, BaseError> {
    let extent =
        |extent: usize| u32::try_from(extent).map_err(|_| BaseError::TooLarge { name: name.to_owned(), extent });
    Ok(LayerShape { d: extent(d)?, k: extent(k)? })
}
