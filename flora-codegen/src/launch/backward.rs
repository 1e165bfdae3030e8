//! The launches of a backward pass.

use cubecl::prelude::*;
use cubecl::server::Handle;
use flora_plan::layer::{LayerFormat, LayerShape, WeightFormat};
use flora_plan::schedule::BackwardSchedule;
use flora_runtime::backend::{Gradients, Wanted};
use flora_runtime::operands::check_backward_slots;

use super::prepare::{ELEMENTWISE_UNITS, Site, Size};
use super::prepare_backward::{LowRank, Outer, PreparedBackward, PreparedInput, PreparedVectors, Scales};
use super::run::{Run, allocate, array, weight_type};
use super::{LaunchError, LayerBuffers, LowRankSums};
use crate::kernels::gradients::{low_rank_gradients, sum_parts};
use crate::kernels::outer::outer;
use crate::kernels::tables::OuterLayoutLaunch;
use crate::kernels::transposed::transposed;
use crate::routine::{Hardware, storage};

/// Launches a backward pass: reads x `[tokens, d]` and g `[tokens, k]`, the gradient of the sum before the epilogue. The launches
/// are queued. `sums` are the client's, for all its launches.
///
/// # Errors
/// As [`launch`](super::launch).
///
/// # Safety
/// As [`launch`](super::launch); g holds `[tokens, k]` in the type of the activations.
pub unsafe fn backward<R: Runtime>(
    client: &ComputeClient<R>,
    hardware: &Hardware,
    layer: &LayerBuffers,
    sums: &LowRankSums,
    schedule: &BackwardSchedule,
    (x, g): (&Handle, &Handle),
    wanted: Wanted,
) -> Result<Gradients<Handle>, LaunchError> {
    check_backward_slots(schedule, layer.shape, (layer.in_pool.slots, layer.out_pool.slots))?;
    let nothing = client.empty(16);
    let mut adjoint = layer.adjoint(nothing.clone());
    let PreparedBackward { input, vectors } =
        Site::of(hardware, layer).prepare_backward(&Site::of(hardware, &adjoint), schedule, wanted)?;
    let batch = (schedule.tokens(), schedule.input().kept());
    let forward = Run::new((client, sums), hardware, layer, batch, x, None, nothing.clone());
    let input = match &input {
        Some(PreparedInput { transposed, cubes, batch: prepared }) => {
            adjoint.base_weight = forward.transposed(*transposed, *cubes);
            let y = allocate(client, prepared.y);
            Some(Run::new((client, sums), hardware, &adjoint, batch, g, None, y).steps(&prepared.steps)?)
        }
        None => None,
    };
    let of_outputs = Run::new((client, sums), hardware, &adjoint, batch, g, None, nothing);
    let vectors = vectors.map(|vectors| forward.vectors(&of_outputs, &vectors));
    Ok(Gradients { input, vectors })
}

impl LayerBuffers {
    /// The layer that gives dx of g: over `transposed`, `[k, d]` in the type of the activations.
    fn adjoint(&self, transposed: Handle) -> Self {
        Self {
            shape: self.shape.transposed(),
            format: LayerFormat { weight: WeightFormat::Float(self.format.activations), ..self.format },
            base_weight: transposed,
            weight_scales: None,
            bias: None,
            in_pool: self.out_pool.clone(),
            out_pool: self.in_pool.clone(),
            epilogue: flora_plan::layer::Epilogue::default(),
            merged: None,
        }
    }
}

