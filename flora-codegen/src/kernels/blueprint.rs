//! The comptime keys of the kernels: what changes the generated code, and nothing of a batch.

pub use flora_plan::blueprints::Tile;
use flora_plan::layer::{Element, Epilogue, Quantisation};

use super::tables::TASK_SIDE;

/// How a tile is multiplied.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
pub enum Multiply {
    /// By units, each with a square of sums in its registers: exact f32 on every device.
    Fma,
    /// By planes, in fragments of m × n × k: tensor cores where the device has them. f32 sums.
    Cmma {
        /// Rows of a fragment.
        m: u32,
        /// Columns.
        n: u32,
        /// Depth.
        k: u32,
    },
    /// By planes of 32 as [`Multiply::Cmma`], the tensor cores' operands in registers of which each unit knows what they hold:
    /// m16n8k16, loaded by `ldmatrix`. f32 sums.
    Mma,
}

impl Multiply {
    /// The fragments of the low-rank kernels, m × n × k; `None` where units multiply.
    pub(crate) fn fragment(self) -> Option<(u32, u32, u32)> {
        match self {
            Multiply::Fma => None,
            Multiply::Cmma { m, n, k } => Some((m, n, k)),
            Multiply::Mma => Some((16, 16, 16)),
        }
    }
}

/// The comptime key of the tile kernel.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
pub struct TileBlueprint {
    /// How the tile is multiplied.
    pub multiply: Multiply,
    /// Units of a plane.
    pub plane_size: u32,
    /// What a cube multiplies.
    pub tile: Tile,
    /// How w0 is decoded as it is staged; `None` for floats.
    pub quantisation: Option<Quantisation>,
    /// Whether every step of d starts where a word of its blocks' scales does.
    pub even_blocks: bool,
    /// Whether a virtual row may have scales.
    pub scaled: bool,
    /// The type that tiles are staged in.
    pub stage: Element,
    /// Whether adapters' vectors have the type that is multiplied.
    pub adapters_alike: bool,
    /// Scaled virtual rows of a W_i (`on_chip`) whose vectors are staged at once; 0: no item has a W_i.
    pub on_chip: u32,
    /// Numbers of h that a tile's rows have at most; 0: no row has a low-rank sum (`fused`).
    pub hidden: u32,
    /// Whether an output row may have more virtual rows than the tile.
    pub carries: bool,
    /// Whether cubes share the depth and write partial sums.
    pub split: bool,
    /// What is applied before the write.
    pub epilogue: Epilogue,
}

/// Virtual rows in a unit's registers (without fragments).
pub(crate) const ROWS_PER_UNIT: u32 = 4;
/// Columns in a unit's registers (without fragments).
pub(crate) const COLUMNS_PER_UNIT: u32 = 4;
/// Elements that a staged line is longer than its tile, so that lines start in different banks and stay aligned.
pub(crate) const PAD: u32 = 8;
/// The same for lines of f32 sums.
pub(crate) const SUM_PAD: u32 = 8;
/// Virtual rows of an adapter whose product with one another is staged at once: a multiple of every fragment's depth.
pub(crate) const RANK_CHUNK: u32 = 16;
/// Alignment of staged tiles, in bytes: what loads of fragments ask for.
pub(crate) const ALIGNMENT: usize = 128;
/// Steps of d in a strip of a shrink task; a plane sums a strip by itself.
pub(crate) const SHRINK_STRIP: u32 = 16;
/// Strips that are staged at once.
pub(crate) const SHRINK_STRIPS: u32 = 8;
/// Steps of d that are staged at once.
pub(crate) const SHRINK_DEPTH: u32 = SHRINK_STRIP * SHRINK_STRIPS;

impl TileBlueprint {
    /// Planes of a cube.
    pub fn planes(&self) -> u32 {
        match self.multiply {
            Multiply::Fma => self.units() / self.plane_size.max(1),
            Multiply::Cmma { .. } | Multiply::Mma => self.tile.row_planes * self.tile.column_planes,
        }
    }

    /// Units of a cube.
    pub fn units(&self) -> u32 {
        match self.multiply {
            Multiply::Fma => (self.tile.rows / ROWS_PER_UNIT) * (self.tile.columns / COLUMNS_PER_UNIT),
            Multiply::Cmma { .. } | Multiply::Mma => self.plane_size * self.tile.row_planes * self.tile.column_planes,
        }
    }

    /// Fragments of a plane, down and across the product as it is multiplied: by [`Multiply::Mma`] that is the transpose.
    pub(crate) fn fragments(&self) -> (u32, u32) {
        match self.multiply {
            Multiply::Fma => (0, 0),
            Multiply::Mma => {
                (self.tile.columns / self.tile.column_planes / 16, self.tile.rows / self.tile.row_planes / 8)
            }
            Multiply::Cmma { m, n, .. } => {
                (self.tile.rows / self.tile.row_planes / m, self.tile.columns / self.tile.column_planes / n)
            }
        }
    }

    /// Whether an item may have more virtual rows than the tile.
    pub(crate) fn chunks(&self) -> bool {
        self.carries || self.split
    }

