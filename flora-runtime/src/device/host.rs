//! The host backend: the same schedules on the processor, through the `gemm` crate and rayon. The default where there is no
//! GPU, and a device of its own for the cost model.

use std::ops::Range;
use std::sync::Arc;

use flora_codegen::schedule::{LowRankBmm, Materialised, Packing, Schedule, SegmentItem, Step, VirtualRow};
use flora_ir::Activation;
use rayon::prelude::*;

use super::{Backend, BackendKind, DeviceError, DeviceInfo, LayerOperands, Storage};

pub(super) struct HostBackend;

pub(super) fn open() -> (DeviceInfo, HostBackend) {
    let threads = rayon::current_num_threads();
    let info = DeviceInfo {
        id: "host".to_owned(),
        name: format!("{}, {threads} threads", processor()),
        backend: BackendKind::Host,
        driver: "gemm 0.19".to_owned(),
        software: false,
        plane_size: None,
        shared_memory_bytes: None,
        largest_buffer_bytes: None,
        element_types: vec!["f32".to_owned()],
        fragments: Vec::new(),
    };
    (info, HostBackend)
}

/// The processor's own name, where it has one.
fn processor() -> String {
    #[cfg(target_arch = "x86_64")]
    if let Some(brand) = raw_cpuid::CpuId::new().get_processor_brand_string() {
        return brand.as_str().trim().to_owned();
    }
    format!("{} processor", std::env::consts::ARCH)
}

/// [`super::Device`] lets no other backend's storage through.
fn values(storage: &Storage) -> Result<&[f32], DeviceError> {
    match storage {
        Storage::Host(values) => Ok(values),
        Storage::Device(_) => Err(DeviceError::Execution("a device's memory was passed to the host".to_owned())),
    }
}

impl Backend for HostBackend {
    fn upload(&self, values: &[f32]) -> Storage {
        Storage::Host(Arc::new(values.to_vec()))
    }

    fn read(&self, storage: &Storage, _elements: usize) -> Result<Vec<f32>, DeviceError> {
        Ok(values(storage)?.to_vec())
    }

    fn execute(&self, layer: &LayerOperands, schedule: &Schedule, x: &Storage) -> Result<Storage, DeviceError> {
        let run = Run {
            x: values(x)?,
            base_weight: values(&layer.base_weight.storage)?,
            bias: layer.bias.as_ref().filter(|_| layer.epilogue.bias).map(|bias| values(&bias.storage)).transpose()?,
            in_pool: values(&layer.in_pool.buffer.storage)?,
            out_pool: values(&layer.out_pool.buffer.storage)?,
            d: layer.shape.d as usize,
            k: layer.shape.k as usize,
            activation: layer.epilogue.activation,
        };
        let mut y = vec![0.0; schedule.tokens() as usize * run.k];
        for step in schedule.steps() {
            match step {
                Step::BaseGemm => gemm(run.x, run.base_weight, &mut y, run.d, run.k),
                Step::Stacked(rows) => run.stacked(rows, &mut y),
                Step::Materialised(step) => run.materialised(step, &mut y),
                Step::Segmented { items, .. } => run.segmented(items, &mut y),
                Step::LowRankBmm(step) => run.low_rank_bmm(step, &mut y),
                Step::Finish => run.finish(&mut y),
            }
        }
        // A lone stacked step finishes its rows itself.
        if !layer.epilogue.is_identity() && matches!(schedule.steps(), [Step::Stacked(_)]) {
            run.finish(&mut y);
        }
        Ok(Storage::Host(Arc::new(y)))
    }

    fn synchronize(&self) -> Result<(), DeviceError> {
        Ok(())
    }
}

struct Run<'a> {
    x: &'a [f32],
    base_weight: &'a [f32],
    bias: Option<&'a [f32]>,
    in_pool: &'a [f32],
    out_pool: &'a [f32],
    d: usize,
    k: usize,
    activation: Activation,
}

/// Virtual rows that are scaled into a scratch block at once: 2048 floats wide, the block stays in the second-level cache.
const BLOCK_ROWS: usize = 128;

/// The vector of `slot`, which counts from 1; `None` for 0.
fn vector(pool: &[f32], slot: u32, width: usize) -> Option<&[f32]> {
    let slot = (slot as usize).checked_sub(1)?;
    pool.get(slot * width..(slot + 1) * width)
}

