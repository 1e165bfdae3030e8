//! The rows of one call: which adapters they have, the virtual inputs that the base multiplies for them, and what is made of the
//! products.

use std::ops::Range;
use std::sync::Arc;

use super::error::AttachedError;
use super::kernels::{self, Tile};
use super::placed::{Needs, PlacedAdapter, Scales};
use super::rows::{self, FloatRows, Output};
use super::{AttachedAdapters, Slots};
use crate::team::Team;
use crate::values::{Rows, RowsMut, Values, span};

/// What the rows of a batch ask for.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord)]
pub enum Work {
    /// The base's product and nothing else.
    Base,
    /// Sums that are added to the base's product: [`AttachedAdapters::add`].
    Sums,
    /// Scaled inputs or outputs: [`AttachedAdapters::expand`] and [`AttachedAdapters::combine`].
    Scales,
}

/// How the owner of the base multiplies by it.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Grouping {
    /// By all outputs at once: inputs that one part scales are multiplied for the others, too.
    Whole,
    /// By each part's outputs apart.
    Parts,
}

/// Rows that one task computes, unless there are fewer.
const TASK_ROWS: usize = 32;

/// Rows whose sums are computed together.
pub(super) const TILE_ROWS: usize = 4;

/// Consecutive rows with the same adapters.
struct Segment<'a> {
    first: usize,
    rows: usize,
    /// By part; `None`: the base alone.
    adapters: Option<&'a [Option<Arc<PlacedAdapter>>]>,
}

impl<'a> Segment<'a> {
    fn adapter(&self, part: usize) -> Option<&'a PlacedAdapter> {
        self.adapters?.get(part)?.as_deref()
    }

    /// Virtual inputs of each row for a group of parts: the row itself, where some part needs it, and those that are scaled.
    fn inputs(&self, group: &Range<usize>) -> (bool, usize) {
        let (mut is_plain, mut scaled) = (false, 0);
        for part in group.clone() {
            match self.adapter(part) {
                None => is_plain = true,
                Some(adapter) => {
                    for scales in &adapter.virtual_rows {
                        match scales.inner {
                            None => is_plain = true,
                            Some(_) => scaled += 1,
                        }
                    }
                }
            }
        }
        (is_plain, scaled)
    }

    fn work(&self) -> Work {
        let adapters = self.adapters.unwrap_or_default().iter().flatten();
        let work = adapters.map(|adapter| match adapter.needs() {
            Needs::Scaled => Work::Scales,
            Needs::Product if adapter.adds() => Work::Sums,
            Needs::Product => Work::Base,
        });
        work.max().unwrap_or(Work::Base)
    }

    /// Multiply-adds of each row's sums.
    fn macs(&self, (inputs, parts): (usize, &[Range<usize>])) -> usize {
        let sums = parts
            .iter()
            .enumerate()
            .filter_map(|(part, columns)| self.adapter(part).map(|adapter| adapter.rank * (inputs + columns.len())));
        sums.sum()
    }
}

/// Some rows of a segment.
struct Task {
    segment: usize,
    rows: Range<usize>,
}

impl AttachedAdapters {
    /// What a batch asks for whose row i has the adapters of slot `rows[i]`, or none where that is -1.
    ///
    /// # Errors
    /// A slot that there isn't.
    pub fn work(&self, rows: &[i64]) -> Result<Work, AttachedError> {
        let slots = self.read();
        let segments = segments(&slots, rows)?;
        Ok(segments.iter().map(Segment::work).max().unwrap_or(Work::Base))
    }

    /// How many virtual inputs each group of a batch has.
    ///
    /// # Errors
    /// A slot that there isn't.
    pub fn virtual_inputs(&self, rows: &[i64], grouping: Grouping) -> Result<Vec<usize>, AttachedError> {
        let slots = self.read();
        let segments = segments(&slots, rows)?;
        Ok(self.groups(grouping).iter().map(|group| count_inputs(&segments, group)).collect())
    }

