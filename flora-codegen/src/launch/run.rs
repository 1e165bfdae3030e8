//! The steps of one batch: one function a step, each uploading its index tables and launching its kernels.

use cubecl::ir::{ElemType, StorageType, UIntKind};
use cubecl::prelude::*;
use cubecl::server::Handle;
use flora_runtime::OperandError;

use super::low_rank_sums::{Half, LowRankSums};
use super::prepare::{AXIS_LIMIT, Batched, ELEMENTWISE_UNITS, Gathered, Made, Prepared, Segmented, Size, Table, Tiles};
use super::{LaunchError, LayerBuffers};
use crate::kernels::expand::expand;
use crate::kernels::materialise::materialise;
use crate::kernels::reduce::reduce;
use crate::kernels::rows::{add_rows, finish_rows, gather_columns, gather_rows};
use crate::kernels::shrink::shrink;
use crate::kernels::tables::LayoutLaunch;
use crate::kernels::tile::tile;
use crate::kernels::{ReduceBlueprint, SegmentedBlueprint};
use crate::routine::{Hardware, storage};
use flora_plan::layer::{Element, LayerFormat, LayerShape, WeightFormat};
use flora_plan::schedule::Kept;

/// What every step of one batch sees.
pub(super) struct Run<'a, R: Runtime> {
    pub(super) client: &'a ComputeClient<R>,
    pub(super) hardware: &'a Hardware,
    pub(super) layer: &'a LayerBuffers,
    sums: &'a LowRankSums,
    pub(super) tokens: usize,
    /// Tables that the schedule's last layer uploaded.
    kept: &'a Kept,
    pub(super) x: &'a Handle,
    residual: Option<&'a Handle>,
    y: Handle,
    /// Stands in for what a kernel doesn't read.
    nothing: Handle,
    pub(super) d: u32,
    k: u32,
}

/// An index table on the device.
pub(super) struct Uploaded {
    handle: Handle,
    words: usize,
}

/// A table that is on a device.
struct KeptTable<R: Runtime> {
    client: ComputeClient<R>,
    words: Box<[u32]>,
    handle: Handle,
}

impl Uploaded {
    pub(super) fn argument<R: Runtime>(&self) -> ArrayArg<R> {
        array(&self.handle, self.words)
    }
}

/// What a tile launch multiplies: rows of `width` by matrices `[width, columns]`.
struct Operands<'a> {
    x: &'a Handle,
    x_rows: usize,
    weight: &'a Handle,
    /// Matrices one after the other.
    weights: usize,
    y: &'a Handle,
    y_rows: usize,
}

