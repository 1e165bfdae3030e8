//! The rows of one step, and what a model's projections share of it. A step runs hundreds of projections, and most of them have
//! their adapters in the same slots: they run one schedule.

use std::sync::{Arc, Mutex, MutexGuard, PoisonError};

use flora_plan::batch::{AdapterSlots, BatchShape, Segment};
use flora_plan::gradient::GradientLowering;
use flora_plan::plan::Plan;
use flora_plan::schedule::{BackwardSchedule, Schedule, ScheduleError, backward_schedule_by, schedule};

use crate::gates::RowGates;
use crate::projection::Projection;

/// The rows of one step, the same for all projections of a model: consecutive segments, each with the position of its adapter in
/// the projections' tables. The base model is at 0, and wherever a projection has no adapter.
///
/// It keeps the schedules that were laid out for it, and projections whose adapters lie alike share them. A clone has none yet.
#[derive(Debug, Default)]
pub struct StepBatch {
    segments: Vec<Segment>,
    rows: usize,
    /// The positions that have rows, rising.
    positions: Vec<u32>,
    /// Of the rows of adapters that have them.
    gates: Vec<RowGates>,
    laid_out: Mutex<LaidOut>,
}

/// What was laid out for a batch.
#[derive(Debug, Default)]
struct LaidOut {
    views: Vec<View>,
    /// Schedules in all, those that were given up among them.
    schedules: usize,
}

/// The batch as projections see it whose adapters lie alike.
#[derive(Debug)]
struct View {
    /// Where the adapter of each of the batch's positions lies; `None` for the base.
    adapters: Vec<Option<AdapterSlots>>,
    /// The segments that have rows; those without an adapter are the base's.
    segments: Vec<Segment>,
    shape: BatchShape,
    /// By the plan and whether the layer has an epilogue.
    schedules: Vec<(Plan, bool, Arc<Schedule>)>,
    /// By the plan of the input's gradient and the lowerings of the adapters' own.
    backward: Vec<(Plan, Arc<BackwardSchedule>)>,
}

/// Views that are kept. A model has one for each set of projections whose adapters lie alike; more come together only where one
/// batch runs again and again while adapters come and go.
const MOST_VIEWS: usize = 1024;

impl StepBatch {
    /// Segments as (position, rows).
    pub fn new(segments: impl IntoIterator<Item = (u32, u32)>) -> Self {
        let segments: Vec<_> = segments.into_iter().map(|(adapter, rows)| Segment { rows, adapter }).collect();
        let rows = segments.iter().map(|segment| segment.rows as usize).sum();
        let with_rows = segments.iter().filter(|segment| segment.rows > 0);
        let mut positions: Vec<_> = with_rows.map(|segment| segment.adapter).collect();
        positions.sort_unstable();
        positions.dedup();
        Self { segments, rows, positions, gates: Vec::new(), laid_out: Mutex::default() }
    }

    /// The same with gates, for the rows of adapters whose parts are weighed for each row.
    #[must_use]
    pub fn with_gates(self, gates: Vec<RowGates>) -> Self {
        Self { gates, ..self }
    }

    /// The gates of its rows.
    pub fn gates(&self) -> &[RowGates] {
        &self.gates
    }

    /// Rows of all segments.
    pub fn rows(&self) -> usize {
        self.rows
    }

    /// The segments.
    pub fn segments(&self) -> &[Segment] {
        &self.segments
    }

    /// How many schedules were laid out for the projections that it ran through so far.
    pub fn schedules(&self) -> usize {
        self.laid_out().schedules
    }