    /// Adds the low-rank sums and offsets of x `[rows, inputs]` to y `[rows, outputs]`, which holds the base's product and its bias.
    ///
    /// # Errors
    /// A slot that there isn't, a row that is scaled, memory that is too small; y is as it was then.
    pub fn add(&self, rows: &[i64], x: Rows<'_>, y: RowsMut<'_>, team: Team) -> Result<(), AttachedError> {
        check("x", (rows.len(), self.inputs), x.pitch, x.values.len())?;
        check("y", (rows.len(), self.outputs()), y.pitch, y.values.len())?;
        let slots = self.read();
        let segments = segments(&slots, rows)?;
        if let Some(segment) = segments.iter().find(|segment| segment.work() == Work::Scales) {
            return Err(AttachedError::Scaled { row: segment.first });
        }
        let mut y = y;
        let out = Output::new(self.arch, &mut y);
        self.for_tasks(
            &segments,
            |segment| segment.work() == Work::Sums,
            0,
            team,
            |segment, task| {
                for (part, columns) in self.parts.iter().enumerate() {
                    if let Some(adapter) = segment.adapter(part).filter(|adapter| adapter.adds()) {
                        self.add_part(adapter, task.clone(), x, columns, out);
                    }
                }
            },
        );
        Ok(())
    }

    /// Writes the virtual inputs of a group, `[virtual inputs, inputs]`, in the order of the rows.
    ///
    /// # Errors
    /// A slot or group that there isn't, memory that is too small; nothing is written then.
    pub fn expand(
        &self,
        rows: &[i64],
        (grouping, group): (Grouping, usize),
        x: Rows<'_>,
        out: RowsMut<'_>,
    ) -> Result<(), AttachedError> {
        let groups = self.groups(grouping);
        let count = groups.len();
        let group = groups.into_iter().nth(group).ok_or(AttachedError::NoPart { part: group, parts: count })?;
        check("x", (rows.len(), self.inputs), x.pitch, x.values.len())?;
        let slots = self.read();
        let segments = segments(&slots, rows)?;
        check("the virtual inputs", (count_inputs(&segments, &group), self.inputs), out.pitch, out.values.len())?;
        let mut out = out;
        let out = Output::new(self.arch, &mut out);
        let mut at = 0;
        for segment in &segments {
            let (is_plain, _) = segment.inputs(&group);
            for row in segment.first..segment.first + segment.rows {
                let scales = group.clone().filter_map(|part| segment.adapter(part)).flat_map(|adapter| {
                    let inner = adapter.virtual_rows.iter().filter_map(|scales| scales.inner);
                    inner.map(move |inner| Some((adapter, inner)))
                });
                for scale in is_plain.then_some(None).into_iter().chain(scales) {
                    self.scratches.lend(|scratch| {
                        let values = scratch.x.floats(self.inputs);
                        rows::read(self.arch, x.values, row * x.pitch, values);
                        if let Some((adapter, inner)) = scale {
                            let scale = adapter.in_vectors.floats(self.arch, inner, 1, &mut scratch.inner);
                            self.arch.dispatch(kernels::Scale { values, scale: scale.vector(0) });
                        }
                        // SAFETY: one row after the other, and `out` outlives the loop.
                        unsafe { out.write(at, 0, values) };
                    });
                    at += 1;
                }
            }
        }
        Ok(())
    }

