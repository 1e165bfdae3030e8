//! What routines ask of a device, read once.

use std::sync::Arc;

use cubecl::ir::features::{MmaConfig, TypeUsage};
use cubecl::ir::{DeviceProperties, ElemType, FloatKind, StorageType};
use flora_plan::blueprints::Blueprints;
use flora_plan::layer::{Element, LayerFormat, LayerShape, WeightFormat};
use flora_plan::schedule::most_splits;

use crate::kernels::tables::TASK_SIDE;
use crate::kernels::{Multiply, Tile};

/// The most cubes along one of two extents: as many parts of a sum are added up.
const MOST_ALONG: u32 = 32;

/// Rows of a tile from which on beside a quantised weight x is loaded by 16 bytes, and its steps are told from others if they start at
/// even blocks. Below, memory is what a tile waits for, and CUDA's assembler spills a register for the sake of more cubes.
pub(super) const WIDE_ROWS: u32 = 128;

/// What a routine asks of a device.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Hardware {
    /// Units that run in lockstep.
    pub plane_size: u32,
    /// Bytes of shared memory of a cube.
    pub shared_bytes: usize,
    /// Units of a cube.
    pub units: u32,
    /// Elements of a vector.
    pub vector: usize,
    /// Multiprocessors; where the device doesn't tell, what a small GPU has.
    pub multiprocessors: u32,
    /// Bytes of the cache that all multiprocessors share: less than the least of the cards that tell how many those are (40 MiB
    /// on an A100), little where nothing is known.
    pub cache_bytes: u64,
    /// Bytes of the largest buffer.
    pub largest_buffer: u64,
    /// Cubes of a launch along its first axis.
    pub cubes: u32,
    /// Which types of [`Element::ALL`] its buffers may have.
    buffers: [bool; 3],
    /// The fragment of each half type that sums in f32.
    fragments: [Option<Multiply>; 3],
    /// What tuning chose in place of the choices below.
    pub(super) blueprints: Arc<Blueprints>,
}

/// The storage type of an element.
pub(crate) fn storage(element: Element) -> StorageType {
    let kind = match element {
        Element::F32 => FloatKind::F32,
        Element::F16 => FloatKind::F16,
        Element::Bf16 => FloatKind::BF16,
    };
    ElemType::Float(kind).into()
}

impl Hardware {
    /// Of a cubecl device.
    pub fn of(properties: &DeviceProperties) -> Self {
        let fragment = |element: Element| {
            // f32 would be rounded to tf32.
            let own = storage(element);
            let fits = |config: &&MmaConfig| {
                let types = config.a_type == own && config.b_type == own && config.cd_type == storage(Element::F32);
                types && [config.m, config.n, config.k].iter().all(|side| *side >= 8 && TASK_SIDE.is_multiple_of(*side))
            };
            let configs = properties.features.matmul.cmma.iter().filter(fits);
            let largest = configs.max_by_key(|config| (config.m.min(config.n), config.k))?;
            let (m, n, k) = (largest.m, largest.n, largest.k);
            let known = |config: &MmaConfig| {
                let types = config.a_type == own && config.b_type == own && config.cd_type == storage(Element::F32);
                types && (config.m, config.n, config.k) == (16, 8, 16)
            };
            let matmul = &properties.features.matmul;
            // Where a unit knows what its registers hold, and loads them by four matrices at once.
            let by_registers = properties.hardware.plane_size_max == 32
                && matmul.mma.iter().any(known)
                && matmul.ldmatrix.contains(&own)
                && Multiply::Mma.fragment() == Some((m, n, k));
            let multiply = if by_registers { Multiply::Mma } else { Multiply::Cmma { m, n, k } };
            (element != Element::F32).then_some(multiply)
        };
        Self {
            plane_size: properties.hardware.plane_size_max.max(1),
            shared_bytes: properties.hardware.max_shared_memory_size,
            units: properties.hardware.max_units_per_cube,
            vector: properties.hardware.max_vector_size,
            multiprocessors: properties.hardware.num_streaming_multiprocessors.unwrap_or(16),
            cache_bytes: if properties.hardware.num_streaming_multiprocessors.is_some() { 32 << 20 } else { 1 << 20 },
            largest_buffer: properties.memory.max_page_size,
            cubes: properties.hardware.max_cube_count.0,
            buffers: Element::ALL.map(|element| properties.type_usage(storage(element)).contains(TypeUsage::Buffer)),
            fragments: Element::ALL.map(fragment),
            blueprints: Arc::default(),
        }
    }