impl<'a, R: Runtime> Run<'a, R> {
    pub(super) fn new(
        (client, sums): (&'a ComputeClient<R>, &'a LowRankSums),
        hardware: &'a Hardware,
        layer: &'a LayerBuffers,
        (tokens, kept): (u32, &'a Kept),
        x: &'a Handle,
        residual: Option<&'a Handle>,
        y: Handle,
    ) -> Self {
        let LayerShape { d, k } = layer.shape;
        Self {
            client,
            hardware,
            layer,
            sums,
            tokens: tokens as usize,
            kept,
            x,
            residual,
            y,
            nothing: client.empty(16),
            d,
            k,
        }
    }

    /// Every step in order; y.
    pub(super) fn steps(self, steps: &[Prepared]) -> Result<Handle, LaunchError> {
        for step in steps {
            match step {
                Prepared::Gemm(tiles) => self.tiles(tiles, &self.operands(&self.layer.base_weight, 1)),
                Prepared::Materialised(made, tiles) => {
                    self.tiles(tiles, &self.operands(&self.made(made), made.count));
                }
                Prepared::Merged { adapter, tiles } => self.merged(*adapter, tiles)?,
                Prepared::Segmented(step) => self.segmented(step),
                Prepared::LowRankBmm(step) => self.low_rank_bmm(step),
                Prepared::Finish => self.finish(),
            }
        }
        Ok(self.y)
    }

    /// The batch's rows by `weights` matrices of the layer's shape.
    fn operands<'b>(&'b self, weight: &'b Handle, weights: usize) -> Operands<'b> {
        Operands { x: self.x, x_rows: self.tokens, weight, weights, y: &self.y, y_rows: self.tokens }
    }

    fn allocate(&self, size: Size) -> Handle {
        allocate(self.client, size)
    }

    /// An index table, uploaded once for all layers that run the schedule.
    pub(super) fn table(&self, table: &Table) -> Uploaded {
        match table.words() {
            [] => self.upload(&[]),
            words => uploaded_once(self.client, self.kept, words),
        }
    }

    /// Uploads words of 32 bits.
    fn upload(&self, words: &[u32]) -> Uploaded {
        let handle = if words.is_empty() {
            self.nothing.clone()
        } else {
            self.client.create_from_slice(bytemuck::cast_slice(words))
        };
        Uploaded { handle, words: words.len().max(1) }
    }

    /// Cubes for `elements` units.
    pub(super) fn elementwise(&self, elements: usize) -> CubeCount {
        elementwise(elements)
    }

    fn optional(&self, handle: Option<&Handle>, elements: usize) -> ArrayArg<R> {
        match handle {
            Some(handle) => array(handle, elements),
            None => array(&self.nothing, 1),
        }
    }

    /// w0, in vectors of `lanes`.
    pub(super) fn weight(&self, lanes: usize) -> ArrayArg<R> {
        let values = self.layer.format.weight.values(self.layer.shape) as usize;
        array(&self.layer.base_weight, values / lanes)
    }

    /// Its scales, likewise.
    pub(super) fn weight_scales(&self, lanes: usize) -> ArrayArg<R> {
        let words = self.layer.format.weight.scale_words(self.layer.shape) as usize;
        self.optional(self.layer.weight_scales.as_ref(), words / lanes)
    }

    fn bias(&self, lanes: usize) -> ArrayArg<R> {
        self.optional(self.layer.bias.as_ref(), self.k as usize / lanes)
    }

    fn residual(&self, lanes: usize) -> ArrayArg<R> {
        self.optional(self.residual, self.tokens * self.k as usize / lanes)
    }

    /// One launch of the tile kernel, and where the depth is split the one that adds up.
    fn tiles(&self, tiles: &Tiles, operands: &Operands) {
        let Operands { x, x_rows, weight, weights, y, y_rows } = *operands;
        let Tiles { launch, format, shape, items, scales: scale_words, tasks, .. } = tiles;
        let (d, k) = (shape.d as usize, shape.k as usize);
        let blueprint = launch.blueprint;
        let lanes_d = self.hardware.input_vector_size(shape.d, *format, blueprint.tile);
        let lanes_k = self.hardware.vector_size(shape.k, *format);
        let stage = storage(self.hardware.stage(*format));
        let partial = tiles.partial.map(|size| (self.allocate(size), size.elements()));
        let activations = storage(format.activations);
        let out_type = if partial.is_some() { storage(Element::F32) } else { activations };
        let tables = self.table(&tiles.table);
        let hidden = tiles.hidden.map_or_else(
            || Half { handle: self.nothing.clone(), words: 1, first: 0, stale: 0, stale_count: 0 },
            |size| self.sums.take(self.client, size, self.hardware.largest_buffer),
        );
        let [x_cubes, y_cubes, z_cubes] = tiles.cubes;
        let cubes = CubeCount::Static(x_cubes, y_cubes, z_cubes);
        let dim = CubeDim::new_1d(blueprint.units());
        let layout = LayoutLaunch::new(
            shape.d,
            shape.k,
            *items,
            launch.items.len() as u32,
            *scale_words,
            *tasks,
            launch.tasks.len() as u32,
            launch.column_tiles,
            launch.depth,
            launch.rows.len() as u32,
            hidden.first,
            hidden.stale,
            hidden.stale_count,
        );
        let scales = self.layer.weight_scales.as_ref().filter(|_| blueprint.quantisation.is_some());
        let (in_slots, out_slots) = (self.layer.in_pool.slots as usize, self.layer.out_pool.slots as usize);
        // SAFETY: the kernel guards its indices by d, k and the counts; rows are within the batch because a schedule says so,
        // slots within the pools by `check`.
        unsafe {
            tile::launch_unchecked::<R>(
                self.client,
                cubes,
                dim,
                lanes_d,
                lanes_k,
                array(x, x_rows * d / lanes_d),
                array(weight, weights * format.weight.values(*shape) as usize / lanes_k),
                self.optional(scales, format.weight.scale_words(*shape) as usize / lanes_k),
                array(&self.layer.in_pool.handle, in_slots * d / lanes_d),
                array(&self.layer.out_pool.handle, out_slots * k / lanes_k),
                tables.argument(),
                array(&hidden.handle, hidden.words),
                self.bias(lanes_k),
                self.residual(lanes_k),
                match &partial {
                    Some((partial, elements)) => array(partial, elements / lanes_k),
                    None => array(y, y_rows * k / lanes_k),
                },
                layout,
                blueprint,
                [activations, weight_type(*format), storage(format.adapters), stage, out_type],
            )
        };
        let Some((partial, elements)) = partial else { return };
        // Sums of eight columns and what they are made of would be more than a unit's registers.
        let lanes_k = lanes_k.min(4);
        let count = launch.rows.len() * k / lanes_k;
        // SAFETY: as above.
        unsafe {
            reduce::launch_unchecked::<R>(
                self.client,
                self.elementwise(count),
                CubeDim::new_1d(ELEMENTWISE_UNITS),
                lanes_k,
                array(&partial, elements / lanes_k),
                array(&self.layer.out_pool.handle, out_slots * k / lanes_k),
                tables.argument(),
                array(&hidden.handle, hidden.words),
                self.bias(lanes_k),
                self.residual(lanes_k),
                array(y, y_rows * k / lanes_k),
                launch.rows.len() as u32,
                launch.splits,
                shape.k,
                hidden.first,
                ReduceBlueprint {
                    scaled: blueprint.scaled,
                    low_rank: tiles.hidden.is_some(),
                    epilogue: blueprint.epilogue,
                },
                [storage(format.adapters), activations],
            )
        };
    }

    /// W_i of a step's adapters, one after the other.
    pub(super) fn made(&self, step: &Made) -> Handle {
        let (d, k) = (self.d as usize, self.k as usize);
        let format = self.layer.format;
        let made = self.allocate(step.weights);
        let lanes = self.hardware.vector_size(self.k, format);
        let [columns, inputs, adapters] = step.cubes;
        let cubes = CubeCount::Static(columns, inputs, adapters);
        // SAFETY: the kernel guards its indices by k; slots are within the pools by `check`.
        unsafe {
            materialise::launch_unchecked::<R>(
                self.client,
                cubes,
                CubeDim::new_1d(ELEMENTWISE_UNITS),
                lanes,
                self.weight(lanes),
                self.weight_scales(lanes),
                array(&self.layer.in_pool.handle, self.layer.in_pool.slots as usize * d),
                array(&self.layer.out_pool.handle, self.layer.out_pool.slots as usize * k / lanes),
                self.table(&step.table).argument(),
                array(&made, step.weights.elements() / lanes),
                step.scales,
                self.d,
                self.k,
                format.weight.quantisation(),
                [weight_type(format), storage(format.adapters), storage(format.activations)],
            )
        };
        made
    }

    fn merged(&self, adapter: u32, tiles: &Tiles) -> Result<(), LaunchError> {
        // Whose it is was compared before the first launch.
        let missing = OperandError::NotMerged { wanted: adapter, found: None };
        let merged = self.layer.merged.as_ref().ok_or(missing)?;
        self.tiles(tiles, &self.operands(&merged.weight, 1));
        Ok(())
    }

    fn segmented(&self, step: &Segmented) {
        let format = self.layer.format;
        let (h, h_len) = (self.allocate(step.hidden), step.hidden.elements());
        let tables = self.table(&step.table);
        let blueprint = step.blueprint;
        self.shrink(blueprint, &tables, step.tasks, (&h, h_len));
        let dim = CubeDim::new_1d(blueprint.units());
        let lanes_k = self.hardware.vector_size(self.k, format);
        let (adapters, stage) = (storage(format.adapters), storage(self.hardware.stage(format)));
        let activations = storage(format.activations);
        // SAFETY: the kernel guards its indices by k and the counts; rows are within the batch because a schedule says so, slots
        // within the pools by `check`.
        unsafe {
            expand::launch_unchecked::<R>(
                self.client,
                CubeCount::Static(step.columns, step.items, 1),
                dim,
                lanes_k,
                array(&h, h_len),
                array(&self.layer.out_pool.handle, self.layer.out_pool.slots as usize * self.k as usize / lanes_k),
                tables.argument(),
                array(&self.y, self.tokens * self.k as usize / lanes_k),
                step.first_item,
                self.k,
                blueprint,
                [adapters, stage, activations],
            )
        };
    }

    /// h of `tasks` at the start of a table.
    pub(super) fn shrink(
        &self,
        blueprint: SegmentedBlueprint,
        tables: &Uploaded,
        tasks: u32,
        (h, h_len): (&Handle, usize),
    ) {
        let format = self.layer.format;
        let lanes = self.hardware.vector_size(self.d, format);
        let d = self.d as usize;
        // SAFETY: the kernel guards its indices by d and the counts; rows are within the batch because a schedule says so, slots
        // within the pools by `check`.
        unsafe {
            shrink::launch_unchecked::<R>(
                self.client,
                CubeCount::Static(tasks, 1, 1),
                CubeDim::new_1d(blueprint.units()),
                lanes,
                array(self.x, self.tokens * d / lanes),
                array(&self.layer.in_pool.handle, self.layer.in_pool.slots as usize * d / lanes),
                tables.argument(),
                array(h, h_len),
                self.d,
                blueprint,
                [storage(format.activations), storage(format.adapters), storage(self.hardware.stage(format))],
            )
        };
    }

    /// Everything in blocks of one size, as a library's batched matmul wants it (paper A.2).
    fn low_rank_bmm(&self, step: &Batched) {
        let own = self.layer.format.activations;
        let out_slots = self.layer.out_pool.slots as usize;
        let rows = self.gather(self.x, self.tokens, own, &step.rows, self.d);
        let shrink = self.gather_columns(&step.shrink);
        let expand =
            self.gather(&self.layer.out_pool.handle, out_slots, self.layer.format.adapters, &step.expand, self.k);
        let all = step.all;
        let product = |x: &Handle, weight: &Handle, (tiles, size): &(Tiles, Size)| {
            let y = self.allocate(*size);
            self.tiles(tiles, &Operands { x, x_rows: all, weight, weights: step.count, y: &y, y_rows: all });
            y
        };
        let [first, second] = &step.products;
        let hidden = product(&rows, &shrink, first);
        let outputs = product(&hidden, &expand, second);
        let lanes = self.hardware.vector_size(self.k, second.0.format);
        let index = self.table(&step.rows.index);
        let vectors = self.k as usize / lanes;
        // SAFETY: the kernel guards its indices by the counts; rows are within the batch because a schedule says so.
        unsafe {
            add_rows::launch_unchecked::<R>(
                self.client,
                self.elementwise(all * vectors),
                CubeDim::new_1d(ELEMENTWISE_UNITS),
                lanes,
                array(&outputs, all * vectors),
                index.argument(),
                array(&self.y, self.tokens * vectors),
                self.k,
                all as u32,
                [storage(own), storage(own)],
            )
        };
    }

    fn finish(&self) {
        let lanes = self.hardware.vector_size(self.k, self.layer.format);
        let count = self.tokens * self.k as usize / lanes;
        // SAFETY: the kernel guards its indices by the count.
        unsafe {
            finish_rows::launch_unchecked::<R>(
                self.client,
                self.elementwise(count),
                CubeDim::new_1d(ELEMENTWISE_UNITS),
                lanes,
                array(&self.y, count),
                self.bias(lanes),
                self.residual(lanes),
                self.k,
                self.tokens as u32,
                self.layer.epilogue,
                storage(self.layer.format.activations),
            )
        };
    }

    fn gather(&self, source: &Handle, source_rows: usize, element: Element, packing: &Gathered, width: u32) -> Handle {
        let index = self.table(&packing.index);
        let count = packing.index.words().len();
        let own = self.layer.format.activations;
        let destination = self.allocate(packing.rows);
        let lanes = self.hardware.vector_size(width, self.layer.format);
        let vectors = width as usize / lanes;
        // SAFETY: the kernel guards its indices by the count; rows are within the source because a schedule says so.
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
                [storage(element), storage(own)],
            )
        };
        destination
    }

    /// Shrink vectors as the columns of matrices `[d, rank]`.
    fn gather_columns(&self, packing: &Gathered) -> Handle {
        let (count, d) = (packing.index.words().len(), self.d as usize);
        let own = self.layer.format.activations;
        let destination = self.allocate(packing.rows);
        // SAFETY: the kernel guards its indices by the count; slots are within the pool by `check`.
        unsafe {
            gather_columns::launch_unchecked::<R>(
                self.client,
                self.elementwise(count * d),
                CubeDim::new_1d(ELEMENTWISE_UNITS),
                array(&self.layer.in_pool.handle, self.layer.in_pool.slots as usize * d),
                self.table(&packing.index).argument(),
                array(&destination, count * d),
                self.d,
                packing.block,
                count as u32,
                [storage(self.layer.format.adapters), storage(own)],
            )
        };
        destination
    }
}

