//! Runs a schedule on a cubecl device: one function a step, each uploading its index tables and launching its kernels. Generic
//! over the runtime, so that CUDA, wgpu and the offline targets go through the same code.

use bytemuck::Pod;
use cubecl::prelude::*;
use cubecl::server::Handle;
use cubek_matmul::definition::{MatmulElems, MatmulGlobalElems};
use cubek_matmul::launch::launch_tiling::launch_ref;
use cubek_matmul::routines::BlueprintStrategy;
use cubek_matmul::routines::simple_unit::SimpleUnitAlgorithm;
use cubek_std::InputBinding;

use crate::batch::LayerShape;
use crate::kernels::materialise::materialise;
use crate::kernels::rows::{finish_rows, gather_rows, scatter_rows};
use crate::kernels::segmented::{EXPAND_COLUMN_VECTORS, SEGMENT_TILE_RANKS, SEGMENT_TILE_ROWS, expand, shrink};
use crate::kernels::stacked::{TILE_COLUMNS, stacked};
use crate::kernels::{Epilogue, StackedBlueprint};
use crate::schedule::{LowRankBmm, Materialised, Packing, Schedule, SegmentItem, Step, VirtualRow};

/// A layer's operands on the device, f32, row-major.
#[derive(Clone, Debug)]
pub struct LayerBuffers {
    /// Extents.
    pub shape: LayerShape,
    /// `[d, k]`
    pub base_weight: Handle,
    /// `[k]`
    pub bias: Option<Handle>,
    /// `[slots, d]`, at least one slot.
    pub in_pool: Pool,
    /// `[slots, k]`, at least one slot.
    pub out_pool: Pool,
    /// Bias and activation.
    pub epilogue: Epilogue,
}

/// Vectors of the adapters that are on the device.
#[derive(Clone, Debug)]
pub struct Pool {
    /// `[slots, width]`
    pub handle: Handle,
    /// How many vectors.
    pub slots: u32,
}

/// Why a schedule can't be launched.
#[derive(Clone, Debug, PartialEq, Eq, thiserror::Error)]
pub enum LaunchError {
    /// More cubes in one direction than the device counts.
    #[error("{what} needs {cubes} work items in one launch and the device takes {limit}; split the batch")]
    TooManyCubes {
        /// Which kernel.
        what: &'static str,
        /// How many.
        cubes: u64,
        /// The device's limit.
        limit: u32,
    },
    /// The schedule names vectors that the pools lack.
    #[error("the batch's adapters lie in {needed} slots of the {pool} pool, which has {slots}; load them again")]
    Slots {
        /// "in" or "out".
        pool: &'static str,
        /// Slots that the schedule names.
        needed: u32,
        /// Slots that there are.
        slots: u32,
    },
    /// The schedule was made for another layer.
    #[error("the batch was laid out for a weight of {schedule:?} and this one is {layer:?}; lay it out for each")]
    OtherLayer {
        /// What it was made for.
        schedule: LayerShape,
        /// What it was launched with.
        layer: LayerShape,
    },
    /// A result or an intermediate that the device can't hold in one buffer.
    #[error(
        "the batch needs a buffer of {bytes} bytes and the device takes {limit}; split the batch, or use another lowering"
    )]
    BufferTooLarge {
        /// What it needs.
        bytes: u64,
        /// The device's limit.
        limit: u64,
    },
    /// More adapters than kernels can index.
    #[error("the {pool} pool has {elements} elements and kernels index 2^31; load fewer adapters")]
    PoolTooLarge {
        /// "in" or "out".
        pool: &'static str,
        /// Its size.
        elements: u64,
    },
    /// The matmul library refuses the shape or the device.
    #[error("the matmul of [{batch}, {rows}, {depth}] by [{depth}, {columns}] can't run on this device: {reason}")]
    Matmul {
        /// Matrices.
        batch: usize,
        /// Rows of each.
        rows: usize,
        /// Contracted extent.
        depth: usize,
        /// Columns of each.
        columns: usize,
        /// The library's words.
        reason: String,
    },
}

