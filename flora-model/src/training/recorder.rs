//! The host's operations, recorded as they are computed: what a decoder's forward pass is in training. The decoder is the one that
//! serves; its activations alone are taken out of epilogues, because their derivatives need the sums before them.

use std::ops::Range;
use std::sync::{Arc, Mutex, PoisonError};

use flora_host::decoder::{AttentionSegment, KeyValueCache, RotaryRows};
use flora_host::{OwnedValues, ValuesMut};
use flora_ir::Activation;
use flora_plan::layer::Element;
use flora_plan::weight::PackedWeight;
use flora_runtime::{Buffer, Device, PlannedProjection, StepBatch};

use crate::error::ServeError;
use crate::form::{Finish, ProjectionForm};
use crate::host::HostOperations;
use crate::operations::{AttentionConfig, AttentionInputs, Linear, NormParameters, Operations, SegmentRows};
use crate::training::tape::{Place, Record, Tape, floats};

/// The operations of a model in training.
pub(crate) struct Recorder {
    pub(crate) host: HostOperations,
    /// `None` while nothing is recorded.
    tape: Mutex<Option<Tape>>,
}

/// A matrix, and where its gradient belongs; `None` where it depends on nothing that is trained, or nothing is recorded.
#[derive(Clone)]
pub(crate) struct Recorded {
    pub(crate) buffer: Buffer,
    pub(crate) place: Option<Place>,
}

/// A projection whose activation is apart.
#[derive(Clone)]
pub(crate) struct TrainedLinear {
    pub(crate) projection: PlannedProjection,
    pub(crate) path: Arc<str>,
    activation: Option<Activation>,
}

impl Linear for TrainedLinear {
    fn of(
        form: &ProjectionForm,
        path: &str,
        weight: &PackedWeight,
        bias: Option<&[f32]>,
        finish: Finish,
    ) -> Result<Self, ServeError> {
        let (finish, activation) = match finish {
            Finish::Activation(activation) => (Finish::Nothing, Some(activation)),
            other => (other, None),
        };
        Ok(Self { projection: form.projection(weight, bias, finish)?, path: path.into(), activation })
    }

    fn projection(&self) -> &PlannedProjection {
        &self.projection
    }
}

impl TrainedLinear {
    /// Whether some rows of a batch have an adapter here.
    fn is_adapted(&self, batch: &StepBatch) -> bool {
        let mut positions = batch.segments().iter().map(|segment| segment.adapter);
        self.projection.change(|projection| positions.any(|position| projection.slots_at(position).is_some()))
    }
}

/// What attention of all layers of a step shares.
pub(crate) struct StepPositions {
    pub(crate) segments: Vec<Range<usize>>,
    pub(crate) rotary: Option<RotaryRows>,
}

impl Recorder {
    /// What `work` makes of `x`, and its records: those of what depends on x, if the gradient of x is wanted, and on adapters.
    pub(crate) fn record(
        &self,
        x: Recorded,
        work: impl FnOnce(&Recorded) -> Result<Recorded, ServeError>,
    ) -> Result<(Recorded, Tape), ServeError> {
        let mut tape = Tape::default();
        let place = x.place.map(|_| tape.push(Record::Given));
        self.set(Some(tape));
        let made = work(&Recorded { buffer: x.buffer, place });
        let tape = self.set(None).unwrap_or_default();
        Ok((made?, tape))
    }

    // A panic of another holder leaves the tape as whole as any error does.
    fn set(&self, tape: Option<Tape>) -> Option<Tape> {
        std::mem::replace(&mut self.tape.lock().unwrap_or_else(PoisonError::into_inner), tape)
    }

    fn push(&self, record: impl FnOnce() -> Record) -> Option<Place> {
        let mut tape = self.tape.lock().unwrap_or_else(PoisonError::into_inner);
        tape.as_mut().map(|tape| tape.push(record()))
    }

    fn activate(&self, activation: Activation, x: Recorded) -> Result<Recorded, ServeError> {
        let numbers = floats(&x.buffer)?;
        let mut out = vec![0.0; numbers.len()];
        self.host.engine.activate(activation, numbers, &mut out)?;
        let buffer = flora_host::buffer(&self.host.device, OwnedValues::F32(out))?;
        let place = x.place.and_then(|place| self.push(|| Record::Activated { activation, x: x.buffer, place }));
        Ok(Recorded { buffer, place })
    }
}