/// The type of the values of a weight: words of a quantised one.
pub(super) fn weight_type(format: LayerFormat) -> StorageType {
    match format.weight {
        WeightFormat::Float(element) => storage(element),
        _ => ElemType::UInt(UIntKind::U32).into(),
    }
}

pub(super) fn array<R: Runtime>(handle: &Handle, elements: usize) -> ArrayArg<R> {
    // SAFETY: the number of elements is what this module allocated, or what the caller of `launch` vouches for.
    unsafe { ArrayArg::from_raw_parts(handle.clone(), elements) }
}

/// `cubes` in one direction, over two axes because one is short.
pub(super) fn linear(cubes: usize) -> CubeCount {
    let x = cubes.clamp(1, AXIS_LIMIT as usize);
    CubeCount::Static(x as u32, cubes.div_ceil(x).max(1) as u32, 1)
}

/// Cubes for `elements` units.
pub(super) fn elementwise(elements: usize) -> CubeCount {
    linear(elements.div_ceil(ELEMENTWISE_UNITS as usize))
}

/// A table of some words, which is uploaded if it isn't kept already.
pub(super) fn uploaded_once<R: Runtime>(client: &ComputeClient<R>, kept: &Kept, words: &[u32]) -> Uploaded {
    // Clients of one device share what describes it.
    let device = client.properties();
    let same = |kept: &KeptTable<R>| std::ptr::eq(kept.client.properties(), device) && *kept.words == *words;
    let upload = || KeptTable {
        client: client.clone(),
        words: words.into(),
        handle: client.create_from_slice(bytemuck::cast_slice(words)),
    };
    Uploaded { handle: kept.find_or_keep(same, upload).handle.clone(), words: words.len() }
}

/// A buffer. cubecl answers one that the device can't hold by a result that is never written.
pub(super) fn allocate<R: Runtime>(client: &ComputeClient<R>, size: Size) -> Handle {
    client.empty(size.bytes())
}