impl<R: Runtime> Run<'_, R> {
    /// w0ᵀ `[k, d]`
    fn transposed(&self, size: Size, [across, down]: [u32; 2]) -> Handle {
        let LayerShape { d, k } = self.layer.shape;
        let format = self.layer.format;
        let made = allocate(self.client, size);
        let (lanes_d, lanes_k) = (self.hardware.vector_size(d, format), self.hardware.vector_size(k, format));
        // SAFETY: the kernel guards its indices by d and k.
        unsafe {
            transposed::launch_unchecked::<R>(
                self.client,
                CubeCount::Static(across, down, 1),
                CubeDim::new_1d(ELEMENTWISE_UNITS),
                lanes_d,
                lanes_k,
                self.weight(lanes_k),
                self.weight_scales(lanes_k),
                array(&made, size.elements() / lanes_d),
                d,
                k,
                format.weight.quantisation(),
                [weight_type(format), storage(format.activations)],
            )
        };
        made
    }

    /// The gradients of all vectors. `of_outputs` is the adjoint's run: its rows are g's.
    fn vectors(&self, of_outputs: &Self, prepared: &PreparedVectors) -> [Handle; 2] {
        let PreparedVectors { gradients, scales, low_rank } = prepared;
        let made = gradients.map(|size| allocate(self.client, size));
        for outer in scales {
            self.outer(of_outputs, outer, gradients, &made);
        }
        if let Some([expand, shrink]) = low_rank {
            self.low_rank_gradients(of_outputs, expand, (gradients[1], &made[1]));
            of_outputs.low_rank_gradients(self, shrink, (gradients[0], &made[0]));
        }
        made
    }

    fn outer(&self, of_outputs: &Self, step: &Outer, sizes: &[Size; 2], gradients: &[Handle; 2]) {
        let Outer { blueprint, table, starts, tiles, cubes, scales } = step;
        let LayerShape { d, k } = self.layer.shape;
        let format = self.layer.format;
        let (lanes_d, lanes_k) = (self.hardware.vector_size(d, format), self.hardware.vector_size(k, format));
        // Sums and the weights that they are multiplied by are f32.
        let lanes = lanes_k.min(4);
        let parts = [0, 1].map(|side| allocate(self.client, scales[side].parts));
        let [rows, in_partners, out_partners] = *starts;
        let [input_tiles, output_tiles] = *tiles;
        let layout = OuterLayoutLaunch::new(
            d,
            k,
            rows,
            in_partners,
            out_partners,
            scales[0].count,
            scales[1].count,
            input_tiles,
            output_tiles,
        );
        let tables = self.table(table);
        let (activations, stage) = (storage(format.activations), storage(self.hardware.stage(format)));
        // SAFETY: the kernel guards its indices by d, k and the counts; rows are within the batch because a schedule says so,
        // slots within the pools by `check_backward_slots`.
        unsafe {
            outer::launch_unchecked::<R>(
                self.client,
                CubeCount::Static(cubes[0], cubes[1], cubes[2]),
                CubeDim::new_1d(blueprint.units()),
                lanes_d,
                lanes_k,
                lanes,
                array(self.x, self.tokens * d as usize / lanes_d),
                array(of_outputs.x, self.tokens * k as usize / lanes_k),
                self.weight(lanes),
                self.weight_scales(lanes),
                array(&self.layer.in_pool.handle, self.layer.in_pool.slots as usize * d as usize),
                array(&self.layer.out_pool.handle, self.layer.out_pool.slots as usize * k as usize),
                tables.argument(),
                array(&parts[0], scales[0].parts.elements().max(1)),
                array(&parts[1], scales[1].parts.elements().max(1) / lanes),
                layout,
                *blueprint,
                [activations, weight_type(format), storage(format.adapters), stage],
            )
        };
        let counts = [cubes[1], cubes[0]];
        let sides = scales.iter().zip(&parts).zip(counts).zip([d, k]).zip(sizes).zip(gradients);
        for (((((scales, parts), count), width), size), gradients) in sides {
            self.sum_parts((scales, parts, count), width, (*size, gradients));
        }
    }

    /// Adds the parts of a side's gradients.
    fn sum_parts(&self, (scales, parts, count): (&Scales, &Handle, u32), width: u32, (size, made): (Size, &Handle)) {
        if scales.count == 0 {
            return;
        }
        let lanes = self.hardware.vector_size(width, self.layer.format).min(4);
        // SAFETY: the kernel guards its indices by the counts; targets are within the gradients because a schedule says so.
        unsafe {
            sum_parts::launch_unchecked::<R>(
                self.client,
                self.elementwise(scales.count as usize * width as usize / lanes),
                CubeDim::new_1d(ELEMENTWISE_UNITS),
                lanes,
                array(parts, scales.parts.elements() / lanes),
                self.table(&scales.targets).argument(),
                array(made, size.elements() / lanes),
                count,
                scales.count,
                width,
            )
        };
    }

    /// The gradients of one side's low-rank vectors: of this run's rows, shrunk, and those of `others`.
    fn low_rank_gradients(&self, others: &Self, step: &LowRank, (size, made): (Size, &Handle)) {
        let LowRank { blueprint, tasks, task_count, hidden, table, rows, cubes } = step;
        let h = allocate(self.client, *hidden);
        self.shrink(*blueprint, &self.table(tasks), *task_count, (&h, hidden.elements()));
        let width = others.d;
        let lanes = self.hardware.vector_size(width, self.layer.format).min(4);
        // SAFETY: the kernel guards its indices by the counts; rows are within the batch and gradients where they belong because a
        // schedule says so.
        unsafe {
            low_rank_gradients::launch_unchecked::<R>(
                self.client,
                CubeCount::Static(cubes[0], cubes[1], cubes[2]),
                CubeDim::new_1d(ELEMENTWISE_UNITS),
                lanes,
                array(&h, hidden.elements()),
                array(others.x, self.tokens * width as usize / lanes),
                self.table(table).argument(),
                array(made, size.elements() / lanes),
                *rows,
                width,
                storage(self.layer.format.activations),
            )
        };
    }
}
