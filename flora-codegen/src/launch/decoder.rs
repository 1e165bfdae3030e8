//! What a decoder does between its projections, queued on a cubecl device.

use cubecl::prelude::*;
use cubecl::server::Handle;
use flora_plan::layer::Element;
use flora_runtime::decoding::{AttentionOperands, BLOCK_TOKENS, Norm};

use super::LaunchError;
use super::prepare::{AXIS_LIMIT, ELEMENTWISE_UNITS, size, within};
use super::run::{Uploaded, allocate, array, elementwise, linear, uploaded_once};
use crate::kernels::NormBlueprint;
use crate::kernels::attention::{AttentionLayoutLaunch, UNITS, attend as attend_kernel};
use crate::kernels::key_values::{KeyValueRowsLaunch, append, copy_blocks};
use crate::kernels::merge_splits::merge_splits;
use crate::kernels::norm::{multiply as multiply_kernel, normalise as normalise_kernel};
use crate::kernels::rows::gather_rows;
use crate::routine::{AttentionLaunch, Hardware, attention, storage};

/// Units of a norm's cube at most.
const NORM_UNITS: u32 = 256;

/// Memory of attention's operands.
#[derive(Clone, Copy, Debug)]
pub struct AttentionHandles<'a> {
    /// Queries, keys and values.
    pub rows: [&'a Handle; 3],
    /// Cosines and sines, where queries and keys are turned.
    pub rotary: Option<&'a Handle>,
    /// Keys and values of all sequences.
    pub pool: &'a Handle,
}

/// x `[rows, width]`, normalised.
///
/// # Errors
/// More than the device takes in one buffer.
///
/// # Safety
/// The buffers belong to `client` and are as long as the shape and the norm say.
pub unsafe fn normalise<R: Runtime>(
    client: &ComputeClient<R>,
    hardware: &Hardware,
    x: &Handle,
    [rows, width]: [usize; 2],
    norm: Norm<&Handle>,
    element: Element,
) -> Result<Handle, LaunchError> {
    let y = allocate(client, size(hardware, "normalised rows", &[rows, width], element)?);
    if rows * width == 0 {
        return Ok(y);
    }
    let lanes = hardware.line_vector_size(width, element);
    let units = ((width / lanes) as u32).next_power_of_two().min(NORM_UNITS).min(hardware.units);
    let blueprint = NormBlueprint { units, centred: norm.beta.is_some() };
    let count = rows * width / lanes;
    // SAFETY: the kernel guards its rows by their number; the caller vouches for the buffers.
    unsafe {
        normalise_kernel::launch_unchecked::<R>(
            client,
            linear(rows),
            CubeDim::new_1d(units),
            lanes,
            array(x, count),
            array(norm.gamma, width / lanes),
            array(norm.beta.unwrap_or(norm.gamma), width / lanes),
            array(&y, count),
            rows as u32,
            width as u32,
            norm.epsilon,
            blueprint,
            storage(element),
        )
    };
    Ok(y)
}

/// one ∘ other, `[count]` each.
///
/// # Errors
/// More than the device takes in one buffer.
///
/// # Safety
/// Both are `client`'s buffers of as many numbers.
pub unsafe fn multiply<R: Runtime>(
    client: &ComputeClient<R>,
    hardware: &Hardware,
    [one, other]: [&Handle; 2],
    count: usize,
    element: Element,
) -> Result<Handle, LaunchError> {
    let y = allocate(client, size(hardware, "products", &[count], element)?);
    if count == 0 {
        return Ok(y);
    }
    let lanes = hardware.line_vector_size(count, element);
    let vectors = count / lanes;
    // SAFETY: the kernel guards its indices by the count; the caller vouches for the buffers.
    unsafe {
        multiply_kernel::launch_unchecked::<R>(
            client,
            elementwise(vectors),
            CubeDim::new_1d(ELEMENTWISE_UNITS),
            lanes,
            array(one, vectors),
            array(other, vectors),
            array(&y, vectors),
            vectors as u32,
            storage(element),
        )
    };
    Ok(y)
}

