//! What a tile launch multiplies, before tiles are known: a step's rows as records of the kernel's table, and which of them may
//! share a tile.

use flora_plan::schedule::{Gemm, LowRankRows, Scale, ScheduledRow, SegmentItem, WeightRun};

use crate::kernels::tables::{ShrinkTask, TASK_SIDE, TileRow};

/// Rows that may share a tile: they are multiplied by the same weight.
#[derive(Clone, Copy)]
pub(super) struct Group {
    pub(super) first: u32,
    pub(super) end: u32,
    pub(super) weight: u32,
    pub(super) first_scale: u32,
    pub(super) end_scale: u32,
    pub(super) unscaled: u32,
}

/// What a tile launch multiplies.
#[derive(Default)]
pub(super) struct Rows {
    pub(super) rows: Vec<TileRow>,
    pub(super) groups: Vec<Group>,
    /// Scaled virtual rows of W_i.
    pub(super) scales: Vec<Scale>,
    pub(super) tasks: Vec<ShrinkTask>,
    /// Numbers of h.
    pub(super) hidden: u32,
}

impl Rows {
    fn push(&mut self, virtual_row: ScheduledRow) {
        self.rows.push(TileRow { virtual_row, ..TileRow::default() });
    }

    /// A group of the rows from `first` on.
    fn group(&mut self, first: usize, weight: u32) {
        let (first, end) = (first as u32, self.rows.len() as u32);
        if first < end {
            self.groups.push(Group { first, end, weight, first_scale: 0, end_scale: 0, unscaled: 0 });
        }
    }

    pub(super) fn of_gemm(gemm: &Gemm) -> Self {
        let mut own = Self::default();
        gemm.rows.iter().for_each(|row| own.push(*row));
        own.group(0, 0);
        let mut scales_of = std::collections::BTreeMap::new();
        for segment in &gemm.segments {
            let first = own.rows.len();
            for row in segment.first_row..segment.first_row + segment.rows {
                own.push(ScheduledRow { row, in_slot: 0, out_slot: 0, last: 1 });
            }
            own.group(first, 0);
            let (first_scale, end_scale, unscaled) = *scales_of.entry(segment.first_scale).or_insert_with(|| {
                let scales = &gemm.scales[segment.first_scale as usize..segment.end_scale as usize];
                let scaled = scales.iter().filter(|scale| scale.in_slot > 0 || scale.out_slot > 0);
                let first = own.scales.len() as u32;
                own.scales.extend(scaled);
                let end = own.scales.len() as u32;
                (first, end, scales.len() as u32 - (end - first))
            });
            if let Some(group) = own.groups.last_mut() {
                *group = Group { first_scale, end_scale, unscaled, ..*group };
            }
        }
        own.low_rank(&gemm.low_rank);
        own
    }

    /// Rows that are multiplied by weights of their adapters' own.
    pub(super) fn of_runs(runs: &[WeightRun]) -> Self {
        let mut own = Self::default();
        for run in runs {
            let first = own.rows.len();
            for row in run.first_row..run.first_row + run.rows {
                own.push(ScheduledRow { row, in_slot: 0, out_slot: 0, last: 1 });
            }
            own.group(first, run.weight);
        }
        own
    }

    /// `count` matrices of `rows` rows each, one after the other.
    pub(super) fn of_matrices(count: u32, rows: u32) -> Self {
        let mut own = Self::default();
        for matrix in 0..count {
            let first = own.rows.len();
            for row in matrix * rows..(matrix + 1) * rows {
                own.push(ScheduledRow { row, in_slot: 0, out_slot: 0, last: 1 });
            }
            own.group(first, matrix);
        }
        own
    }

    /// Gives output rows their place in h, in the order of the table, and lists who computes it.
    fn low_rank(&mut self, runs: &[LowRankRows]) {
        let mut open: Option<(LowRankRows, u32, u32)> = None;
        for entry in self.rows.iter_mut().filter(|entry| entry.virtual_row.last == 1) {
            let row = entry.virtual_row.row;
            let at = runs.partition_point(|run| run.first_row + run.rows <= row);
            let Some(run) = runs.get(at).filter(|run| run.first_row <= row && run.rank > 0) else { continue };
            (entry.expand, entry.rank, entry.hidden) = (run.expand, run.rank, self.hidden);
            match &mut open {
                Some((own, first, rows)) if *own == *run && *first + *rows == row && *rows < TASK_SIDE => *rows += 1,
                _ => {
                    if let Some(done) = open.replace((*run, row, 1)) {
                        push_tasks(&mut self.tasks, done, self.hidden);
                    }
                }
            }
            self.hidden += run.rank;
        }
        if let Some(done) = open {
            push_tasks(&mut self.tasks, done, self.hidden);
        }
    }
}

/// The tasks of some rows of one run whose h ends at `end`.
fn push_tasks(tasks: &mut Vec<ShrinkTask>, (run, first_row, rows): (LowRankRows, u32, u32), end: u32) {
    let LowRankRows { shrink, rank, .. } = run;
    tasks.extend(tasks_of(ShrinkTask { first_row, rows, shrink, ranks: rank, hidden: end - rows * rank, pitch: rank }));
}

/// A task of any rank, cut into tasks of at most [`TASK_SIDE`] ranks.
fn tasks_of(whole: ShrinkTask) -> impl Iterator<Item = ShrinkTask> {
    (0..whole.ranks).step_by(TASK_SIDE as usize).map(move |rank| ShrinkTask {
        shrink: whole.shrink + rank,
        ranks: TASK_SIDE.min(whole.ranks - rank),
        hidden: whole.hidden + rank,
        ..whole
    })
}

/// The shrink tasks of `segmented`.
pub(crate) fn shrink_tasks(items: &[SegmentItem]) -> Vec<ShrinkTask> {
    let whole = |item: &SegmentItem| {
        let SegmentItem { first_row, rows, shrink, expand: _, rank, offset } = *item;
        ShrinkTask { first_row, rows, shrink, ranks: rank, hidden: offset, pitch: rank }
    };
    items.iter().map(whole).flat_map(tasks_of).collect()
}
