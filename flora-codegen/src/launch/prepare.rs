//! What a schedule's steps launch, made before the first of them is queued: launches, index tables and the size of every buffer.
//! So a batch that the device can't hold is refused whole. Nothing else sizes a buffer: `run` allocates and uploads what was
//! prepared here. [`can_hold`](flora_plan::schedule::can_hold) tells of a plan beforehand that all of this will fit.

use flora_plan::layer::{Element, Epilogue, LayerFormat, LayerShape, WeightFormat};
use flora_plan::schedule::{LowRankBmm, Materialised, Packing, Schedule, SegmentItem, Step, WeightRun};

use super::{LaunchError, LayerBuffers};
use crate::kernels::SegmentedBlueprint;
use crate::kernels::tables::{ExpandItem, H_START, Words};
use crate::routine::{self, Hardware, TileLaunch, TileTable, Wanted, shrink_tasks};

/// The axis limit of WebGPU; CUDA's y and z are the same.
pub(super) const AXIS_LIMIT: u32 = 65_535;
/// Units of an elementwise cube.
pub(super) const ELEMENTWISE_UNITS: u32 = 256;
/// Kernels index with 32 bits; half of them leave room for the last cube's units past the end.
const INDEX_LIMIT: u64 = i32::MAX as u64;

/// The size of a buffer that the device holds and kernels index.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) struct Size {
    elements: usize,
    bytes: usize,
}

impl Size {
    pub(super) fn elements(self) -> usize {
        self.elements
    }

    pub(super) fn bytes(self) -> usize {
        self.bytes
    }
}

/// An index table that the device holds.
pub(super) struct Table(Words);

impl Table {
    pub(super) fn words(&self) -> &[u32] {
        self.0.as_slice()
    }
}

/// A launch of the tile kernel, and where the depth is split the one that adds up.
pub(super) struct Tiles {
    pub(super) launch: TileLaunch,
    /// Types of the rows and the weight.
    pub(super) format: LayerFormat,
    pub(super) shape: LayerShape,
    pub(super) table: Table,
    /// Words of `table` that its parts start at.
    pub(super) items: u32,
    pub(super) scales: u32,
    pub(super) tasks: u32,
    /// The ticket and the low-rank sums of `fused`, twice (see [`LowRankSums`](super::LowRankSums)).
    pub(super) hidden: Option<Size>,
    /// `[splits, V, k]`
    pub(super) partial: Option<Size>,
    pub(super) cubes: [u32; 3],
}

/// A launch that makes W_i of some adapters.
pub(super) struct Made {
    pub(super) table: Table,
    /// The word that the scales start at.
    pub(super) scales: u32,
    /// Adapters.
    pub(super) count: usize,
    /// `[adapters, d, k]`
    pub(super) weights: Size,
    pub(super) cubes: [u32; 3],
}

/// The two launches of `segmented`.
pub(super) struct Segmented {
    pub(super) blueprint: SegmentedBlueprint,
    pub(super) table: Table,
    /// The word that the items start at.
    pub(super) first_item: u32,
    pub(super) tasks: u32,
    pub(super) items: u32,
    /// Cubes along the columns of `expand`.
    pub(super) columns: u32,
    pub(super) hidden: Size,
}

/// Rows gathered into blocks.
pub(super) struct Gathered {
    pub(super) index: Table,
    pub(super) block: u32,
    pub(super) rows: Size,
}

/// The launches of the `bmm` lowering of additive adapters.
pub(super) struct Batched {
    pub(super) rows: Gathered,
    pub(super) shrink: Gathered,
    pub(super) expand: Gathered,
    /// x @ b and (x @ b) @ a, block by block.
    pub(super) products: [(Tiles, Size); 2],
    /// Matrices, and rows of all of them.
    pub(super) count: usize,
    pub(super) all: usize,
}

/// A step of a schedule.
pub(super) enum Prepared {
    Gemm(Tiles),
    Materialised(Made, Tiles),
    Merged { adapter: u32, tiles: Tiles },
    Segmented(Segmented),
    LowRankBmm(Box<Batched>),
    Finish,
}

/// All steps of a schedule and its y.
pub(super) struct PreparedBatch {
    pub(super) y: Size,
    pub(super) steps: Vec<Prepared>,
}

/// What is launched on.
pub(super) struct Site<'a> {
    pub(super) hardware: &'a Hardware,
    pub(super) shape: LayerShape,
    pub(super) format: LayerFormat,
    pub(super) epilogue: Epilogue,
}

impl<'a> Site<'a> {
    pub(super) fn of(hardware: &'a Hardware, layer: &LayerBuffers) -> Self {
        let LayerBuffers { shape, format, epilogue, .. } = *layer;
        Self { hardware, shape, format, epilogue }
    }

