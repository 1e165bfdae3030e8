//! What a kind of device has to offer. The host and every GPU runtime implement [`Backend`]; [`Device`](crate::Device) checks
//! what is passed and everything above it is the same for all of them.

use std::any::Any;
use std::fmt;
use std::ops::Range;
use std::sync::Arc;

use flora_ir::SparseMatrix;
use flora_plan::blueprints::{Blueprints, Tile};
use flora_plan::layer::{Element, LayerFormat, WeightFormat};
use flora_plan::schedule::{BackwardSchedule, Materialised, Schedule};
use flora_plan::weight::PackedWeight;

use crate::decoding::DecoderKernels;
use crate::device::DeviceError;
use crate::operands::LayerOperands;

/// Memory of a backend, of a type that only that backend knows. Cloning shares it.
#[derive(Clone)]
pub struct Storage(Arc<dyn Any + Send + Sync>);

impl Storage {
    /// Memory in the backend's own form.
    pub fn new<T: Any + Send + Sync>(memory: T) -> Self {
        Self(Arc::new(memory))
    }

    /// The memory, where it is of this form.
    pub fn get<T: Any>(&self) -> Option<&T> {
        self.0.downcast_ref()
    }

    /// The memory itself, where it is of this form and nobody else shares it; else what was passed.
    ///
    /// # Errors
    /// Another form, or somebody else has it too.
    pub fn into_inner<T: Any + Send + Sync>(self) -> Result<T, Self> {
        let memory: Arc<T> = self.0.downcast().map_err(Self)?;
        Arc::try_unwrap(memory).map_err(|memory| Self(memory))
    }

    /// The memory, where it is of this form and nobody else shares it.
    pub fn get_mut<T: Any>(&mut self) -> Option<&mut T> {
        Arc::get_mut(&mut self.0)?.downcast_mut()
    }
}

impl fmt::Debug for Storage {
    fn fmt(&self, formatter: &mut fmt::Formatter<'_>) -> fmt::Result {
        formatter.write_str("Storage")
    }
}

/// Which gradients a backward pass gives.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Hash)]
pub enum Wanted {
    /// dx and those of the adapters.
    #[default]
    All,
    /// dx alone: of a layer without adapters.
    Input,
    /// Those of the adapters alone: of a layer whose input nothing trained has made.
    Adapters,
}

impl Wanted {
    /// Whether dx is among them.
    pub fn has_input(self) -> bool {
        matches!(self, Self::All | Self::Input)
    }

    /// Whether those of the adapters are among them.
    pub fn has_adapters(self) -> bool {
        matches!(self, Self::All | Self::Adapters)
    }
}

/// The gradients of a batch: what was wanted of them.
#[derive(Clone, Debug)]
pub struct Gradients<T> {
    /// dx `[tokens, d]`, in the type of the activations.
    pub input: Option<T>,
    /// Those of the adapters' in-vectors `[in_vectors, d]` and out-vectors `[out_vectors, k]`, in f32 and in the order of
    /// [`BackwardSchedule::adapters`].
    pub vectors: Option<[T; 2]>,
}

/// A product of rows in host memory, x `[rows, inputs]`, by a sparse matrix `[inputs, outputs]`: y `[rows, outputs]` becomes it.
#[derive(Debug)]
pub struct SparseRows<'a> {
    /// `[rows, inputs]`
    pub x: &'a [f32],
    /// `[inputs, outputs]`
    pub matrix: &'a SparseMatrix,
    /// `[rows, outputs]`
    pub y: &'a mut [f32],
}

/// Rows in host memory that are read in place of some of x's.
#[derive(Clone, Copy, Debug)]
pub struct ReplacedRows<'a> {
    /// Which rows of x: pieces that rise.
    pub pieces: &'a [Range<usize>],
    /// Those of one piece behind those of the other, `[rows, d]`.
    pub values: &'a [f32],
}

/// Numbers that the low-rank sums of rows, h = x @ b, are multiplied by before they are expanded. Ones leave a row as it is, to the bit.
#[derive(Clone, Copy, Debug)]
pub struct RankGates<'a> {
    /// Numbers of a row: as many as the largest rank of the batch, or more.
    pub width: usize,
    /// `[tokens, width]`; an adapter of a smaller rank has its first.
    pub values: &'a [f32],
}

/// Queues something on a device.
pub type Queueing<'a> = dyn FnMut() -> Result<(), DeviceError> + Send + 'a;

/// How a kind of device does what [`Device`](crate::Device) offers.
///
/// [`Device`](crate::Device) has checked that all storage is this device's own and as long as the layer and the schedule say, and
/// that the schedule names nothing that the layer lacks.
pub trait Backend: Send + Sync {
    /// Copies numbers to the device, rounded to `element`.
    fn upload(&self, values: &[f32], element: Element) -> Storage;

    /// Copies a weight to the device.
    fn upload_weight(&self, weight: &PackedWeight) -> Storage;

    /// How many numbers of `element` there are in memory that somebody lends; `None` where it isn't this backend's, or can't be
    /// read as such numbers.
    fn capacity(&self, storage: &Storage, element: Element) -> Option<usize>;

    /// The same numbers in a larger buffer, and whatever after them.
    ///
    /// # Errors
    /// The device can't hold it.
    fn resized(&self, storage: &Storage, elements: usize, element: Element) -> Result<Storage, DeviceError>;