/// Some rows of x `[_, width]`.
///
/// # Errors
/// More than the device takes in one buffer.
///
/// # Safety
/// `x` is `client`'s buffer, and has all the rows that are named.
pub unsafe fn select<R: Runtime>(
    client: &ComputeClient<R>,
    hardware: &Hardware,
    x: &Handle,
    width: usize,
    rows: &[u32],
    element: Element,
) -> Result<Handle, LaunchError> {
    let y = allocate(client, size(hardware, "chosen rows", &[rows.len(), width], element)?);
    if rows.len() * width == 0 {
        return Ok(y);
    }
    let lanes = hardware.line_vector_size(width, element);
    let vectors = width / lanes;
    let of = rows.iter().max().map_or(0, |row| *row as usize + 1);
    let index = client.create_from_slice(bytemuck::cast_slice(rows));
    // SAFETY: the kernel guards its indices by the count; the caller vouches for the buffer.
    unsafe {
        gather_rows::launch_unchecked::<R>(
            client,
            elementwise(rows.len() * vectors),
            CubeDim::new_1d(ELEMENTWISE_UNITS),
            lanes,
            array(x, of * vectors),
            array(&index, rows.len()),
            array(&y, rows.len() * vectors),
            width as u32,
            rows.len() as u32,
            [storage(element), storage(element)],
        )
    };
    Ok(y)
}

/// Keys and values into the pool, then what every row attends to, `[rows, query heads · size]`. The launches are as many however many
/// sequences there are: the rows' keys and values, attention once for each kind of tile that occurs, and one more each where blocks are
/// copied and where splits are merged.
///
/// # Errors
/// Heads that no tile fits, more than the device takes in one launch or buffer.
///
/// # Safety
/// The buffers belong to `client` and hold what `operands` says.
pub unsafe fn attend<R: Runtime>(
    client: &ComputeClient<R>,
    hardware: &Hardware,
    operands: &AttentionOperands<'_>,
    handles: AttentionHandles<'_>,
) -> Result<Handle, LaunchError> {
    let heads = operands.heads;
    let y = size(hardware, "attention's result", &[operands.rows, heads.queries * heads.size], operands.element)?;
    let launch = attention(hardware, operands)?;
    let parts = [launch.partial as usize, heads.keys, heads.size];
    let partial = size(hardware, "attention's splits", &parts, Element::F32)?;
    let softmax = size(hardware, "attention's sums", &[launch.partial as usize, heads.keys, 2], Element::F32)?;
    size(hardware, "attention's tables", &[launch.words.as_slice().len()], Element::F32)?;
    within("key-value heads", heads.keys, AXIS_LIMIT)?;
    for tiles in &launch.tiles {
        within("attention", tiles.count as usize, hardware.cubes)?;
    }
    let y = allocate(client, y);
    if operands.rows == 0 {
        return Ok(y);
    }
    let step = Step {
        client,
        operands,
        handles,
        tables: uploaded_once(client, operands.kept, launch.words.as_slice()),
        partial: allocate(client, partial),
        softmax: allocate(client, softmax),
        nothing: client.empty(16),
        y,
        launch,
    };
    step.write_keys_and_values();
    step.attend();
    step.merge();
    Ok(step.y)
}

/// The launches of one step, whose tables and buffers are there.
struct Step<'a, R: Runtime> {
    client: &'a ComputeClient<R>,
    operands: &'a AttentionOperands<'a>,
    handles: AttentionHandles<'a>,
    launch: AttentionLaunch,
    tables: Uploaded,
    /// `[splits of queries, key-value heads, size]`, f32
    partial: Handle,
    /// `[splits of queries, key-value heads, 2]`, f32
    softmax: Handle,
    /// Stands in for what a kernel doesn't read.
    nothing: Handle,
    y: Handle,
}