/// Launches a schedule: reads x `[tokens, d]`, returns y `[tokens, k]`. The launches are queued; errors of the device itself
/// surface when y is read.
///
/// # Errors
/// A schedule of another layer or of slots that the pools lack, a launch that the device can't hold, a matmul that the library
/// refuses.
///
/// # Safety
/// The buffers belong to `client` and hold, in f32, what [`LayerBuffers`] says and `x` holds `[tokens, d]`: kernels read and
/// write them without looking at their lengths.
pub unsafe fn launch<R: Runtime>(
    client: &ComputeClient<R>,
    layer: &LayerBuffers,
    schedule: &Schedule,
    x: &Handle,
) -> Result<Handle, LaunchError> {
    check(schedule, layer.shape, layer.in_pool.slots, layer.out_pool.slots)?;
    let LayerShape { d, k } = layer.shape;
    let y = allocate(client, schedule.tokens() as usize * k as usize)?;
    let run = Run { client, layer, tokens: schedule.tokens(), x, y: &y, d, k };
    for step in schedule.steps() {
        match step {
            Step::BaseGemm => run.base_gemm()?,
            Step::Stacked(rows) => {
                let finishes = schedule.steps().len() == 1;
                run.stacked(rows, if finishes { layer.epilogue } else { Epilogue::default() })?;
            }
            Step::Materialised(step) => run.materialised(step)?,
            Step::Segmented { items, h_len } => run.segmented(items, *h_len)?,
            Step::LowRankBmm(step) => run.low_rank_bmm(step)?,
            Step::Finish => run.finish(),
        }
    }
    Ok(y)
}

/// A buffer of f32. cubecl answers one that the device can't hold by a result that is never written.
fn allocate<R: Runtime>(client: &ComputeClient<R>, elements: usize) -> Result<Handle, LaunchError> {
    let bytes = elements.max(1) as u64 * size_of::<f32>() as u64;
    let limit = client.properties().memory.max_page_size;
    if bytes > limit {
        return Err(LaunchError::BufferTooLarge { bytes, limit });
    }
    Ok(client.empty(bytes as usize))
}

/// Whether a schedule is one of a layer of this shape whose pools have so many slots.
///
/// # Errors
/// A schedule of another layer or of slots that the pools lack; pools that kernels can't index.
pub fn check(schedule: &Schedule, shape: LayerShape, in_slots: u32, out_slots: u32) -> Result<(), LaunchError> {
    if shape != schedule.shape() {
        return Err(LaunchError::OtherLayer { schedule: schedule.shape(), layer: shape });
    }
    let pools = [("in", schedule.in_slots(), in_slots, shape.d), ("out", schedule.out_slots(), out_slots, shape.k)];
    for (pool, needed, slots, width) in pools {
        if needed > slots {
            return Err(LaunchError::Slots { pool, needed, slots });
        }
        let elements = u64::from(slots) * u64::from(width);
        if elements > i32::MAX as u64 {
            return Err(LaunchError::PoolTooLarge { pool, elements });
        }
    }
    Ok(())
}

/// What every step of one batch sees.
struct Run<'a, R: Runtime> {
    client: &'a ComputeClient<R>,
    layer: &'a LayerBuffers,
    tokens: u32,
    x: &'a Handle,
    y: &'a Handle,
    d: u32,
    k: u32,
}

/// An index table on the device.
struct Table {
    handle: Handle,
    words: usize,
}

impl Table {
    fn argument<R: Runtime>(&self) -> ArrayArg<R> {
        array(&self.handle, self.words)
    }
}

/// A matrix or a batch of them in a buffer.
struct Matrices<'a> {
    handle: &'a Handle,
    batch: usize,
    rows: usize,
    columns: usize,
    /// Stored as `[batch, columns, rows]`.
    transposed: bool,
}

/// Units of an elementwise cube.
const ELEMENTWISE_UNITS: u32 = 256;
/// The axis limit of WebGPU; CUDA's y and z are the same.
const AXIS_LIMIT: u32 = 65_535;