    /// Writes into a buffer from its number `first` on, behind everything that is queued.
    ///
    /// # Errors
    /// The device can't; the buffer is as it was then.
    fn write(&self, storage: &mut Storage, first: usize, values: &[f32], element: Element) -> Result<(), DeviceError>;

    /// Copies numbers back, some parts of them one behind the other, after everything that was queued before.
    ///
    /// # Errors
    /// Something that was queued failed.
    fn read(&self, storage: &Storage, parts: &[Range<usize>], element: Element) -> Result<Vec<f32>, DeviceError>;

    /// Queues a schedule: x `[tokens, d]`, residual `[tokens, k]`, the result `[tokens, k]`.
    ///
    /// # Errors
    /// A launch that the device can't make.
    fn execute(
        &self,
        layer: &LayerOperands,
        schedule: &Schedule,
        x: &Storage,
        residual: Option<&Storage>,
    ) -> Result<Storage, DeviceError>;

    /// Queues a schedule with other rows in place of some of x's: with a copy of x that has them, unless a backend has something
    /// better.
    ///
    /// # Errors
    /// As [`Self::execute`]; the device can't hold the copy.
    fn execute_replaced(
        &self,
        layer: &LayerOperands,
        schedule: &Schedule,
        x: &Storage,
        replaced: ReplacedRows<'_>,
        residual: Option<&Storage>,
    ) -> Result<Storage, DeviceError> {
        let (d, activations) = (layer.shape().d as usize, layer.format().activations);
        let mut whole = self.resized(x, schedule.tokens() as usize * d, activations)?;
        let mut rest = replaced.values;
        for piece in replaced.pieces {
            let (own, behind) = rest.split_at(piece.len() * d);
            self.write(&mut whole, piece.start * d, own, activations)?;
            rest = behind;
        }
        self.execute(layer, schedule, &whole, residual)
    }

    /// Whether there is [`Self::execute_gated`].
    fn has_gates(&self) -> bool {
        false
    }

    /// Queues a schedule whose low-rank sums are multiplied by gates, with other rows in place of some of x's where there are such.
    /// `None`, and nothing done, where the backend can't.
    fn execute_gated(
        &self,
        layer: &LayerOperands,
        schedule: &Schedule,
        (x, replaced): (&Storage, Option<ReplacedRows<'_>>),
        gates: RankGates<'_>,
        residual: Option<&Storage>,
    ) -> Option<Result<Storage, DeviceError>> {
        let _ = (layer, schedule, x, replaced, gates, residual);
        None
    }

    /// Queues a backward pass: x `[tokens, d]` and g `[tokens, k]`, the gradient of the sum before bias, activation and residual.
    /// `None`, and nothing done, where the backend has none.
    fn backward(
        &self,
        layer: &LayerOperands,
        schedule: &BackwardSchedule,
        x: &Storage,
        g: &Storage,
        wanted: Wanted,
    ) -> Option<Result<Gradients<Storage>, DeviceError>> {
        let _ = (layer, schedule, x, g, wanted);
        None
    }

    /// Multiplies rows in host memory by sparse matrices. A number is the sum of the products of a column in their order, in f32, each
    /// rounded by itself, whatever rows are beside it. Plain loops, unless a backend has something better.
    fn multiply_sparse(&self, products: &mut [SparseRows<'_>]) {
        for SparseRows { x, matrix, y } in products {
            let [inputs, outputs] = matrix.shape();
            for (x, y) in x.chunks_exact(inputs.max(1)).zip(y.chunks_exact_mut(outputs.max(1))) {
                for (column, y) in y.iter_mut().enumerate() {
                    let (places, values) = matrix.column(column);
                    *y = places.iter().zip(values).fold(0.0, |sum, (place, value)| sum + value * x[*place as usize]);
                }
            }
        }
    }

    /// Makes the W_i that `step` describes, and says in which format it is.
    ///
    /// # Errors
    /// A weight that the device can't hold.
    fn merge(&self, layer: &LayerOperands, step: &Materialised) -> Result<Storage, DeviceError>;

    /// The format of what [`Self::merge`] makes for such a layer.
    fn merged_format(&self, format: LayerFormat) -> WeightFormat;

    /// Waits until everything queued is done.
    ///
    /// # Errors
    /// Some of it failed.
    fn synchronize(&self) -> Result<(), DeviceError>;

    /// Seconds of what `work` queues, by the device's own clock; `None`, and nothing done, where it has none.
    fn device_seconds(&self, work: &mut Queueing<'_>) -> Option<Result<f64, DeviceError>>;

    /// The same backend with what tuning chose.
    fn tuned(&self, blueprints: &Blueprints) -> Arc<dyn Backend>;

    /// The same backend, rounding activations to 8 bits where they meet quantised base weights; `None` where it has no such products.
    fn rounding_activations(&self) -> Option<Arc<dyn Backend>> {
        None
    }

    /// Does `work` without the rounding of [`Self::rounding_activations`], whichever thread runs it.
    ///
    /// # Errors
    /// What `work` says.
    fn unrounded(&self, work: &mut Queueing<'_>) -> Result<(), DeviceError> {
        work()
    }

    /// What decoders do between projections; `None` where the backend has no such kernels.
    fn decoder_kernels(&self) -> Option<&dyn DecoderKernels> {
        None
    }

    /// Tiles to choose from; none where there is no choice.
    fn tiles(&self, format: LayerFormat) -> Vec<Tile>;

    /// What the libraries below call the device, for whoever shares its memory.
    fn place(&self) -> &dyn Any;
}
