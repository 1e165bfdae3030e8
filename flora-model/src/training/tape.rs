//! What a forward pass read, in the order in which it was computed, and the backward pass over that.
//!
//! A record keeps what its gradients need and nothing else: a projection that nobody adapts keeps nothing. What depends on no
//! adapter is not on the tape.

use std::sync::Arc;

use flora_host::decoder::{AttentionAdjoint, Heads};
use flora_host::{OwnedValues, Values, ValuesMut};
use flora_ir::Activation;
use flora_ir::gradient::FoldedGradient;
use flora_runtime::{Buffer, Device, StepBatch, Wanted};
use rustc_hash::{FxHashMap, FxHashSet};

use crate::error::ServeError;
use crate::host::HostOperations;
use crate::operations::{AttentionInputs, NormParameters};
use crate::training::recorder::{Recorded, StepPositions, TrainedLinear};

/// The records of some operations.
#[derive(Default)]
pub(crate) struct Tape {
    records: Vec<Record>,
}

/// A record of a tape, and so the gradient of what it recorded.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) struct Place(usize);

impl Place {
    /// Of what a tape begins with, where its gradient is wanted.
    pub(crate) const GIVEN: Self = Self(0);
}

/// One operation: what its gradients need, and where they belong.
pub(crate) enum Record {
    /// What a tape begins with.
    Given,
    Projected {
        linear: TrainedLinear,
        /// Where rows of the batch have an adapter.
        x: Option<Buffer>,
        place: Option<Place>,
        residual: Option<Place>,
    },
    Activated {
        activation: Activation,
        x: Buffer,
        place: Place,
    },
    Normalised {
        norm: Arc<NormParameters>,
        x: Buffer,
        place: Place,
    },
    Multiplied([Recorded; 2]),
    Selected {
        /// Rows that there were.
        of: usize,
        width: usize,
        rows: Vec<usize>,
        place: Place,
    },
    Attended {
        inputs: AttentionInputs<Buffer>,
        places: AttentionInputs<Option<Place>>,
        window: Option<usize>,
        positions: Arc<StepPositions>,
        attended: Buffer,
        log_sums: Vec<f32>,
    },
}

/// The gradients of adapters' vectors, by the path of the module and the adapter's position in its table.
pub(crate) type AdapterGradients = FxHashMap<(Arc<str>, u32), FoldedGradient>;

/// The numbers of an activation.
pub(crate) fn floats(buffer: &Buffer) -> Result<&[f32], ServeError> {
    match flora_host::values(buffer)? {
        Values::F32(values) => Ok(values),
        values => Err(ServeError::NotFloats(values.element())),
    }
}

/// The same, moved out.
pub(crate) fn into_floats(buffer: Buffer) -> Result<Vec<f32>, ServeError> {
    match flora_host::into_values(buffer)? {
        OwnedValues::F32(values) => Ok(values),
        values => Err(ServeError::NotFloats(values.values().element())),
    }
}

/// A buffer of the host's.
pub(crate) fn buffer(device: &Device, values: Vec<f32>) -> Result<Buffer, ServeError> {
    Ok(flora_host::buffer(device, OwnedValues::F32(values))?)
}

impl Tape {
    pub(crate) fn push(&mut self, record: Record) -> Place {
        self.records.push(record);
        Place(self.records.len() - 1)
    }

    /// The projections that some row adapts, by their modules' paths, and what they read, `[rows, d]`.
    pub(crate) fn adapted(&self) -> impl Iterator<Item = (&str, &Buffer)> {
        self.records.iter().filter_map(|record| match record {
            Record::Projected { linear, x: Some(x), .. } => Some((&*linear.path, x)),
            _ => None,
        })
    }

    /// Bytes of the numbers that it keeps.
    pub(crate) fn bytes(&self) -> u64 {
        let mut seen = FxHashSet::default();
        let mut bytes = 0;
        let mut add = |buffer: &Buffer| {
            if let Ok(numbers) = floats(buffer)
                && seen.insert(numbers.as_ptr())
            {
                bytes += size_of_val(numbers) as u64;
            }
        };
        for record in &self.records {
            match record {
                Record::Given | Record::Selected { .. } => {}
                Record::Projected { x, .. } => x.iter().for_each(&mut add),
                Record::Activated { x, .. } | Record::Normalised { x, .. } => add(x),
                Record::Multiplied(factors) => factors.iter().for_each(|factor| add(&factor.buffer)),
                Record::Attended { inputs, attended, .. } => {
                    match inputs {
                        AttentionInputs::Separate { queries, keys, values } => {
                            [queries, keys, values].into_iter().for_each(&mut add);
                        }
                        AttentionInputs::Joined(joined) => add(joined),
                    }
                    add(attended);
                }
            }
        }
        bytes
    }

    /// The backward pass from the gradient `g` of what was recorded at `last`: adds to the adapters' gradients, and gives that of what
    /// the tape began with, where it is wanted.
    pub(crate) fn backward(
        self,
        host: &HostOperations,
        batch: &StepBatch,
        (last, g): (Place, Vec<f32>),
        adapters: &mut AdapterGradients,
    ) -> Result<Option<Vec<f32>>, ServeError> {
        let mut sums = Sums { host, of: vec![None; self.records.len()] };
        sums.add(Some(last), g)?;
        for (at, record) in self.records.into_iter().enumerate().rev() {
            let Some(g) = sums.of[at].take() else { continue };
            match record {
                Record::Given => return Ok(Some(g)),
                record => record.backward(&mut sums, batch, g, adapters)?,
            }
        }
        Ok(None)
    }
}