impl<R: Runtime> Run<'_, R> {
    /// Uploads an index table, words of 32 bits to a kernel.
    fn table<T: Pod>(&self, entries: &[T]) -> Table {
        let handle = self.client.create_from_slice(bytemuck::cast_slice(entries));
        Table { handle, words: size_of_val(entries) / size_of::<u32>() }
    }

    fn scratch(&self, elements: usize) -> Result<Handle, LaunchError> {
        allocate(self.client, elements)
    }

    /// 16-byte loads where every row starts on one.
    fn vector_size(&self, width: u32) -> usize {
        let widest = self.client.properties().hardware.max_vector_size;
        if width.is_multiple_of(4) && widest >= 4 { 4 } else { 1 }
    }

    fn axis(&self, what: &'static str, cubes: usize) -> Result<u32, LaunchError> {
        u32::try_from(cubes).ok().filter(|cubes| *cubes <= AXIS_LIMIT).ok_or(LaunchError::TooManyCubes {
            what,
            cubes: cubes as u64,
            limit: AXIS_LIMIT,
        })
    }

    /// Cubes for `elements` units, over two axes because one is short.
    fn elementwise(&self, elements: usize) -> CubeCount {
        let cubes = elements.div_ceil(ELEMENTWISE_UNITS as usize);
        let x = cubes.clamp(1, AXIS_LIMIT as usize);
        CubeCount::Static(x as u32, cubes.div_ceil(x).max(1) as u32, 1)
    }

    fn bias(&self) -> ArrayArg<R> {
        // A kernel without a bias never reads the buffer that stands in for it.
        match &self.layer.bias {
            Some(bias) => array(bias, self.k as usize),
            None => array(&self.layer.out_pool.handle, self.k as usize),
        }
    }

    fn base_gemm(&self) -> Result<(), LaunchError> {
        let (tokens, d, k) = (self.tokens as usize, self.d as usize, self.k as usize);
        self.matmul(
            Matrices { handle: self.x, batch: 1, rows: tokens, columns: d, transposed: false },
            Matrices { handle: &self.layer.base_weight, batch: 1, rows: d, columns: k, transposed: false },
            self.y,
        )
    }

    fn stacked(&self, rows: &[VirtualRow], epilogue: Epilogue) -> Result<(), LaunchError> {
        let hardware = &self.client.properties().hardware;
        let fits = |blueprint: &StackedBlueprint| {
            blueprint.shared_bytes() <= hardware.max_shared_memory_size
                && blueprint.units() <= hardware.max_units_per_cube
        };
        let (items, tile_rows) =
            stacked_items(rows, |tile_rows| fits(&StackedBlueprint { tile_rows, scaled: true, epilogue }));
        let blueprint = StackedBlueprint {
            tile_rows,
            scaled: rows.iter().any(|row| row.in_slot > 0 || row.out_slot > 0),
            epilogue,
        };
        let (width_d, width_k) = (self.vector_size(self.d), self.vector_size(self.k));
        let cubes = CubeCount::Static(self.k.div_ceil(TILE_COLUMNS), self.axis("the stacked kernel", items.len())?, 1);
        let (rows, items) = (self.table(rows), self.table(&items));
        // SAFETY: the kernel guards its indices by d, k and the counts; rows are within the batch because a schedule says so,
        // slots within the pools by `check`.
        unsafe {
            stacked::launch_unchecked::<R>(
                self.client,
                cubes,
                CubeDim::new_1d(blueprint.units()),
                width_d,
                width_k,
                array(self.x, self.tokens as usize * self.d as usize / width_d),
                array(&self.layer.base_weight, self.d as usize * self.k as usize / width_k),
                array(&self.layer.in_pool.handle, self.layer.in_pool.slots as usize * self.d as usize / width_d),
                array(&self.layer.out_pool.handle, self.layer.out_pool.slots as usize * self.k as usize),
                rows.argument(),
                items.argument(),
                self.bias(),
                array(self.y, self.tokens as usize * self.k as usize),
                self.d,
                self.k,
                blueprint,
            )
        };
        Ok(())
    }

    fn materialised(&self, step: &Materialised) -> Result<(), LaunchError> {
        let (d, k) = (self.d as usize, self.k as usize);
        let (count, block) = (step.adapters.len(), step.rows.block as usize);
        let weights = self.scratch(count * d * k)?;
        let width_k = self.vector_size(self.k);
        let columns = (self.k as usize / width_k).div_ceil(ELEMENTWISE_UNITS as usize) as u32;
        let cubes = CubeCount::Static(
            columns,
            self.axis("the inputs of materialised weights", d)?,
            self.axis("materialised weights", count)?,
        );
        let (entries, scales) = (self.table(&step.adapters), self.table(&step.scales));
        // SAFETY: the kernel guards its indices by d, k and the counts; rows are within the batch because a schedule says so,
        // slots within the pools by `check`.
        unsafe {
            materialise::launch_unchecked::<R>(
                self.client,
                cubes,
                CubeDim::new_1d(ELEMENTWISE_UNITS),
                width_k,
                array(&self.layer.base_weight, d * k / width_k),
                array(&self.layer.in_pool.handle, self.layer.in_pool.slots as usize * d),
                array(&self.layer.out_pool.handle, self.layer.out_pool.slots as usize * k / width_k),
                entries.argument(),
                scales.argument(),
                array(&weights, count * d * k / width_k),
                self.d,
                self.k,
            )
        };
        let packed = self.gather(self.x, self.tokens as usize, &step.rows, self.d)?;
        let outputs = self.scratch(count * block * k)?;
        self.matmul(
            Matrices { handle: &packed, batch: count, rows: block, columns: d, transposed: false },
            Matrices { handle: &weights, batch: count, rows: d, columns: k, transposed: false },
            &outputs,
        )?;
        self.scatter(&outputs, &step.rows, false);
        Ok(())
    }

    fn segmented(&self, items: &[SegmentItem], h_len: u32) -> Result<(), LaunchError> {
        let h = self.scratch(h_len as usize)?;
        let largest_rank = items.iter().map(|item| item.rank).max().unwrap_or(0);
        let count = self.axis("the segmented kernels", items.len())?;
        let items = self.table(items);
        let units = CubeDim::new_1d(SEGMENT_TILE_ROWS * SEGMENT_TILE_RANKS);
        // SAFETY: the kernel guards its indices by d, k and the counts; rows are within the batch because a schedule says so,
        // slots within the pools by `check`.
        unsafe {
            shrink::launch_unchecked::<R>(
                self.client,
                CubeCount::Static(largest_rank.div_ceil(SEGMENT_TILE_RANKS), count, 1),
                units,
                array(self.x, self.tokens as usize * self.d as usize),
                array(&self.layer.in_pool.handle, self.layer.in_pool.slots as usize * self.d as usize),
                items.argument(),
                array(&h, h_len as usize),
                self.d,
            )
        };
        let width_k = self.vector_size(self.k);
        let vectors = self.k / width_k as u32;
        // SAFETY: the kernel guards its indices by d, k and the counts; rows are within the batch because a schedule says so,
        // slots within the pools by `check`.
        unsafe {
            expand::launch_unchecked::<R>(
                self.client,
                CubeCount::Static(vectors.div_ceil(EXPAND_COLUMN_VECTORS), count, 1),
                CubeDim::new_1d(SEGMENT_TILE_ROWS * EXPAND_COLUMN_VECTORS),
                width_k,
                array(&h, h_len as usize),
                array(&self.layer.out_pool.handle, self.layer.out_pool.slots as usize * vectors as usize),
                items.argument(),
                array(self.y, self.tokens as usize * vectors as usize),
                self.k,
            )
        };
        Ok(())
    }

    fn low_rank_bmm(&self, step: &LowRankBmm) -> Result<(), LaunchError> {
        let (d, k) = (self.d as usize, self.k as usize);
        let (block, rank) = (step.rows.block as usize, step.shrink.block as usize);
        let count = step.rows.index.len() / block.max(1);
        let rows = self.gather(self.x, self.tokens as usize, &step.rows, self.d)?;
        let shrink =
            self.gather(&self.layer.in_pool.handle, self.layer.in_pool.slots as usize, &step.shrink, self.d)?;
        let expand =
            self.gather(&self.layer.out_pool.handle, self.layer.out_pool.slots as usize, &step.expand, self.k)?;
        let hidden = self.scratch(count * block * rank)?;
        self.matmul(
            Matrices { handle: &rows, batch: count, rows: block, columns: d, transposed: false },
            Matrices { handle: &shrink, batch: count, rows: d, columns: rank, transposed: true },
            &hidden,
        )?;
        let outputs = self.scratch(count * block * k)?;
        self.matmul(
            Matrices { handle: &hidden, batch: count, rows: block, columns: rank, transposed: false },
            Matrices { handle: &expand, batch: count, rows: rank, columns: k, transposed: false },
            &outputs,
        )?;
        self.scatter(&outputs, &step.rows, true);
        Ok(())
    }

    fn finish(&self) {
        let count = self.tokens as usize * self.k as usize;
        // SAFETY: the kernel guards its indices by d, k and the counts; rows are within the batch because a schedule says so,
        // slots within the pools by `check`.
        unsafe {
            finish_rows::launch_unchecked::<R>(
                self.client,
                self.elementwise(count),
                CubeDim::new_1d(ELEMENTWISE_UNITS),
                array(self.y, count),
                self.bias(),
                self.k,
                count as u32,
                self.layer.epilogue,
            )
        };
    }

    fn gather(
        &self,
        source: &Handle,
        source_rows: usize,
        packing: &Packing,
        width: u32,
    ) -> Result<Handle, LaunchError> {
        let count = packing.index.len();
        let destination = self.scratch(count * width as usize)?;
        let lanes = self.vector_size(width);
        let vectors = width as usize / lanes;
        let index = self.table(&packing.index);
        // SAFETY: the kernel guards its indices by d, k and the counts; rows are within the batch because a schedule says so,
        // slots within the pools by `check`.
        unsafe {
            gather_rows::launch_unchecked::<R>(
                self.client,
                self.elementwise(count * vectors),
                CubeDim::new_1d(ELEMENTWISE_UNITS),
                lanes,
                array(source, source_rows * vectors),
                index.argument(),
                array(&destination, count * vectors),
                width,
                count as u32,
            )
        };
        Ok(destination)
    }

    fn scatter(&self, source: &Handle, packing: &Packing, add: bool) {
        let count = packing.index.len();
        let lanes = self.vector_size(self.k);
        let vectors = self.k as usize / lanes;
        let index = self.table(&packing.index);
        // SAFETY: the kernel guards its indices by d, k and the counts; rows are within the batch because a schedule says so,
        // slots within the pools by `check`.
        unsafe {
            scatter_rows::launch_unchecked::<R>(
                self.client,
                self.elementwise(count * vectors),
                CubeDim::new_1d(ELEMENTWISE_UNITS),
                lanes,
                array(source, count * vectors),
                index.argument(),
                array(self.y, self.tokens as usize * vectors),
                self.k,
                count as u32,
                add,
            )
        };
    }

    /// left `[batch, rows, depth]` by right `[batch, depth, columns]` through cubek-matmul.
    fn matmul(&self, left: Matrices, right: Matrices, out: &Handle) -> Result<(), LaunchError> {
        let element = f32::as_type_native_unchecked().storage_type();
        let globals = MatmulGlobalElems { lhs: element, rhs: element, out: element };
        let mut elements = MatmulElems::from_globals(&globals);
        let (batch, rows, depth, columns) = (left.batch, left.rows, left.columns, right.columns);
        let result = Matrices { handle: out, batch, rows, columns, transposed: false };
        // Register-tiled units: exact f32 on every device, where the tensor cores would round f32 to tf32. The routine is
        // named because the automatic choice panics on shapes that it can't serve, and because all of them take minutes to
        // build for every runtime. Not the double-buffered one, which is wrong where the depth is a single stage
        // (cubek-matmul 0.2.0, two matrices of [3, 8] by [8, 96]).
        let routine = BlueprintStrategy::<(), SimpleUnitAlgorithm>::default();
        launch_ref(
            self.client,
            InputBinding::new(binding(left), element),
            InputBinding::new(binding(right), element),
            binding(result),
            &routine,
            &mut elements,
        )
        .map_err(|error| LaunchError::Matmul { batch, rows, depth, columns, reason: format!("{error:?}") })
    }
}