    /// Writes y `[rows, outputs]` from the base's products with each group's virtual inputs, `[virtual inputs, outputs of the
    /// group]`, without its bias, which is given apart.
    ///
    /// # Errors
    /// A slot that there isn't, products that aren't those of this batch, memory that is too small; y is as it was then.
    pub fn combine(
        &self,
        rows: &[i64],
        (grouping, products): (Grouping, &[Rows<'_>]),
        bias: Option<Values<'_>>,
        x: Rows<'_>,
        y: RowsMut<'_>,
        team: Team,
    ) -> Result<(), AttachedError> {
        let groups = self.groups(grouping);
        if products.len() != groups.len() {
            return Err(AttachedError::WrongGroups { expected: groups.len(), found: products.len() });
        }
        check("x", (rows.len(), self.inputs), x.pitch, x.values.len())?;
        check("y", (rows.len(), self.outputs()), y.pitch, y.values.len())?;
        if let Some(bias) = bias {
            check("the bias", (1, self.outputs()), self.outputs(), bias.len())?;
        }
        let slots = self.read();
        let segments = segments(&slots, rows)?;
        for (group, products) in groups.iter().zip(products) {
            let expected = (count_inputs(&segments, group), self.columns(group).len());
            check("the base's products", expected, products.pitch, products.values.len())?;
        }
        let firsts: Vec<Vec<usize>> = groups.iter().map(|group| first_inputs(&segments, group)).collect();
        let mut y = y;
        let out = Output::new(self.arch, &mut y);
        self.for_tasks(
            &segments,
            |_| true,
            self.outputs(),
            team,
            |segment, task| {
                for ((group, products), firsts) in groups.iter().zip(products).zip(&firsts) {
                    let (is_plain, scaled) = segment.inputs(group);
                    let each = usize::from(is_plain) + scaled;
                    let first = firsts[segment.index] + (task.start - segment.first) * each;
                    let group_start = self.columns(group).start;
                    let mut scaled_before = usize::from(is_plain);
                    for part in group.clone() {
                        let columns = &self.parts[part];
                        let own = Products {
                            rows: *products,
                            first,
                            each,
                            scaled: scaled_before,
                            column: columns.start - group_start,
                        };
                        let adapter = segment.adapter(part);
                        self.combine_part(adapter, task.clone(), &own, bias, columns, out);
                        if let Some(adapter) = adapter {
                            scaled_before +=
                                adapter.virtual_rows.iter().filter(|scales| scales.inner.is_some()).count();
                            if adapter.adds() {
                                self.add_part(adapter, task.clone(), x, columns, out);
                            }
                        }
                    }
                }
            },
        );
        Ok(())
    }

    /// Sums of products with their out-scales, and the bias.
    fn combine_part(
        &self,
        adapter: Option<&PlacedAdapter>,
        rows: Range<usize>,
        products: &Products<'_>,
        bias: Option<Values<'_>>,
        columns: &Range<usize>,
        out: Output,
    ) {
        let virtual_rows = adapter.map_or(Scales::BASE, |adapter| &adapter.virtual_rows);
        self.scratches.lend(|scratch| {
            let (sums, product) = (scratch.sums.floats(columns.len()), scratch.products.floats(columns.len()));
            for (at, row) in rows.enumerate() {
                match bias {
                    Some(bias) => rows::read(self.arch, bias, columns.start, sums),
                    None => sums.fill(0.0),
                }
                let first = products.first + at * products.each;
                let mut scaled = first + products.scaled;
                for scales in virtual_rows {
                    let source = match scales.inner {
                        None => first,
                        Some(_) => {
                            scaled += 1;
                            scaled - 1
                        }
                    };
                    let place = source * products.rows.pitch + products.column;
                    rows::read(self.arch, products.rows.values, place, product);
                    let outer = adapter.zip(scales.outer);
                    let scale = outer
                        .map(|(adapter, outer)| adapter.out_vectors.floats(self.arch, outer, 1, &mut scratch.outer));
                    let scale = scale.as_ref().map(|scale| scale.vector(0));
                    self.arch.dispatch(kernels::AddScaled { sums, values: product, scale });
                }
                // SAFETY: no other task has these rows, and no other part these columns.
                unsafe { out.write(row, columns.start, sums) };
            }
        });
    }

    /// Low-rank sums and the offset of some rows, added to y.
    fn add_part(&self, adapter: &PlacedAdapter, rows: Range<usize>, x: Rows<'_>, columns: &Range<usize>, out: Output) {
        self.scratches.lend(|scratch| {
            let shrink = adapter.in_vectors.floats(self.arch, adapter.shrink, adapter.rank, &mut scratch.inner);
            let expand = adapter.out_vectors.floats(self.arch, adapter.expand, adapter.rank, &mut scratch.outer);
            let hidden = scratch.products.floats(TILE_ROWS * adapter.rank);
            let mut first = rows.start;
            while first < rows.end {
                let count = if rows.end - first >= TILE_ROWS { TILE_ROWS } else { 1 };
                let x = FloatRows::of(self.arch, x, (first, count), self.inputs, &mut scratch.x);
                // SAFETY: no other task has these rows, and no other part these columns.
                unsafe {
                    out.update(first, count, columns, &mut scratch.sums, |sums, pitch| {
                        let tile = Tile { x, shrink, expand, rank: adapter.rank, rows: count };
                        self.arch.dispatch(kernels::AddLowRank { tile, hidden, sums, pitch });
                        if let Some(offset) = &adapter.offset {
                            for row in 0..count {
                                let sums = &mut sums[row * pitch..][..columns.len()];
                                self.arch.dispatch(kernels::AddScaled { sums, values: offset, scale: None });
                            }
                        }
                    });
                }
                first += count;
            }
        });
    }

    /// Does `work` for some rows of a segment after the other, on the team's threads where there is enough to do.
    fn for_tasks<'s>(
        &self,
        segments: &'s [Segment<'s>],
        has_work: impl Fn(&Segment<'_>) -> bool,
        macs: usize,
        team: Team,
        work: impl Fn(&Indexed<'s>, Range<usize>) + Sync,
    ) {
        let mut tasks = Vec::new();
        let mut total = 0;
        for (index, segment) in segments.iter().enumerate().filter(|(_, segment)| has_work(segment)) {
            total += segment.rows * (macs + segment.macs((self.inputs, &self.parts)));
            let end = segment.first + segment.rows;
            let starts = (segment.first..end).step_by(TASK_ROWS);
            tasks.extend(starts.map(|start| Task { segment: index, rows: start..(start + TASK_ROWS).min(end) }));
        }
        team.run(tasks.len(), total as u64, &|at: usize| {
            let Task { segment, rows } = &tasks[at];
            work(&Indexed { segment: &segments[*segment], index: *segment }, rows.clone());
        });
    }

    /// The parts of each group.
    fn groups(&self, grouping: Grouping) -> Vec<Range<usize>> {
        match grouping {
            Grouping::Whole => std::iter::once(0..self.parts.len()).collect(),
            Grouping::Parts => (0..self.parts.len()).map(|part| part..part + 1).collect(),
        }
    }

    fn columns(&self, group: &Range<usize>) -> Range<usize> {
        let parts = &self.parts[group.clone()];
        parts.first().map_or(0, |part| part.start)..parts.last().map_or(0, |part| part.end)
    }
}

/// A segment and its place among the others.
struct Indexed<'a> {
    segment: &'a Segment<'a>,
    index: usize,
}

impl<'a> std::ops::Deref for Indexed<'a> {
    type Target = Segment<'a>;
    fn deref(&self) -> &Segment<'a> {
        self.segment
    }
}