impl<R: Runtime> Step<'_, R> {
    fn rotary(&self) -> ArrayArg<R> {
        match self.handles.rotary {
            Some(rotary) => array(rotary, self.operands.rows * self.operands.heads.size),
            None => array(&self.nothing, 1),
        }
    }

    /// Numbers of the pool.
    fn pool(&self) -> usize {
        self.operands.pool_blocks * self.block()
    }

    /// Numbers of a block.
    fn block(&self) -> usize {
        2 * self.operands.heads.keys * BLOCK_TOKENS * self.operands.heads.size
    }

    fn write_keys_and_values(&self) {
        let AttentionOperands { heads, rows, keys, values, .. } = *self.operands;
        let element = storage(self.operands.element);
        let copies = self.launch.copies as usize;
        if copies > 0 {
            // SAFETY: the kernel guards its indices by the count; the blocks are the pool's.
            unsafe {
                copy_blocks::launch_unchecked::<R>(
                    self.client,
                    elementwise(copies * self.block()),
                    CubeDim::new_1d(ELEMENTWISE_UNITS),
                    self.tables.argument(),
                    array(self.handles.pool, self.pool()),
                    copies as u32,
                    self.block() as u32,
                    element,
                )
            };
        }
        let layout = KeyValueRowsLaunch::new(
            self.launch.slots,
            rows as u32,
            heads.keys as u32,
            keys.width as u32,
            keys.first as u32,
            values.width as u32,
            values.first as u32,
        );
        // SAFETY: the kernel guards its indices by the rows; slots are in blocks of the pool.
        unsafe {
            append::launch_unchecked::<R>(
                self.client,
                elementwise(rows * heads.keys * heads.size),
                CubeDim::new_1d(ELEMENTWISE_UNITS),
                array(self.handles.rows[1], rows * keys.width),
                array(self.handles.rows[2], rows * values.width),
                self.rotary(),
                self.tables.argument(),
                array(self.handles.pool, self.pool()),
                layout,
                heads.size as u32,
                self.operands.rotary.is_some(),
                element,
            )
        };
    }

    fn attend(&self) {
        let AttentionOperands { heads, rows, queries, window, .. } = *self.operands;
        let lanes = self.launch.lanes;
        for tiles in &self.launch.tiles {
            let layout = AttentionLayoutLaunch::new(
                tiles.items,
                heads.keys as u32,
                (heads.queries / heads.keys) as u32,
                queries.width as u32,
                queries.first as u32,
                window.unwrap_or(u32::MAX),
                tiles.blueprint.chunk / lanes as u32,
            );
            // SAFETY: tiles name rows of the batch and blocks of the pool, and splits that there is room for.
            unsafe {
                attend_kernel::launch_unchecked::<R>(
                    self.client,
                    CubeCount::Static(tiles.count, heads.keys as u32, 1),
                    CubeDim::new_1d(UNITS),
                    lanes,
                    array(self.handles.rows[0], rows * queries.width),
                    self.rotary(),
                    array(self.handles.pool, self.pool() / lanes),
                    self.tables.argument(),
                    array(&self.y, rows * heads.queries * heads.size / lanes),
                    array(&self.partial, (self.splits() * heads.size / lanes).max(1)),
                    array(&self.softmax, (2 * self.splits()).max(1)),
                    layout,
                    tiles.blueprint,
                    storage(self.operands.element),
                )
            };
        }
    }

    /// Splits of all queries and key-value heads.
    fn splits(&self) -> usize {
        self.launch.partial as usize * self.operands.heads.keys
    }

    fn merge(&self) {
        let AttentionOperands { heads, rows, .. } = *self.operands;
        let (lanes, count) = (self.launch.lanes, self.launch.merged_count as usize);
        if count == 0 {
            return;
        }
        // SAFETY: the kernel guards its indices by the count; queries name rows of the batch and splits that were made.
        unsafe {
            merge_splits::launch_unchecked::<R>(
                self.client,
                elementwise(count * heads.keys * heads.size / lanes),
                CubeDim::new_1d(ELEMENTWISE_UNITS),
                lanes,
                array(&self.partial, self.splits() * heads.size / lanes),
                array(&self.softmax, 2 * self.splits()),
                self.tables.argument(),
                array(&self.y, rows * heads.queries * heads.size / lanes),
                self.launch.merged,
                count as u32,
                heads.keys as u32,
                (heads.queries / heads.keys) as u32,
                heads.size as u32,
                storage(self.operands.element),
            )
        };
    }
}