fn array<R: Runtime>(handle: &Handle, elements: usize) -> ArrayArg<R> {
    // SAFETY: the number of elements is what this module allocated, or what the caller of `launch` vouches for.
    unsafe { ArrayArg::from_raw_parts(handle.clone(), elements) }
}

fn binding<R: Runtime>(matrices: Matrices) -> TensorBinding<R> {
    let Matrices { handle, batch, rows, columns, transposed } = matrices;
    let strides = if transposed { [rows * columns, 1, rows] } else { [rows * columns, columns, 1] };
    TensorBinding {
        handle: handle.clone().binding(),
        strides: strides.to_vec().into(),
        shape: vec![batch, rows, columns].into(),
        runtime: std::marker::PhantomData,
    }
}

/// Work items, each a range of virtual rows made of whole output rows, and the tile height. A cube walks its range tile by tile,
/// so only the last tile of an item is partly empty. `fits` says which tiles the device can hold; the smallest fits all.
fn stacked_items(rows: &[VirtualRow], fits: impl Fn(u32) -> bool) -> (Vec<[u32; 2]>, u32) {
    const TILES: [u32; 3] = [16, 32, 64];
    let needed = TILES.into_iter().find(|tile| rows.len() <= *tile as usize).unwrap_or(64);
    let tile_rows = TILES.into_iter().rev().find(|tile| *tile <= needed && fits(*tile)).unwrap_or(TILES[0]);
    let ends = rows.iter().enumerate().filter(|(_, row)| row.last == 1).map(|(position, _)| position as u32 + 1);
    let widest = ends.clone().scan(0, |start, end| Some(end - std::mem::replace(start, end))).max().unwrap_or(1);
    // Short items fill the device, long ones waste fewer rows at their ends: the shortest that is three quarters full.
    let target = [1, 2, 4, 8]
        .map(|tiles| tiles * tile_rows)
        .into_iter()
        .find(|target| target / widest * widest * 4 >= target * 3)
        .unwrap_or(8 * tile_rows);
    let mut items = Vec::new();
    let (mut start, mut row_start) = (0u32, 0u32);
    for end in ends {
        if end - start > target && row_start > start {
            items.push([start, row_start]);
            start = row_start;
        }
        row_start = end;
    }
    if start < row_start {
        items.push([start, row_start]);
    }
    (items, tile_rows)
}