    /// The schedule of this batch for a projection, with its epilogue or without, by the plan that `choose` picks for it. It is laid out if no projection was here
    /// before whose adapters lie in the same slots, with the same plan, and that has an epilogue or none as this one.
    pub(crate) fn schedule(
        &self,
        projection: &Projection,
        finishes: bool,
        choose: impl FnOnce(&BatchShape) -> Plan,
    ) -> Result<Arc<Schedule>, ScheduleError> {
        let mut laid_out = self.laid_out();
        let LaidOut { views, schedules } = &mut *laid_out;
        let view = self.view(views, projection);
        let plan = choose(&view.shape);
        let known = view.schedules.iter().find(|(own, own_finishes, _)| (*own, *own_finishes) == (plan, finishes));
        if let Some((_, _, schedule)) = known {
            schedule.fits(projection.shape())?;
            return Ok(schedule.clone());
        }
        let laid_out = schedule(&plan, projection.shape(), &view.segments, projection.adapters(), finishes)?;
        let laid_out = Arc::new(laid_out);
        view.schedules.push((plan, finishes, laid_out.clone()));
        *schedules += 1;
        Ok(laid_out)
    }

    /// The backward pass of this batch for a projection, shared likewise.
    pub(crate) fn backward_schedule(
        &self,
        projection: &Projection,
        plan: Plan,
        choose: impl Fn(u64, u64) -> GradientLowering,
    ) -> Result<Arc<BackwardSchedule>, ScheduleError> {
        let mut laid_out = self.laid_out();
        let LaidOut { views, schedules } = &mut *laid_out;
        let view = self.view(views, projection);
        let is_chosen = |schedule: &BackwardSchedule| {
            schedule.adapters().iter().all(|own| own.lowering == choose(own.rows(), own.scales()))
        };
        let known = view.backward.iter().find(|(own, schedule)| *own == plan && is_chosen(schedule));
        if let Some((_, schedule)) = known {
            schedule.fits(projection.shape())?;
            return Ok(schedule.clone());
        }
        let (shape, adapters) = (projection.shape(), projection.adapters());
        let laid_out = backward_schedule_by(&plan, shape, &view.segments, adapters, choose)?;
        let laid_out = Arc::new(laid_out);
        view.backward.push((plan, laid_out.clone()));
        *schedules += 1;
        Ok(laid_out)
    }

    /// The positions that have rows, rising.
    pub(crate) fn positions(&self) -> &[u32] {
        &self.positions
    }

    /// The batch as a projection sees it.
    fn view<'v>(&self, views: &'v mut Vec<View>, projection: &Projection) -> &'v mut View {
        let at = views.iter().position(|view| view.is_of(&self.positions, projection)).unwrap_or_else(|| {
            if views.len() == MOST_VIEWS {
                views.clear();
            }
            views.push(View::of(self, projection));
            views.len() - 1
        });
        &mut views[at]
    }

    // A panic of another holder leaves what is laid out as whole as any error does.
    fn laid_out(&self) -> MutexGuard<'_, LaidOut> {
        self.laid_out.lock().unwrap_or_else(PoisonError::into_inner)
    }
}

impl Clone for StepBatch {
    fn clone(&self) -> Self {
        let Self { segments, rows, positions, gates, .. } = self;
        let (segments, positions, gates) = (segments.clone(), positions.clone(), gates.clone());
        Self { segments, rows: *rows, positions, gates, laid_out: Mutex::default() }
    }
}

impl PartialEq for StepBatch {
    fn eq(&self, other: &Self) -> bool {
        self.segments == other.segments && self.gates == other.gates
    }
}

impl Eq for StepBatch {}

impl View {
    fn of(batch: &StepBatch, projection: &Projection) -> Self {
        let segments = batch.segments.iter().filter(|segment| segment.rows > 0);
        let resolved = |segment: &Segment| match projection.slots_at(segment.adapter) {
            Some(_) => *segment,
            None => Segment { adapter: 0, ..*segment },
        };
        let segments: Vec<_> = segments.map(resolved).collect();
        let adapters = batch.positions.iter().map(|position| projection.slots_at(*position).cloned()).collect();
        let shape = BatchShape::of(&segments, projection.adapters());
        Self { adapters, segments, shape, schedules: Vec::new(), backward: Vec::new() }
    }

    /// Whether a projection sees the batch so.
    fn is_of(&self, positions: &[u32], projection: &Projection) -> bool {
        let adapters = self.adapters.iter().map(Option::as_ref);
        adapters.eq(positions.iter().map(|position| projection.slots_at(*position)))
    }
}