impl Run<'_> {
    fn row(&self, row: u32) -> &[f32] {
        &self.x[row as usize * self.d..(row as usize + 1) * self.d]
    }

    /// Blocks of whole output rows: scale into scratch, multiply, add up.
    fn stacked(&self, rows: &[VirtualRow], y: &mut [f32]) {
        for block in blocks(rows) {
            let block = &rows[block];
            let mut scaled = vec![0.0; block.len() * self.d];
            scaled.par_chunks_mut(self.d).zip(block).for_each(|(out, virtual_row)| {
                let x = self.row(virtual_row.row);
                match vector(self.in_pool, virtual_row.in_slot, self.d) {
                    Some(scale) => out.iter_mut().zip(x).zip(scale).for_each(|((out, x), scale)| *out = x * scale),
                    None => out.copy_from_slice(x),
                }
            });
            let mut products = vec![0.0; block.len() * self.k];
            gemm(&scaled, self.base_weight, &mut products, self.d, self.k);
            for (product, virtual_row) in products.chunks_exact(self.k).zip(block) {
                let out = &mut y[virtual_row.row as usize * self.k..(virtual_row.row as usize + 1) * self.k];
                match vector(self.out_pool, virtual_row.out_slot, self.k) {
                    Some(scale) => {
                        out.iter_mut().zip(product).zip(scale).for_each(|((out, value), scale)| *out += value * scale);
                    }
                    None => out.iter_mut().zip(product).for_each(|(out, value)| *out += value),
                }
            }
        }
    }

    fn gather(&self, source: &[f32], index: &[u32], width: usize) -> Vec<f32> {
        index.iter().flat_map(|row| &source[*row as usize * width..(*row as usize + 1) * width]).copied().collect()
    }

    fn scatter(&self, source: &[f32], index: &[u32], y: &mut [f32], add: bool) {
        for (values, row) in source.chunks_exact(self.k).zip(index) {
            let out = &mut y[*row as usize * self.k..(*row as usize + 1) * self.k];
            if add {
                out.iter_mut().zip(values).for_each(|(out, value)| *out += value);
            } else {
                out.copy_from_slice(values);
            }
        }
    }

    fn materialised(&self, step: &Materialised, y: &mut [f32]) {
        let mut weights = vec![0.0; self.d * self.k];
        for (adapter, index) in step.adapters.iter().zip(block_indices(&step.rows)) {
            let scales = &step.scales[adapter.first_scale as usize..adapter.end_scale as usize];
            weights.par_chunks_mut(self.k).enumerate().for_each(|(depth, out)| {
                out.fill(0.0);
                for scale in scales {
                    let factor = vector(self.in_pool, scale.in_slot, self.d).map_or(1.0, |scale| scale[depth]);
                    match vector(self.out_pool, scale.out_slot, self.k) {
                        Some(scale) => out.iter_mut().zip(scale).for_each(|(out, scale)| *out += factor * scale),
                        None => out.iter_mut().for_each(|out| *out += factor),
                    }
                }
                let base = &self.base_weight[depth * self.k..(depth + 1) * self.k];
                out.iter_mut().zip(base).for_each(|(out, base)| *out *= base);
                for q in 1..=adapter.rank {
                    let shrink = vector(self.in_pool, adapter.shrink + q, self.d).map_or(0.0, |shrink| shrink[depth]);
                    let expand = vector(self.out_pool, adapter.expand + q, self.k).unwrap_or_default();
                    out.iter_mut().zip(expand).for_each(|(out, expand)| *out += shrink * expand);
                }
            });
            let packed = self.gather(self.x, index, self.d);
            let mut outputs = vec![0.0; index.len() * self.k];
            gemm(&packed, &weights, &mut outputs, self.d, self.k);
            self.scatter(&outputs, index, y, false);
        }
    }

    fn segmented(&self, items: &[SegmentItem], y: &mut [f32]) {
        let mut rest = y;
        let mut row = 0usize;
        let mut work = Vec::with_capacity(items.len());
        for item in items {
            let (_, after) = std::mem::take(&mut rest).split_at_mut((item.first_row as usize - row) * self.k);
            let (own, after) = after.split_at_mut(item.rows as usize * self.k);
            work.push((item, own));
            rest = after;
            row = (item.first_row + item.rows) as usize;
        }
        work.into_par_iter().for_each(|(item, out)| {
            let rank = item.rank as usize;
            let (first, rows) = (item.first_row as usize, item.rows as usize);
            let x = &self.x[first * self.d..(first + rows) * self.d];
            let shrink = &self.in_pool[item.shrink as usize * self.d..(item.shrink as usize + rank) * self.d];
            let expand = &self.out_pool[item.expand as usize * self.k..(item.expand as usize + rank) * self.k];
            let hidden = dot_products(x, shrink, self.d);
            self.expand(&hidden, expand, out, rank);
        });
    }

    /// out `[rows, k]` += hidden `[rows, rank]` @ expand `[rank, k]`.
    fn expand(&self, hidden: &[f32], expand: &[f32], out: &mut [f32], rank: usize) {
        for (out, hidden) in out.chunks_exact_mut(self.k).zip(hidden.chunks_exact(rank.max(1))) {
            for (value, expand) in hidden.iter().zip(expand.chunks_exact(self.k)) {
                out.iter_mut().zip(expand).for_each(|(out, expand)| *out += value * expand);
            }
        }
    }

    fn low_rank_bmm(&self, step: &LowRankBmm, y: &mut [f32]) {
        let indices = block_indices(&step.rows).zip(block_indices(&step.shrink).zip(block_indices(&step.expand)));
        for (rows, (shrink, expand)) in indices {
            let packed = self.gather(self.x, rows, self.d);
            let shrink = self.gather(self.in_pool, shrink, self.d);
            let expand = self.gather(self.out_pool, expand, self.k);
            let hidden = dot_products(&packed, &shrink, self.d);
            let rank = shrink.len() / self.d;
            let mut outputs = vec![0.0; rows.len() * self.k];
            gemm(&hidden, &expand, &mut outputs, rank, self.k);
            self.scatter(&outputs, rows, y, true);
        }
    }

    fn finish(&self, y: &mut [f32]) {
        y.par_chunks_mut(self.k.max(1)).for_each(|row| {
            if let Some(bias) = self.bias {
                row.iter_mut().zip(bias).for_each(|(out, bias)| *out += bias);
            }
            row.iter_mut().for_each(|out| *out = activate(*out, self.activation));
        });
    }
}