    /// Every step of `schedule`.
    pub(super) fn prepare(&self, schedule: &Schedule) -> Result<PreparedBatch, LaunchError> {
        self.has_types()?;
        let y = self.size("outputs", &[schedule.tokens() as usize, self.shape.k as usize], self.format.activations)?;
        let steps = schedule.steps().iter().map(|step| self.step(step, schedule)).collect::<Result<_, _>>()?;
        Ok(PreparedBatch { y, steps })
    }

    /// What makes the W_i of `step`.
    pub(super) fn merge(&self, step: &Materialised) -> Result<Made, LaunchError> {
        self.has_types()?;
        self.made(step)
    }

    pub(super) fn has_types(&self) -> Result<(), LaunchError> {
        let LayerFormat { activations, adapters, weight, .. } = self.format;
        let weight = match weight {
            WeightFormat::Float(element) => element,
            _ => Element::F32,
        };
        let missing = [activations, adapters, weight].into_iter().find(|element| !self.hardware.has(*element));
        missing.map_or(Ok(()), |element| Err(LaunchError::NoElement(element)))
    }

    fn step(&self, step: &Step, schedule: &Schedule) -> Result<Prepared, LaunchError> {
        Ok(match step {
            Step::Gemm(gemm) => {
                let wanted = self.wanted(gemm.finishes, schedule.splits());
                Prepared::Gemm(self.tiles(wanted, routine::gemm(self.hardware, wanted, gemm)?)?)
            }
            Step::Materialised(step) => {
                let tiles = self.by_weights(&step.runs, self.wanted(step.finishes, false))?;
                Prepared::Materialised(self.made(step)?, tiles)
            }
            Step::Merged(step) => {
                let tiles = self.by_weights(&step.runs, self.wanted(step.finishes, schedule.splits()))?;
                Prepared::Merged { adapter: step.adapter, tiles }
            }
            Step::Segmented { items, h_len } => Prepared::Segmented(self.segmented(items, *h_len)?),
            Step::LowRankBmm(step) => Prepared::LowRankBmm(Box::new(self.low_rank_bmm(step)?)),
            Step::Finish => Prepared::Finish,
        })
    }

    /// Rows by weights that were made on the device.
    fn by_weights(&self, runs: &[WeightRun], wanted: Wanted) -> Result<Tiles, LaunchError> {
        let wanted = Wanted { format: self.made_format(), ..wanted };
        self.tiles(wanted, routine::runs(self.hardware, wanted, runs)?)
    }

    fn wanted(&self, finishes: bool, splits: bool) -> Wanted {
        let epilogue = if finishes { self.epilogue } else { Epilogue::default() };
        Wanted { shape: self.shape, format: self.format, epilogue, splits }
    }

    /// Weights that are made on the device, in the type of the activations.
    fn made_format(&self) -> LayerFormat {
        LayerFormat { weight: WeightFormat::Float(self.format.activations), ..self.format }
    }

    /// The size of a buffer of these extents.
    pub(super) fn size(&self, what: &'static str, extents: &[usize], element: Element) -> Result<Size, LaunchError> {
        size(self.hardware, what, extents, element)
    }

    pub(super) fn table(&self, words: Words) -> Result<Table, LaunchError> {
        self.size("index tables", &[words.as_slice().len()], Element::F32)?;
        Ok(Table(words))
    }

    pub(super) fn axis(&self, what: &'static str, cubes: usize) -> Result<u32, LaunchError> {
        within(what, cubes, AXIS_LIMIT)
    }

    fn tiles(&self, wanted: Wanted, launch: TileLaunch) -> Result<Tiles, LaunchError> {
        let Wanted { shape, format, .. } = wanted;
        let partial = [launch.splits as usize, launch.rows.len(), shape.k as usize];
        let partial = launch.blueprint.split.then(|| self.size("partial sums", &partial, Element::F32)).transpose()?;
        let hidden = [2, launch.hidden as usize + H_START as usize];
        let hidden = (launch.hidden > 0).then(|| self.size("low-rank sums", &hidden, Element::F32)).transpose()?;
        let (item_count, column_tiles) = (launch.items.len(), launch.column_tiles as usize);
        let cubes = if launch.hidden > 0 {
            // Exact, because a cube too many would take a ticket.
            let cubes = launch.tasks.len() + item_count * column_tiles * launch.splits as usize;
            [within("the tile kernel", cubes, self.hardware.cubes)?, 1, 1]
        } else {
            [self.axis("the tile kernel", item_count)?, self.axis("columns", column_tiles)?, launch.splits]
        };
        let TileTable { words, items, scales, tasks } = launch.table();
        Ok(Tiles { table: self.table(words)?, launch, format, shape, items, scales, tasks, hidden, partial, cubes })
    }