    /// Columns of sums that the epilogue sees at once.
    pub(crate) fn strip(&self) -> u32 {
        match self.multiply {
            Multiply::Fma => self.tile.columns,
            Multiply::Cmma { n, .. } => self.tile.column_planes * n,
            Multiply::Mma => self.tile.column_planes * 16,
        }
    }

    /// How many strips there are.
    pub(crate) fn strips(&self) -> u32 {
        self.tile.columns / self.strip()
    }

    /// Whether a W_i is made in registers, and never in shared memory.
    pub(crate) fn makes_weights_in_registers(&self) -> bool {
        self.on_chip > 0 && self.multiply == Multiply::Mma
    }

    /// Steps of d that shared memory holds: with two, a step is staged while another is multiplied, and one barrier is enough.
    pub(crate) fn stages(&self) -> u32 {
        match self.multiply {
            Multiply::Fma | Multiply::Cmma { .. } => 1,
            Multiply::Mma => 2,
        }
    }

    /// Bytes of shared memory, with `stage` bytes for an element of a staged tile.
    pub fn shared_bytes(&self, stage: u32) -> usize {
        let Tile { rows, columns, depth, .. } = self.tile;
        let tiles = self.stages() * (rows * (depth + PAD) + depth * (columns + PAD));
        // A few single numbers, and what aligning each array may cost.
        let mut bytes = 8 * ALIGNMENT as u32 + stage * tiles + 4 * rows * (self.strip() + SUM_PAD);
        if self.on_chip > 0 {
            bytes += stage * self.on_chip * (self.stages() * (depth + PAD) + columns + PAD);
            if self.multiply != Multiply::Mma {
                bytes += 4 * depth * (columns + SUM_PAD);
            }
        }
        if self.carries {
            bytes += 2 * 4 * columns;
        }
        if self.hidden > 0 {
            bytes += shrink_shared_bytes(self.multiply, self.units(), stage);
        }
        // No number of sums is too many to be counted.
        (bytes as usize).saturating_add(4usize.saturating_mul(self.hidden as usize))
    }
}

/// Bytes of shared memory of a shrink task.
fn shrink_shared_bytes(multiply: Multiply, units: u32, stage: u32) -> u32 {
    let result = 4 * TASK_SIDE * TASK_SIDE;
    result
        + match multiply {
            Multiply::Fma => 4 * units,
            Multiply::Cmma { .. } | Multiply::Mma => {
                2 * stage * TASK_SIDE * (SHRINK_DEPTH + PAD) + 4 * SHRINK_STRIPS * TASK_SIDE * TASK_SIDE
            }
        }
}

/// The comptime key of the kernels of `segmented`.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
pub struct SegmentedBlueprint {
    /// How tiles are multiplied.
    pub multiply: Multiply,
    /// Units of a plane.
    pub plane_size: u32,
}

impl SegmentedBlueprint {
    /// Planes of a cube.
    pub fn planes(&self) -> u32 {
        match self.multiply {
            Multiply::Fma => 1,
            Multiply::Cmma { .. } | Multiply::Mma => SHRINK_STRIPS,
        }
    }

    /// Units of a cube.
    pub fn units(&self) -> u32 {
        match self.multiply {
            Multiply::Fma => 256,
            Multiply::Cmma { .. } | Multiply::Mma => self.plane_size * SHRINK_STRIPS,
        }
    }
}

/// Scales of `outer` whose vectors are staged at once.
pub(crate) const SCALES: u32 = 16;
/// Scales of a unit of it.
pub(crate) const TOGETHER: u32 = 4;
/// Units that share the scales of one place.
pub(crate) const GROUPS: u32 = SCALES / TOGETHER;
/// Elements that a line of the product is longer than its tile: lines of four that are read downwards are in different banks.
pub(crate) const PRODUCT_PAD: u32 = 4;
/// Planes of a cube that multiplies by fragments, along each extent of its tile.
pub(crate) const PLANES: u32 = 2;

/// The comptime key of `outer`.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
pub struct OuterBlueprint {
    /// How G is multiplied.
    pub multiply: Multiply,
    /// Units of a plane.
    pub plane_size: u32,
    /// Inputs and outputs of a tile.
    pub side: u32,
    /// How w0 is decoded; `None` for floats.
    pub quantisation: Option<Quantisation>,
}

impl OuterBlueprint {
    /// Tiles, the largest first.
    pub const SIDES: [u32; 2] = [64, 32];

    /// Rows of an adapter that are staged at once.
    pub(crate) fn rows(&self) -> u32 {
        self.side / 2
    }

    /// Units of a cube.
    pub fn units(&self) -> u32 {
        match self.multiply {
            Multiply::Fma => (self.side / ROWS_PER_UNIT) * (self.side / COLUMNS_PER_UNIT),
            Multiply::Cmma { .. } | Multiply::Mma => self.plane_size * PLANES * PLANES,
        }
    }

    /// Bytes of shared memory, where tiles are staged as `stage`.
    pub fn shared_bytes(&self, stage: Element) -> usize {
        let Self { side, .. } = *self;
        let staged = 2 * stage.bytes() as u32 * self.rows() * (side + PAD);
        // What aligning each array may cost.
        let arrays = 4 * ALIGNMENT as u32;
        (arrays + staged + 4 * side * (side + PRODUCT_PAD) + 4 * SCALES * side) as usize
    }
}