/// The gradients so far, by place.
struct Sums<'a> {
    host: &'a HostOperations,
    of: Vec<Option<Vec<f32>>>,
}

impl Sums<'_> {
    /// Adds a gradient where it is wanted.
    fn add(&mut self, place: Option<Place>, g: Vec<f32>) -> Result<(), ServeError> {
        let Some(of) = place.and_then(|place| self.of.get_mut(place.0)) else { return Ok(()) };
        match of {
            Some(sum) => self.host.engine.add(sum, &g)?,
            None => *of = Some(g),
        }
        Ok(())
    }

    fn product(&self, one: &[f32], other: &Buffer) -> Result<Vec<f32>, ServeError> {
        let mut product = vec![0.0; one.len()];
        let out = ValuesMut::F32(&mut product);
        self.host.engine.multiply(Values::F32(one), flora_host::values(other)?, out)?;
        Ok(product)
    }
}

impl Record {
    /// Adds to the gradients of what was read; `g` is that of the result.
    fn backward(
        self,
        sums: &mut Sums<'_>,
        batch: &StepBatch,
        mut g: Vec<f32>,
        adapters: &mut AdapterGradients,
    ) -> Result<(), ServeError> {
        let engine = &sums.host.engine;
        match self {
            Self::Given => Ok(()),
            Self::Projected { linear, x, place, residual } => {
                let wanted = match (&x, place) {
                    (None, None) => return sums.add(residual, g),
                    (None, Some(_)) => Wanted::Input,
                    (Some(_), None) => Wanted::Adapters,
                    (Some(_), Some(_)) => Wanted::All,
                };
                if residual.is_some() {
                    sums.add(residual, g.clone())?;
                }
                let device = &sums.host.device;
                let x = match x {
                    Some(x) => x,
                    // Not read: nobody wants what it is for.
                    None => buffer(device, vec![0.0; batch.rows() * linear.projection.shape().d as usize])?,
                };
                let gradient = linear.projection.backward(batch, &x, &buffer(device, g)?, wanted)?;
                for (position, folded) in gradient.adapters {
                    adapters.insert((linear.path.clone(), position), folded);
                }
                match gradient.dx {
                    Some(dx) => sums.add(place, into_floats(dx)?),
                    None => Ok(()),
                }
            }
            Self::Activated { activation, x, place } => {
                engine.activate_adjoint(activation, floats(&x)?, &mut g)?;
                sums.add(Some(place), g)
            }
            Self::Normalised { norm, x, place } => {
                let NormParameters { gamma, beta, epsilon } = &*norm;
                match beta {
                    None => engine.rms_norm_adjoint(floats(&x)?, gamma, *epsilon, &mut g)?,
                    Some(_) => engine.layer_norm_adjoint(floats(&x)?, gamma, *epsilon, &mut g)?,
                }
                sums.add(Some(place), g)
            }
            Self::Multiplied([one, other]) => {
                if one.place.is_some() {
                    let product = sums.product(&g, &other.buffer)?;
                    sums.add(one.place, product)?;
                }
                if other.place.is_some() {
                    let product = sums.product(&g, &one.buffer)?;
                    sums.add(other.place, product)?;
                }
                Ok(())
            }
            Self::Selected { of, width, rows, place } => {
                let mut all = vec![0.0; of * width];
                for (row, g) in rows.iter().zip(g.chunks_exact(width.max(1))) {
                    all[row * width..(row + 1) * width].iter_mut().zip(g).for_each(|(sum, g)| *sum += g);
                }
                sums.add(Some(place), all)
            }
            Self::Attended { inputs, places, window, positions, attended, log_sums } => {
                let Heads { queries, keys, size } = sums.host.heads;
                let attention = sums.host.attention(&inputs, window, positions.rotary.as_ref())?;
                let adjoint = AttentionAdjoint {
                    attention,
                    segments: &positions.segments,
                    attended: floats(&attended)?,
                    log_sums: &log_sums,
                    g: &g,
                };
                let width = (queries + 2 * keys) * size;
                let mut joined = vec![0.0; attention.queries.rows() * width];
                engine.attend_adjoint(&adjoint, &mut joined)?;
                match places {
                    AttentionInputs::Joined(place) => sums.add(place, joined),
                    AttentionInputs::Separate { queries: of_queries, keys: of_keys, values: of_values } => {
                        let parts =
                            [(of_queries, 0, queries), (of_keys, queries, keys), (of_values, queries + keys, keys)];
                        for (place, first, heads) in parts.into_iter().filter(|(place, ..)| place.is_some()) {
                            let own = first * size..(first + heads) * size;
                            let mut part = Vec::with_capacity(joined.len() / width * own.len());
                            joined.chunks_exact(width).for_each(|row| part.extend_from_slice(&row[own.clone()]));
                            sums.add(place, part)?;
                        }
                        Ok(())
                    }
                }
            }
        }
    }
}
