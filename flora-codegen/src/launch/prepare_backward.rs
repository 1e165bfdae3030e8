//! What a backward pass launches, made before the first launch is queued, as [`super::prepare`] does for a forward pass.
//!
//! dx is a forward pass of the adjoint layer: over w0ᵀ, with the pools exchanged. The gradients of scales are made by tiles of G ∘ w0
//! whatever lowering the schedule names: that costs t + 1 + n products for t rows and n scales where row reductions would cost
//! n · t, so three times as many at worst, for a single row, and it needs no w0ᵀ.

use flora_plan::layer::{Element, LayerShape};
use flora_plan::schedule::{AdapterGradient, BackwardSchedule, SegmentItem};
use flora_runtime::backend::Wanted;

use super::LaunchError;
use super::prepare::{AXIS_LIMIT, ELEMENTWISE_UNITS, PreparedBatch, Site, Size, Table, within};
use crate::kernels::gradients::GRADIENT_RANKS;
use crate::kernels::tables::{LowRankGradient, OuterAdapter, TASK_SIDE, Words};
use crate::kernels::transposed::TRANSPOSED_SIDE;
use crate::kernels::{OuterBlueprint, SegmentedBlueprint};
use crate::routine::{RoutineError, shrink_tasks};

/// Bytes of the parts of one launch's gradients, beyond which adapters take turns.
const PART_BYTES: u64 = 128 << 20;

/// Everything of a backward pass.
pub(super) struct PreparedBackward {
    pub(super) input: Option<PreparedInput>,
    pub(super) vectors: Option<PreparedVectors>,
}

/// dx: the adjoint layer's forward pass.
pub(super) struct PreparedInput {
    /// w0ᵀ `[k, d]`, in the type of the activations.
    pub(super) transposed: Size,
    pub(super) cubes: [u32; 2],
    pub(super) batch: PreparedBatch,
}

/// The gradients of the adapters' vectors.
pub(super) struct PreparedVectors {
    /// Those of in-vectors `[in_vectors, d]` and of out-vectors `[out_vectors, k]`.
    pub(super) gradients: [Size; 2],
    pub(super) scales: Vec<Outer>,
    /// The launches that give those of expand vectors from x's h, and those of shrink vectors from g's.
    pub(super) low_rank: Option<[LowRank; 2]>,
}

/// A launch of `outer`, and those that add its parts.
pub(super) struct Outer {
    pub(super) blueprint: OuterBlueprint,
    pub(super) table: Table,
    /// Words of `table` that its parts start at: rows, in-partners, out-partners.
    pub(super) starts: [u32; 3],
    /// Tiles of a cube along the inputs and the outputs.
    pub(super) tiles: [u32; 2],
    pub(super) cubes: [u32; 3],
    /// In-scales and out-scales.
    pub(super) scales: [Scales; 2],
}

/// The scales of one side.
pub(super) struct Scales {
    pub(super) count: u32,
    /// `[parts, count, width]`
    pub(super) parts: Size,
    /// Which of the gradients each is.
    pub(super) targets: Table,
}

/// The two launches of one side's low-rank vectors.
pub(super) struct LowRank {
    pub(super) blueprint: SegmentedBlueprint,
    /// Shrink tasks.
    pub(super) tasks: Table,
    pub(super) task_count: u32,
    pub(super) hidden: Size,
    /// Adapters, then from word `rows` on their rows.
    pub(super) table: Table,
    pub(super) rows: u32,
    pub(super) cubes: [u32; 3],
}

/// Which vectors a side's h is made of, and where its gradients go.
#[derive(Clone, Copy)]
struct Side {
    /// An adapter's first vector in the pool.
    slot: fn(&AdapterGradient) -> u32,
    /// The first of its gradients.
    target: fn(&AdapterGradient) -> u32,
    /// What the gradients are as long as.
    width: u32,
}