#[cfg(test)]
mod tests {
    use super::*;

    fn rows(widths: &[u32]) -> Vec<VirtualRow> {
        let of = |(row, width): (usize, &u32)| {
            let width = *width;
            (0..width).map(move |at| VirtualRow {
                row: row as u32,
                in_slot: 0,
                out_slot: 0,
                last: u32::from(at + 1 == width),
            })
        };
        widths.iter().enumerate().flat_map(of).collect()
    }

    #[test]
    fn items_are_whole_rows_and_cover_all() {
        for widths in [vec![], vec![1], vec![65; 40], vec![1; 300], vec![3, 64, 1, 200, 7], vec![17; 33]] {
            let rows = rows(&widths);
            let (items, tile_rows) = stacked_items(&rows, |_| true);
            let mut next = 0;
            for [start, end] in items {
                assert_eq!(start, next);
                assert_eq!(rows[end as usize - 1].last, 1, "{widths:?}");
                next = end;
            }
            assert_eq!(next as usize, rows.len());
            assert!([16, 32, 64].contains(&tile_rows));
        }
    }

    #[test]
    fn the_tile_is_one_that_the_device_holds() {
        assert_eq!(stacked_items(&rows(&[1; 100]), |tile| tile <= 32).1, 32);
        assert_eq!(stacked_items(&rows(&[1; 100]), |_| false).1, 16);
        assert_eq!(stacked_items(&rows(&[1; 20]), |_| true).1, 32);
    }
}