    /// The same device with what tuning chose.
    #[must_use]
    pub fn tuned(&self, blueprints: &Blueprints) -> Self {
        Self { blueprints: Arc::new(blueprints.clone()), ..self.clone() }
    }

    /// Whether buffers may have this type.
    pub(crate) fn has(&self, element: Element) -> bool {
        Element::ALL.iter().zip(self.buffers).any(|(one, held)| *one == element && held)
    }

    /// How matrices of `format` are multiplied.
    pub fn multiply(&self, format: LayerFormat) -> Multiply {
        let own = Element::ALL.iter().position(|element| *element == format.activations);
        let fragment = own.and_then(|own| self.fragments[own]).filter(|_| format.fragments);
        fragment.unwrap_or(Multiply::Fma)
    }

    /// The type that tiles are staged in.
    pub(crate) fn stage(&self, format: LayerFormat) -> Element {
        match self.multiply(format) {
            Multiply::Fma => Element::F32,
            Multiply::Cmma { .. } | Multiply::Mma => format.activations,
        }
    }

    /// Elements of a vector of a line of `width` outputs, 16 bytes where every line starts on one.
    pub(crate) fn vector_size(&self, width: u32, format: LayerFormat) -> usize {
        let weight = match format.weight {
            WeightFormat::Float(element) => element.bytes(),
            _ => 4,
        };
        self.vector_of(width, weight, format)
    }

    /// The same of a line of inputs of the tile kernel: by fragments in registers, words of a quantised weight stand in no vector of
    /// x's way where there are many rows.
    pub(crate) fn input_vector_size(&self, width: u32, format: LayerFormat, tile: Tile) -> usize {
        if self.multiply(format) == Multiply::Mma && tile.rows >= WIDE_ROWS {
            self.vector_of(width, 1, format)
        } else {
            self.vector_size(width, format)
        }
    }

    fn vector_of(&self, width: u32, weight: u64, format: LayerFormat) -> usize {
        let widest = format.activations.bytes().max(format.adapters.bytes()).max(weight);
        // Units sum four columns in their registers.
        let most = if self.multiply(format) == Multiply::Fma { 4 } else { 16 / widest as usize };
        [8, 4, 2]
            .into_iter()
            .find(|size| *size <= most.min(self.vector) && (width as usize).is_multiple_of(*size))
            .unwrap_or(1)
    }

    /// Elements of a vector of lines of `width` numbers of one type that lie one behind the other: 16 bytes where every line starts on
    /// one.
    pub(crate) fn line_vector_size(&self, width: usize, element: Element) -> usize {
        let most = (16 / element.bytes() as usize).min(self.vector);
        [8, 4, 2].into_iter().find(|size| *size <= most && width.is_multiple_of(*size)).unwrap_or(1)
    }

    /// Cubes along each of two extents that fill the device twice.
    pub(crate) fn cubes_along(&self) -> u32 {
        let most = self.multiprocessors.saturating_mul(2);
        (1..=MOST_ALONG).find(|along| along * along >= most).unwrap_or(MOST_ALONG)
    }

    /// How many cubes share the depth of a layer: as many as fill the device where its column tiles don't. Not a matter of the
    /// batch, or a row's bits would be.
    pub(crate) fn splits(&self, shape: LayerShape) -> u32 {
        let tiles = shape.k.div_ceil(64).max(1);
        (self.multiprocessors.saturating_mul(2) / tiles).clamp(1, most_splits(shape))
    }
}
