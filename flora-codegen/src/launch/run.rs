//! The steps of one batch: one function a step, each uploading its index tables and launching its kernels.

use bytemuck::Pod;
use cubecl::ir::{ElemType, StorageType, UIntKind};
use cubecl::prelude::*;
use cubecl::server::Handle;
use flora_runtime::OperandError;

use super::{LaunchError, LayerBuffers};
use crate::kernels::expand::expand;
use crate::kernels::materialise::materialise;
use crate::kernels::reduce::reduce;
use crate::kernels::rows::{add_rows, finish_rows, gather_columns, gather_rows};
use crate::kernels::shrink::shrink;
use crate::kernels::tables::{ExpandItem, H_START, LayoutLaunch, NO_SUM, Words};
use crate::kernels::tile::tile;
use crate::kernels::{ReduceBlueprint, SegmentedBlueprint};
use crate::routine::{self, Hardware, TileLaunch, TileTable, Wanted, shrink_tasks, storage};
use flora_plan::layer::{Element, Epilogue, LayerFormat, LayerShape, WeightFormat};
use flora_plan::schedule::{LowRankBmm, Materialised, Packing, Schedule, SegmentItem, Step};

/// What every step of one batch sees.
pub(super) struct Run<'a, R: Runtime> {
    client: &'a ComputeClient<R>,
    hardware: &'a Hardware,
    layer: &'a LayerBuffers,
    tokens: usize,
    x: &'a Handle,
    residual: Option<&'a Handle>,
    y: Handle,
    /// Stands in for what a kernel doesn't read.
    nothing: Handle,
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

/// What a tile launch multiplies: rows of `width` by matrices `[width, columns]`.
struct Operands<'a> {
    x: &'a Handle,
    x_rows: usize,
    weight: &'a Handle,
    /// Matrices one after the other.
    weights: usize,
    shape: LayerShape,
    format: LayerFormat,
    y: &'a Handle,
    y_rows: usize,
}

/// Units of an elementwise cube.
pub(super) const ELEMENTWISE_UNITS: u32 = 256;
/// The axis limit of WebGPU; CUDA's y and z are the same.
pub(super) const AXIS_LIMIT: u32 = 65_535;

impl<'a, R: Runtime> Run<'a, R> {
    pub(super) fn new(
        client: &'a ComputeClient<R>,
        hardware: &'a Hardware,
        layer: &'a LayerBuffers,
        tokens: u32,
        x: &'a Handle,
        residual: Option<&'a Handle>,
    ) -> Result<Self, LaunchError> {
        let LayerShape { d, k } = layer.shape;
        let LayerFormat { activations, adapters, weight, .. } = layer.format;
        let weight = match weight {
            WeightFormat::Float(element) => element,
            _ => Element::F32,
        };
        for element in [activations, adapters, weight] {
            if !hardware.has(element) {
                return Err(LaunchError::NoElement(element));
            }
        }
        let tokens = tokens as usize;
        Ok(Self {
            client,
            hardware,
            layer,
            tokens,
            x,
            residual,
            y: allocate(client, tokens * k as usize, activations)?,
            nothing: client.empty(16),
            d,
            k,
        })
    }

    /// Every step in order; y.
    pub(super) fn steps(self, schedule: &Schedule) -> Result<Handle, LaunchError> {
        for step in schedule.steps() {
            match step {
                Step::Gemm(gemm) => {
                    let wanted = self.wanted(gemm.finishes, schedule.splits());
                    self.tiles(&routine::gemm(self.hardware, wanted, gemm)?, &self.base_operands())?;
                }
                Step::Materialised(step) => self.materialised(step)?,
                Step::Merged { adapter } => self.merged(*adapter, schedule)?,
                Step::Segmented { items, h_len } => self.segmented(items, *h_len)?,
                Step::LowRankBmm(step) => self.low_rank_bmm(step)?,
                Step::Finish => self.finish(),
            }
        }
        Ok(self.y)
    }