impl Operations for Recorder {
    type Matrix = Recorded;
    type Linear = TrainedLinear;
    type Norm = Arc<NormParameters>;
    /// Segments are whole: no later step attends to one.
    type Cache = ();
    type Positions = Arc<StepPositions>;

    fn new(device: &Device, attention: AttentionConfig, element: Element) -> Result<Self, ServeError> {
        if element != Element::F32 {
            return Err(ServeError::NotFloats(element));
        }
        Ok(Self { host: HostOperations::new(device, attention, element)?, tape: Mutex::default() })
    }

    fn project(
        &self,
        linear: &TrainedLinear,
        x: &Recorded,
        batch: &StepBatch,
        residual: Option<&Recorded>,
    ) -> Result<Recorded, ServeError> {
        let buffer = linear.projection.forward(&x.buffer, batch, residual.map(|residual| &residual.buffer))?;
        let residual = residual.and_then(|residual| residual.place);
        let is_adapted = linear.is_adapted(batch);
        let place = match is_adapted || x.place.is_some() || residual.is_some() {
            false => None,
            true => self.push(|| Record::Projected {
                linear: linear.clone(),
                x: is_adapted.then(|| x.buffer.clone()),
                place: x.place,
                residual,
            }),
        };
        let sum = Recorded { buffer, place };
        match linear.activation {
            None => Ok(sum),
            Some(activation) => self.activate(activation, sum),
        }
    }

    fn norm(&self, parameters: NormParameters) -> Result<Arc<NormParameters>, ServeError> {
        Ok(Arc::new(parameters))
    }

    fn normalise(&self, norm: &Arc<NormParameters>, x: &Recorded) -> Result<Recorded, ServeError> {
        let buffer = self.host.normalise(norm, &x.buffer)?;
        let record = |place| Record::Normalised { norm: norm.clone(), x: x.buffer.clone(), place };
        Ok(Recorded { buffer, place: x.place.and_then(|place| self.push(|| record(place))) })
    }

    fn multiply(&self, one: Recorded, other: Recorded) -> Result<Recorded, ServeError> {
        let buffer = self.host.multiply(one.buffer.clone(), other.buffer.clone())?;
        let place = match one.place.is_some() || other.place.is_some() {
            false => None,
            true => self.push(|| Record::Multiplied([one, other])),
        };
        Ok(Recorded { buffer, place })
    }

    fn select(&self, x: &Recorded, of: usize, rows: &[usize]) -> Result<Recorded, ServeError> {
        let buffer = self.host.select(&x.buffer, of, rows)?;
        let width = x.buffer.len() / of.max(1);
        let record = |place| Record::Selected { of, width, rows: rows.to_vec(), place };
        Ok(Recorded { buffer, place: x.place.and_then(|place| self.push(|| record(place))) })
    }

    fn positions(&self, segments: &[SegmentRows]) -> Result<Arc<StepPositions>, ServeError> {
        let rotary = self.host.positions(segments)?;
        let segments = segments.iter().map(|segment| segment.rows.clone()).collect();
        Ok(Arc::new(StepPositions { segments, rotary }))
    }

    fn attend(
        &self,
        inputs: AttentionInputs<Recorded>,
        window: Option<usize>,
        _segments: &[SegmentRows],
        positions: &Arc<StepPositions>,
        _caches: &mut [&mut ()],
    ) -> Result<Recorded, ServeError> {
        let (buffers, places) = (inputs.map(|input| input.buffer.clone()), inputs.map(|input| input.place));
        let heads = self.host.heads;
        let attention = self.host.attention(&buffers, window, positions.rotary.as_ref())?;
        let rows = attention.queries.rows();
        let mut caches: Vec<_> = positions.segments.iter().map(|_| KeyValueCache::new(heads, Element::F32)).collect();
        let segments = positions.segments.iter().zip(&mut caches);
        let segments = segments.map(|(rows, cache)| AttentionSegment { rows: rows.clone(), cache });
        let mut segments: Vec<_> = segments.collect();
        let mut log_sums = vec![0.0; rows * heads.queries];
        let attended = self.host.filled(rows * heads.queries * heads.size, |out: ValuesMut<'_>| {
            self.host.engine.attend_with_log_sums(&attention, &mut segments, out, &mut log_sums)
        })?;
        let place = match places.any(Option::is_some) {
            false => None,
            true => self.push(|| Record::Attended {
                inputs: buffers,
                places,
                window,
                positions: positions.clone(),
                attended: attended.clone(),
                log_sums,
            }),
        };
        Ok(Recorded { buffer: attended, place })
    }
}