impl Site<'_> {
    /// A backward pass; `self` is the layer's, `adjoint` that of w0ᵀ and the exchanged pools.
    pub(super) fn prepare_backward(
        &self,
        adjoint: &Site<'_>,
        schedule: &BackwardSchedule,
        wanted: Wanted,
    ) -> Result<PreparedBackward, LaunchError> {
        self.has_types()?;
        let input = wanted.has_input().then(|| self.prepare_input(adjoint, schedule)).transpose()?;
        let vectors = wanted.has_adapters().then(|| self.prepare_vectors(schedule)).transpose()?;
        Ok(PreparedBackward { input, vectors })
    }

    fn prepare_input(&self, adjoint: &Site<'_>, schedule: &BackwardSchedule) -> Result<PreparedInput, LaunchError> {
        let LayerShape { d, k } = self.shape;
        let transposed = self.size("the transposed weight", &[k as usize, d as usize], self.format.activations)?;
        let cubes = [d, k].map(|extent| extent.div_ceil(TRANSPOSED_SIDE) as usize);
        let cubes = [self.axis("the transposed weight", cubes[0])?, self.axis("the transposed weight", cubes[1])?];
        Ok(PreparedInput { transposed, cubes, batch: adjoint.prepare(schedule.input())? })
    }

    fn prepare_vectors(&self, schedule: &BackwardSchedule) -> Result<PreparedVectors, LaunchError> {
        let LayerShape { d, k } = self.shape;
        let gradients = [
            self.size("gradients of in-vectors", &[schedule.in_vectors() as usize, d as usize], Element::F32)?,
            self.size("gradients of out-vectors", &[schedule.out_vectors() as usize, k as usize], Element::F32)?,
        ];
        let scaled: Vec<_> = schedule.adapters().iter().filter(|own| own.scales() > 0).collect();
        let scales = if scaled.is_empty() { Vec::new() } else { self.outer_launches(&scaled)? };
        let ranked: Vec<_> = schedule.adapters().iter().filter(|own| own.low_rank.rank > 0).collect();
        let expand = Side {
            slot: |own| own.low_rank.shrink,
            target: |own| own.first_out + own.out_scales.len() as u32,
            width: k,
        };
        let shrink =
            Side { slot: |own| own.low_rank.expand, target: |own| own.first_in + own.in_scales.len() as u32, width: d };
        let both = || Ok::<_, LaunchError>([self.low_rank(&ranked, expand)?, self.low_rank(&ranked, shrink)?]);
        let low_rank = (!ranked.is_empty()).then(both).transpose()?;
        Ok(PreparedVectors { gradients, scales, low_rank })
    }

    /// Launches for as many adapters each as the memory of their parts allows.
    fn outer_launches(&self, adapters: &[&AdapterGradient]) -> Result<Vec<Outer>, LaunchError> {
        let stage = self.hardware.stage(self.format);
        let blueprint = |side| OuterBlueprint {
            multiply: self.hardware.multiply(self.format),
            plane_size: self.hardware.plane_size,
            side,
            quantisation: self.format.weight.quantisation(),
        };
        let fits = |own: &OuterBlueprint| {
            own.shared_bytes(stage) <= self.hardware.shared_bytes && own.units() <= self.hardware.units
        };
        let blueprint = OuterBlueprint::SIDES.into_iter().map(blueprint).find(fits);
        let blueprint = blueprint.ok_or(RoutineError::NoTile { bytes: self.hardware.shared_bytes })?;
        let LayerShape { d, k } = self.shape;
        // Not a matter of the batch, or a gradient's bits would be.
        let tiles = [d, k].map(|extent| {
            let tiles = extent.div_ceil(blueprint.side).max(1);
            tiles.div_ceil(self.hardware.cubes_along().min(tiles))
        });
        let along = |at: usize| [d, k][at].div_ceil(blueprint.side).max(1).div_ceil(tiles[at]);
        let cubes = [along(0), along(1)];
        let bytes = |own: &AdapterGradient| {
            let (ins, outs) = (own.in_scales.len() as u64, own.out_scales.len() as u64);
            4 * (ins * u64::from(cubes[1]) * u64::from(d)).max(outs * u64::from(cubes[0]) * u64::from(k))
        };
        let most = PART_BYTES.min(self.hardware.largest_buffer);
        let mut launches = Vec::new();
        let mut rest = adapters;
        while !rest.is_empty() {
            let mut held = 0;
            let fitting = rest.iter().take(AXIS_LIMIT as usize).take_while(|own| {
                held += bytes(own);
                held <= most
            });
            let (own, others) = rest.split_at(fitting.count().max(1));
            launches.push(self.outer(blueprint, (tiles, cubes), own)?);
            rest = others;
        }
        Ok(launches)
    }

    fn outer(
        &self,
        blueprint: OuterBlueprint,
        (tiles, [along_d, along_k]): ([u32; 2], [u32; 2]),
        adapters: &[&AdapterGradient],
    ) -> Result<Outer, LaunchError> {
        let (mut records, mut rows) = (Vec::new(), Vec::new());
        let (mut partners, mut targets): ([Vec<u32>; 2], [Vec<u32>; 2]) = Default::default();
        for own in adapters {
            records.push(OuterAdapter {
                first_row: rows.len() as u32,
                rows: own.rows() as u32,
                first_in: partners[0].len() as u32,
                in_scales: own.in_scales.len() as u32,
                first_out: partners[1].len() as u32,
                out_scales: own.out_scales.len() as u32,
            });
            rows.extend(own.row_indices());
            partners[0].extend(&own.in_scales);
            partners[1].extend(&own.out_scales);
            targets[0].extend((own.first_in..).take(own.in_scales.len()));
            targets[1].extend((own.first_out..).take(own.out_scales.len()));
        }
        let mut words = Words::default();
        words.append(&records);
        let starts = [words.append(&rows), words.append(&partners[0]), words.append(&partners[1])];
        let LayerShape { d, k } = self.shape;
        let side = |targets: &[u32], parts: u32, width: u32| {
            let extents = [parts as usize, targets.len(), width as usize];
            let parts = self.size("parts of gradients", &extents, Element::F32)?;
            let mut words = Words::default();
            words.append(targets);
            Ok::<_, LaunchError>(Scales { count: targets.len() as u32, parts, targets: self.table(words)? })
        };
        Ok(Outer {
            blueprint,
            table: self.table(words)?,
            starts,
            tiles,
            cubes: [along_d, along_k, self.axis("gradients of scales", adapters.len())?],
            scales: [side(&targets[0], along_k, d)?, side(&targets[1], along_d, k)?],
        })
    }

    fn low_rank(&self, adapters: &[&AdapterGradient], side: Side) -> Result<LowRank, LaunchError> {
        let (mut items, mut records, mut rows) = (Vec::new(), Vec::new(), Vec::new());
        let (mut hidden, mut highest) = (0u64, 0);
        for own in adapters {
            let rank = own.low_rank.rank;
            highest = highest.max(rank);
            let first = u32::try_from(hidden).unwrap_or(u32::MAX);
            let (first_row, target) = (rows.len() as u32, (side.target)(own));
            records.push(LowRankGradient { first_row, rows: own.rows() as u32, hidden: first, rank, target });
            for run in &own.runs {
                for start in (0..run.rows).step_by(TASK_SIDE as usize) {
                    items.push(SegmentItem {
                        first_row: run.first_row + start,
                        rows: TASK_SIDE.min(run.rows - start),
                        shrink: (side.slot)(own),
                        expand: 0,
                        rank,
                        offset: u32::try_from(hidden).unwrap_or(u32::MAX),
                    });
                    hidden += u64::from(TASK_SIDE.min(run.rows - start)) * u64::from(rank);
                }
            }
            rows.extend(own.row_indices());
        }
        let tasks = shrink_tasks(&items);
        let (mut task_words, mut words) = (Words::default(), Words::default());
        task_words.append(&tasks);
        words.append(&records);
        let rows = words.append(&rows);
        let lanes = self.hardware.vector_size(side.width, self.format).min(4);
        let columns = (side.width as usize / lanes).div_ceil(ELEMENTWISE_UNITS as usize);
        Ok(LowRank {
            blueprint: SegmentedBlueprint {
                multiply: self.hardware.multiply(self.format),
                plane_size: self.hardware.plane_size,
            },
            tasks: self.table(task_words)?,
            task_count: within("shrink", tasks.len(), AXIS_LIMIT)?,
            hidden: self.size("low-rank sums", &[usize::try_from(hidden).unwrap_or(usize::MAX)], Element::F32)?,
            table: self.table(words)?,
            rows,
            cubes: [
                self.axis("the columns of low-rank gradients", columns)?,
                self.axis("the ranks of low-rank gradients", highest.div_ceil(GRADIENT_RANKS) as usize)?,
                self.axis("low-rank gradients", adapters.len())?,
            ],
        })
    }
}