    /// W_i of the step's adapters, one after the other.
    fn made(&self, step: &Materialised) -> Result<Made, LaunchError> {
        let (d, k) = (self.shape.d as usize, self.shape.k as usize);
        let count = step.adapters.len();
        let weights = self.size("materialised weights", &[count, d, k], self.format.activations)?;
        let lanes = self.hardware.vector_size(self.shape.k, self.format);
        let columns = (k / lanes).div_ceil(ELEMENTWISE_UNITS as usize);
        let cubes = [
            self.axis("the columns of materialised weights", columns)?,
            self.axis("the inputs of materialised weights", d)?,
            self.axis("materialised weights", count)?,
        ];
        let mut words = Words::default();
        words.append(&step.adapters);
        let scales = words.append(&step.scales);
        Ok(Made { table: self.table(words)?, scales, count, weights, cubes })
    }

    fn segmented(&self, items: &[SegmentItem], h_len: u32) -> Result<Segmented, LaunchError> {
        let hidden = self.size("low-rank sums", &[h_len as usize], Element::F32)?;
        let tasks = shrink_tasks(items);
        let mut words = Words::default();
        words.append(&tasks);
        let first_item = words.append(&items.iter().map(ExpandItem::from).collect::<Vec<_>>());
        let blueprint =
            SegmentedBlueprint { multiply: self.hardware.multiply(self.format), plane_size: self.hardware.plane_size };
        let lanes = self.hardware.vector_size(self.shape.k, self.format);
        let columns = self.shape.k.div_ceil(blueprint.expand_columns(lanes as u32));
        Ok(Segmented {
            blueprint,
            table: self.table(words)?,
            first_item,
            tasks: self.axis("shrink", tasks.len())?,
            items: self.axis("expand", items.len())?,
            columns: self.axis("the columns of expand", columns as usize)?,
            hidden,
        })
    }

    /// Everything in blocks of one size, as a library's batched matmul wants it (paper A.2).
    fn low_rank_bmm(&self, step: &LowRankBmm) -> Result<Batched, LaunchError> {
        let LayerShape { d, k } = self.shape;
        let (block, rank) = (step.rows.block, step.shrink.block);
        let all = step.rows.index.len();
        let count = all as u32 / block.max(1);
        let own = self.format.activations;
        let format = LayerFormat { adapters: own, ..self.made_format() };
        let product = |what, shape: LayerShape| {
            // The pools' vectors are of the layer's lengths, which these matrices' aren't; without scales they aren't read.
            let wanted = Wanted { shape, format, epilogue: Epilogue::default(), splits: false };
            let tiles = self.tiles(wanted, routine::matrices(self.hardware, wanted, count, block)?)?;
            Ok::<_, LaunchError>((tiles, self.size(what, &[all, shape.k as usize], own)?))
        };
        Ok(Batched {
            rows: self.gathered("packed rows", &step.rows, d)?,
            shrink: self.gathered("packed shrink vectors", &step.shrink, d)?,
            expand: self.gathered("packed expand vectors", &step.expand, k)?,
            products: [
                product("low-rank sums", LayerShape { d, k: rank })?,
                product("packed outputs", LayerShape { d: rank, k })?,
            ],
            count: count as usize,
            all,
        })
    }

    fn gathered(&self, what: &'static str, packing: &Packing, width: u32) -> Result<Gathered, LaunchError> {
        let mut words = Words::default();
        words.append(&packing.index);
        let rows = self.size(what, &[packing.index.len(), width as usize], self.format.activations)?;
        Ok(Gathered { index: self.table(words)?, block: packing.block, rows })
    }
}

/// The size of a buffer of these extents.
pub(super) fn size(
    hardware: &Hardware,
    what: &'static str,
    extents: &[usize],
    element: Element,
) -> Result<Size, LaunchError> {
    let limit = hardware.largest_buffer.min(INDEX_LIMIT.saturating_mul(element.bytes()));
    let elements = extents.iter().try_fold(1u64, |all, extent| all.checked_mul(*extent as u64));
    let bytes = elements.and_then(|elements| elements.max(1).checked_mul(element.bytes()));
    let too_large = LaunchError::BufferTooLarge { what, bytes: bytes.unwrap_or(u64::MAX), limit };
    match (elements, bytes) {
        (Some(elements), Some(bytes)) if bytes <= limit => {
            // Two halves make the word that the device copies at least.
            Ok(Size { elements: elements as usize, bytes: bytes.next_multiple_of(4) as usize })
        }
        _ => Err(too_large),
    }
}

pub(super) fn within(what: &'static str, cubes: usize, limit: u32) -> Result<u32, LaunchError> {
    let fits = u32::try_from(cubes).ok().filter(|cubes| *cubes <= limit);
    fits.ok_or(LaunchError::TooManyCubes { what, cubes: cubes as u64, limit })
}