    fn wanted(&self, finishes: bool, splits: bool) -> Wanted {
        let epilogue = if finishes { self.layer.epilogue } else { Epilogue::default() };
        Wanted { shape: self.layer.shape, format: self.layer.format, epilogue, splits }
    }

    fn base_operands(&self) -> Operands<'_> {
        self.operands(&self.layer.base_weight, 1, self.layer.format)
    }

    /// The batch's rows by `weights` matrices of the layer's shape.
    fn operands<'b>(&'b self, weight: &'b Handle, weights: usize, format: LayerFormat) -> Operands<'b> {
        let (x, y) = (self.x, &self.y);
        Operands { x, x_rows: self.tokens, weight, weights, shape: self.layer.shape, format, y, y_rows: self.tokens }
    }

    /// Weights that were made here, in the type of the activations.
    fn made_format(&self) -> LayerFormat {
        LayerFormat { weight: WeightFormat::Float(self.layer.format.activations), ..self.layer.format }
    }

    /// Uploads an index table, words of 32 bits to a kernel.
    fn table<T: Pod>(&self, entries: &[T]) -> Table {
        let handle = if entries.is_empty() {
            self.nothing.clone()
        } else {
            self.client.create_from_slice(bytemuck::cast_slice(entries))
        };
        Table { handle, words: size_of_val(entries).max(4) / size_of::<u32>() }
    }

    fn axis(&self, what: &'static str, cubes: usize) -> Result<u32, LaunchError> {
        u32::try_from(cubes).ok().filter(|cubes| *cubes <= AXIS_LIMIT).ok_or(LaunchError::TooManyCubes {
            what,
            cubes: cubes as u64,
            limit: AXIS_LIMIT,
        })
    }

    /// `cubes` in one direction, over two axes because one is short.
    fn linear(&self, cubes: usize) -> CubeCount {
        let x = cubes.clamp(1, AXIS_LIMIT as usize);
        CubeCount::Static(x as u32, cubes.div_ceil(x).max(1) as u32, 1)
    }

    /// Cubes for `elements` units.
    fn elementwise(&self, elements: usize) -> CubeCount {
        self.linear(elements.div_ceil(ELEMENTWISE_UNITS as usize))
    }

    fn optional(&self, handle: Option<&Handle>, elements: usize) -> ArrayArg<R> {
        match handle {
            Some(handle) => array(handle, elements),
            None => array(&self.nothing, 1),
        }
    }

    fn bias(&self, lanes: usize) -> ArrayArg<R> {
        self.optional(self.layer.bias.as_ref(), self.k as usize / lanes)
    }

    fn residual(&self, lanes: usize) -> ArrayArg<R> {
        self.optional(self.residual, self.tokens * self.k as usize / lanes)
    }

    /// One launch of the tile kernel, and where the depth is split the one that adds up.
    fn tiles(&self, launch: &TileLaunch, operands: &Operands) -> Result<(), LaunchError> {
        let Operands { x, x_rows, weight, weights, shape, format, y, y_rows } = *operands;
        let (d, k) = (shape.d as usize, shape.k as usize);
        let blueprint = launch.blueprint;
        let (lanes_d, lanes_k) =
            (self.hardware.vector_size(shape.d, format), self.hardware.vector_size(shape.k, format));
        let stage = storage(self.hardware.stage(format));
        let (weight_type, per_value) = match format.weight {
            WeightFormat::Float(element) => (storage(element), 1),
            _ => (word(), format.weight.quantisation().map_or(1, |quantisation| quantisation.per_word() as usize)),
        };
        let partial = match blueprint.split {
            true => Some(allocate(self.client, launch.splits as usize * launch.rows.len() * k, Element::F32)?),
            false => None,
        };
        let activations = storage(format.activations);
        let out_type = if partial.is_some() { storage(Element::F32) } else { activations };
        let TileTable { words, items, scales: scale_words, tasks } = launch.table();
        let tables = self.table(words.as_slice());
        // The ticket, then sums that aren't there yet.
        let hidden = if launch.hidden == 0 { Vec::new() } else { vec![NO_SUM; (H_START + launch.hidden) as usize] };
        let hidden =
            self.table(&[&[0u32; H_START as usize][..], &hidden[hidden.len().min(H_START as usize)..]].concat());
        let cubes = if launch.hidden > 0 {
            let multiplying = launch.items.len() * launch.column_tiles as usize * launch.splits as usize;
            // Exact, because a cube too many would take a ticket.
            CubeCount::Static(self.exact(launch.tasks.len() + multiplying)?, 1, 1)
        } else {
            let (items, columns) = (
                self.axis("the tile kernel", launch.items.len())?,
                self.axis("columns", launch.column_tiles as usize)?,
            );
            CubeCount::Static(items, columns, launch.splits)
        };
        let dim = CubeDim::new_1d(blueprint.units());
        let layout = LayoutLaunch::new(
            shape.d,
            shape.k,
            items,
            launch.items.len() as u32,
            scale_words,
            tasks,
            launch.tasks.len() as u32,
            launch.column_tiles,
            launch.depth,
            launch.rows.len() as u32,
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
                array(weight, weights * d.div_ceil(per_value) * k / lanes_k),
                self.optional(scales, format.weight.scale_words(shape) as usize / lanes_k),
                array(&self.layer.in_pool.handle, in_slots * d / lanes_d),
                array(&self.layer.out_pool.handle, out_slots * k / lanes_k),
                tables.argument(),
                hidden.argument(),
                self.bias(lanes_k),
                self.residual(lanes_k),
                match &partial {
                    Some(partial) => array(partial, launch.splits as usize * launch.rows.len() * k / lanes_k),
                    None => array(y, y_rows * k / lanes_k),
                },
                layout,
                blueprint,
                [activations, weight_type, storage(format.adapters), stage, out_type],
            )
        };
        let Some(partial) = partial else { return Ok(()) };
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
                array(&partial, launch.splits as usize * count),
                array(&self.layer.out_pool.handle, out_slots * k / lanes_k),
                tables.argument(),
                hidden.argument(),
                self.bias(lanes_k),
                self.residual(lanes_k),
                array(y, y_rows * k / lanes_k),
                launch.rows.len() as u32,
                launch.splits,
                shape.k,
                ReduceBlueprint { scaled: blueprint.scaled, low_rank: launch.hidden > 0, epilogue: blueprint.epilogue },
                [storage(format.adapters), activations],
            )
        };
        Ok(())
    }

    /// Cubes of a launch that may have no more and no fewer.
    fn exact(&self, cubes: usize) -> Result<u32, LaunchError> {
        let limit = self.client.properties().hardware.max_cube_count.0;
        let fits = u32::try_from(cubes).ok().filter(|cubes| *cubes <= limit);
        fits.ok_or(LaunchError::TooManyCubes { what: "the tile kernel", cubes: cubes as u64, limit })
    }

    /// W_i of the step's adapters, one after the other.
    pub(super) fn made(&self, step: &Materialised) -> Result<Handle, LaunchError> {
        let (d, k) = (self.d as usize, self.k as usize);
        let (shape, format) = (self.layer.shape, self.layer.format);
        let count = step.adapters.len();
        let made = allocate(self.client, count * d * k, format.activations)?;
        let lanes = self.hardware.vector_size(self.k, format);
        let columns = (k / lanes).div_ceil(ELEMENTWISE_UNITS as usize) as u32;
        let cubes = CubeCount::Static(
            columns,
            self.axis("the inputs of materialised weights", d)?,
            self.axis("materialised weights", count)?,
        );
        let mut words = Words::default();
        words.append(&step.adapters);
        let scales = words.append(&step.scales);
        let (weight_type, values) = match format.weight {
            WeightFormat::Float(element) => (storage(element), d * k),
            _ => (word(), format.weight.values(shape) as usize),
        };
        let weight_scales = self.layer.weight_scales.as_ref();
        // SAFETY: the kernel guards its indices by k; slots are within the pools by `check`.
        unsafe {
            materialise::launch_unchecked::<R>(
                self.client,
                cubes,
                CubeDim::new_1d(ELEMENTWISE_UNITS),
                lanes,
                array(&self.layer.base_weight, values / lanes),
                self.optional(weight_scales, format.weight.scale_words(shape) as usize / lanes),
                array(&self.layer.in_pool.handle, self.layer.in_pool.slots as usize * d),
                array(&self.layer.out_pool.handle, self.layer.out_pool.slots as usize * k / lanes),
                self.table(words.as_slice()).argument(),
                array(&made, count * d * k / lanes),
                scales,
                self.d,
                self.k,
                format.weight.quantisation(),
                [weight_type, storage(format.adapters), storage(format.activations)],
            )
        };
        Ok(made)
    }

    fn materialised(&self, step: &Materialised) -> Result<(), LaunchError> {
        let made = self.made(step)?;
        let format = self.made_format();
        let wanted = Wanted { format, ..self.wanted(step.finishes, false) };
        let launch = routine::materialised(self.hardware, wanted, step)?;
        self.tiles(&launch, &self.operands(&made, step.adapters.len(), format))
    }

    fn merged(&self, adapter: u32, schedule: &Schedule) -> Result<(), LaunchError> {
        let found = self.layer.merged.as_ref();
        let Some(merged) = found.filter(|merged| merged.adapter == adapter) else {
            let found = found.map(|merged| merged.adapter);
            return Err(OperandError::NotMerged { wanted: adapter, found }.into());
        };
        let format = self.made_format();
        let wanted = Wanted { format, ..self.wanted(true, schedule.splits()) };
        let launch = routine::matrices(self.hardware, wanted, 1, schedule.tokens())?;
        self.tiles(&launch, &self.operands(&merged.weight, 1, format))
    }

    fn segmented(&self, items: &[SegmentItem], h_len: u32) -> Result<(), LaunchError> {
        let format = self.layer.format;
        let h = allocate(self.client, h_len as usize, Element::F32)?;
        let tasks = shrink_tasks(items);
        let mut words = Words::default();
        words.append(&tasks);
        let first_item = words.append(&items.iter().map(ExpandItem::from).collect::<Vec<_>>());
        let tables = self.table(words.as_slice());
        let blueprint =
            SegmentedBlueprint { multiply: self.hardware.multiply(format), plane_size: self.hardware.plane_size };
        let dim = CubeDim::new_1d(blueprint.units());
        let (lanes_d, lanes_k) = (self.hardware.vector_size(self.d, format), self.hardware.vector_size(self.k, format));
        let (adapters, stage) = (storage(format.adapters), storage(self.hardware.stage(format)));
        let activations = storage(format.activations);
        // SAFETY: the kernel guards its indices by d, k and the counts; rows are within the batch because a schedule says so,
        // slots within the pools by `check`.
        unsafe {
            shrink::launch_unchecked::<R>(
                self.client,
                CubeCount::Static(self.axis("shrink", tasks.len())?, 1, 1),
                dim,
                lanes_d,
                array(self.x, self.tokens * self.d as usize / lanes_d),
                array(&self.layer.in_pool.handle, self.layer.in_pool.slots as usize * self.d as usize / lanes_d),
                tables.argument(),
                array(&h, h_len as usize),
                self.d,
                blueprint,
                [activations, adapters, stage],
            )
        };
        let columns = self.k.div_ceil(blueprint.expand_columns(lanes_k as u32));
        // SAFETY: as above.
        unsafe {
            expand::launch_unchecked::<R>(
                self.client,
                CubeCount::Static(columns, self.axis("expand", items.len())?, 1),
                dim,
                lanes_k,
                array(&h, h_len as usize),
                array(&self.layer.out_pool.handle, self.layer.out_pool.slots as usize * self.k as usize / lanes_k),
                tables.argument(),
                array(&self.y, self.tokens * self.k as usize / lanes_k),
                first_item,
                self.k,
                blueprint,
                [adapters, stage, activations],
            )
        };
        Ok(())
    }

    /// Everything in blocks of one size, as a library's batched matmul wants it (paper A.2).
    fn low_rank_bmm(&self, step: &LowRankBmm) -> Result<(), LaunchError> {
        let (block, rank) = (step.rows.block, step.shrink.block);
        let count = step.rows.index.len() as u32 / block.max(1);
        let own = self.layer.format.activations;
        let format = LayerFormat { adapters: own, ..self.made_format() };
        let rows = self.gather(self.x, self.tokens, own, &step.rows, self.d)?;
        let shrink = self.gather_columns(&step.shrink)?;
        let expand = self.gather(
            &self.layer.out_pool.handle,
            self.layer.out_pool.slots as usize,
            self.layer.format.adapters,
            &step.expand,
            self.k,
        )?;
        let all = (count * block) as usize;
        let hidden = allocate(self.client, all * rank as usize, own)?;
        let outputs = allocate(self.client, all * self.k as usize, own)?;
        for (x, weight, shape, y) in [
            (&rows, &shrink, LayerShape { d: self.d, k: rank }, &hidden),
            (&hidden, &expand, LayerShape { d: rank, k: self.k }, &outputs),
        ] {
            // The pools' vectors are of the layer's lengths, which these matrices' aren't; without scales they aren't read.
            let wanted = Wanted { shape, format, epilogue: Epilogue::default(), splits: false };
            let launch = routine::matrices(self.hardware, wanted, count, block)?;
            let operands = Operands { x, x_rows: all, weight, weights: count as usize, shape, format, y, y_rows: all };
            self.tiles(&launch, &operands)?;
        }
        let (lanes, index) = (self.hardware.vector_size(self.k, format), self.table(&step.rows.index));
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
        Ok(())
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

    fn gather(
        &self,
        source: &Handle,
        source_rows: usize,
        element: Element,
        packing: &Packing,
        width: u32,
    ) -> Result<Handle, LaunchError> {
        let count = packing.index.len();
        let own = self.layer.format.activations;
        let destination = allocate(self.client, count * width as usize, own)?;
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
                self.table(&packing.index).argument(),
                array(&destination, count * vectors),
                width,
                count as u32,
                [storage(element), storage(own)],
            )
        };
        Ok(destination)
    }

    /// Shrink vectors as the columns of matrices `[d, rank]`.
    fn gather_columns(&self, packing: &Packing) -> Result<Handle, LaunchError> {
        let (count, d) = (packing.index.len(), self.d as usize);
        let own = self.layer.format.activations;
        let destination = allocate(self.client, count * d, own)?;
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
        Ok(destination)
    }
}

/// The type of the words of a quantised weight.
fn word() -> StorageType {
    ElemType::UInt(UIntKind::U32).into()
}

pub(super) fn array<R: Runtime>(handle: &Handle, elements: usize) -> ArrayArg<R> {
    // SAFETY: the number of elements is what this module allocated, or what the caller of `launch` vouches for.
    unsafe { ArrayArg::from_raw_parts(handle.clone(), elements) }
}

/// A buffer. cubecl answers one that the device can't hold by a result that is never written.
fn allocate<R: Runtime>(client: &ComputeClient<R>, elements: usize, element: Element) -> Result<Handle, LaunchError> {
    let bytes = elements.max(1) as u64 * element.bytes();
    let limit = client.properties().memory.max_page_size;
    if bytes > limit {
        return Err(LaunchError::BufferTooLarge { bytes, limit });
    }
    // Two halves make the word that the device copies at least.
    Ok(client.empty(bytes.next_multiple_of(4) as usize))
}