/// The products that a part of some rows reads.
struct Products<'a> {
    rows: Rows<'a>,
    /// The first row's first virtual input.
    first: usize,
    /// Virtual inputs of a row.
    each: usize,
    /// The first of a row's that this part scales, counted from the row's first.
    scaled: usize,
    /// The part's first column.
    column: usize,
}

/// Runs of equal slots.
fn segments<'s>(slots: &'s Slots, rows: &[i64]) -> Result<Vec<Segment<'s>>, AttachedError> {
    let mut segments: Vec<Segment<'s>> = Vec::new();
    let mut last = None;
    for (row, slot) in rows.iter().enumerate() {
        if last == Some(slot) {
            if let Some(segment) = segments.last_mut() {
                segment.rows += 1;
            }
            continue;
        }
        last = Some(slot);
        let adapters = match usize::try_from(*slot) {
            Ok(at) => slots.get(at).map(Option::as_deref),
            Err(_) if *slot == -1 => Some(None),
            Err(_) => None,
        };
        let adapters = adapters.ok_or(AttachedError::RowSlot { row, slot: *slot, slots: slots.len() })?;
        segments.push(Segment { first: row, rows: 1, adapters });
    }
    Ok(segments)
}

fn count_inputs(segments: &[Segment<'_>], group: &Range<usize>) -> usize {
    segments.iter().map(|segment| segment.rows * each_input(segment, group)).sum()
}

/// The first virtual input of each segment.
fn first_inputs(segments: &[Segment<'_>], group: &Range<usize>) -> Vec<usize> {
    let firsts = segments.iter().scan(0, |first, segment| {
        let own = *first;
        *first += segment.rows * each_input(segment, group);
        Some(own)
    });
    firsts.collect()
}

fn each_input(segment: &Segment<'_>, group: &Range<usize>) -> usize {
    let (is_plain, scaled) = segment.inputs(group);
    usize::from(is_plain) + scaled
}

fn check(what: &'static str, (rows, width): (usize, usize), pitch: usize, found: usize) -> Result<(), AttachedError> {
    let expected = span(rows, width, pitch);
    if found < expected || (rows > 1 && pitch < width) {
        return Err(AttachedError::WrongMemory { what, rows, width, pitch, expected, found });
    }
    Ok(())
}