/// Ranges of about [`BLOCK_ROWS`] virtual rows that end with an output row.
fn blocks(rows: &[VirtualRow]) -> Vec<Range<usize>> {
    let mut blocks = Vec::new();
    let mut start = 0;
    for (position, row) in rows.iter().enumerate() {
        let end = position + 1;
        if row.last == 1 && (end - start >= BLOCK_ROWS || end == rows.len()) {
            blocks.push(start..end);
            start = end;
        }
    }
    blocks
}

/// The blocks without their padding, which stands at their ends: one adapter is multiplied after the other here.
fn block_indices(packing: &Packing) -> impl Iterator<Item = &[u32]> {
    let blocks = packing.index.chunks_exact(packing.block.max(1) as usize);
    blocks.map(|block| &block[..block.iter().position(|row| *row == u32::MAX).unwrap_or(block.len())])
}

/// The depth that one call of the library sums over. It would choose by the whole problem's size, and a row's bits would
/// depend on how many others there are; up to this depth it doesn't split.
const SLICE: usize = 256;

/// out `[rows, columns]` = left `[rows, depth]` @ right `[depth, columns]`, all row-major. Every row has the same bits as it
/// would have alone.
fn gemm(left: &[f32], right: &[f32], out: &mut [f32], depth: usize, columns: usize) {
    if out.is_empty() {
        return;
    }
    if columns == 1 {
        let rows = left.chunks_exact(depth);
        return out.iter_mut().zip(rows).for_each(|(out, row)| *out = dot_product(row, right));
    }
    if left.len() == depth {
        // The library sums a lone row in another order.
        let pair = [left, left].concat();
        let mut products = vec![0.0; 2 * columns];
        gemm(&pair, right, &mut products, depth, columns);
        return out.copy_from_slice(&products[..columns]);
    }
    let rows = left.len() / depth;
    assert!(left.len() == rows * depth && right.len() >= depth * columns && out.len() == rows * columns);
    let small = rows * depth * columns < 1 << 18;
    let parallelism = if small { gemm::Parallelism::None } else { gemm::Parallelism::Rayon(0) };
    for first in (0..depth).step_by(SLICE) {
        // SAFETY: the slices hold the matrices that the strides describe, by the assertion above, and `out` is unshared.
        unsafe {
            gemm::gemm(
                rows,
                columns,
                SLICE.min(depth - first),
                out.as_mut_ptr(),
                1,
                columns as isize,
                first > 0,
                left[first..].as_ptr(),
                1,
                depth as isize,
                right[first * columns..].as_ptr(),
                1,
                columns as isize,
                1.0f32,
                1.0f32,
                false,
                false,
                false,
                parallelism,
            );
        }
    }
}

/// left `[rows, depth]` by right `[columns, depth]`, transposed: `[rows, columns]`.
fn dot_products(left: &[f32], right: &[f32], depth: usize) -> Vec<f32> {
    let rows = left.chunks_exact(depth);
    rows.flat_map(|row| right.chunks_exact(depth).map(|column| dot_product(row, column))).collect()
}

/// In an order that depends on the length alone.
fn dot_product(left: &[f32], right: &[f32]) -> f32 {
    const LANES: usize = 16;
    let mut sums = [0.0f32; LANES];
    let (lefts, rights) = (left.chunks_exact(LANES), right.chunks_exact(LANES));
    let rest = lefts.remainder().iter().zip(rights.remainder()).map(|(left, right)| left * right).sum::<f32>();
    for (left, right) in lefts.zip(rights) {
        for lane in 0..LANES {
            sums[lane] += left[lane] * right[lane];
        }
    }
    sums.iter().sum::<f32>() + rest
}

fn activate(value: f32, activation: Activation) -> f32 {
    match activation {
        Activation::Identity => value,
        Activation::Relu | Activation::GeluErf | Activation::GeluTanh | Activation::Silu => {
            flora_ir::evaluate::apply_activation(activation, f64::from(value)) as f32
        }
    }
}
