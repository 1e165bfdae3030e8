//! An output matrix that an adapter brings along: a whole one, of a vocabulary of its own perhaps, or single rows of one.

use flora_adapters::{AdaptedHead, BaseError};
use flora_ir::algebra::FoldedAdapter;
use flora_plan::layer::LayerShape;
use flora_plan::weight::PackedWeight;
use flora_runtime::{Buffer, Device, PlannedProjection, ProjectionError, StepBatch};

use crate::error::ServeError;
use crate::form::{Finish, ProjectionForm};

/// The position of the adapter in the table of its own output matrix.
const OWN: u32 = 1;

/// What an adapter has in place of the model's output matrix, on the device.
pub(crate) struct OwnHead {
    /// `[d, vocabulary]`, and the position of the adapter in its table.
    whole: Option<(PlannedProjection, u32)>,
    /// `[d, rows]`, and which tokens they are.
    rows: Option<(PlannedProjection, Vec<u32>)>,
}

/// Why it can't be put on the device.
#[derive(Debug, thiserror::Error)]
pub(crate) enum HeadError {
    #[error(transparent)]
    Base(#[from] BaseError),
    #[error(transparent)]
    Projection(#[from] ProjectionError),
    #[error("rows of the output matrix that are no matrix")]
    Rows,
}

impl OwnHead {
    /// `folded` is what adapts it, and `offset` what is added to its logits, where it is a whole one.
    pub(crate) fn new(
        form: &ProjectionForm,
        head: &AdaptedHead,
        folded: Option<&FoldedAdapter>,
        offset: Option<&[f32]>,
    ) -> Result<Self, HeadError> {
        let whole = head.weight.as_ref().map(|tensor| {
            let weight = form.base.pack_rows(&head.path, tensor, &form.device)?;
            let linear = form.projection(&weight, None, Finish::Nothing)?;
            let position = if folded.is_some() { OWN } else { 0 };
            linear.change(|projection| {
                if let Some(folded) = folded {
                    let (in_slots, out_slots) = projection.slots_with(folded);
                    projection.reserve(in_slots, out_slots)?;
                    projection.place(position, folded)?;
                }
                offset.map_or(Ok(()), |offset| projection.set_offset(position, offset))
            })?;
            Ok::<_, HeadError>((linear, position))
        });
        let rows = head.rows.as_ref().map(|rows| {
            let extent = |extent: usize| u32::try_from(extent).map_err(|_| HeadError::Rows);
            let shape = LayerShape { d: extent(rows.width())?, k: extent(rows.rows.len())? };
            let values = flora_checkpoint::tensor::transpose(&rows.values, rows.rows.len(), rows.width());
            let weight = PackedWeight::from_f32(Default::default(), shape, &values)
                .map_err(|source| BaseError::Pack { name: head.path.clone(), source })?;
            Ok::<_, HeadError>((form.projection(&weight, None, Finish::Nothing)?, rows.rows.clone()))
        });
        Ok(Self { whole: whole.transpose()?, rows: rows.transpose()? })
    }

    /// Tokens of a vocabulary of its own.
    pub(crate) fn vocabulary(&self) -> Option<u32> {
        self.whole.as_ref().map(|(linear, _)| linear.shape().k)
    }

    /// Bytes that the weights take on the device.
    pub(crate) fn bytes(&self) -> u64 {
        let linears = self.whole.iter().map(|(linear, _)| linear).chain(self.rows.iter().map(|(linear, _)| linear));
        let bytes = |linear: &PlannedProjection| {
            linear.change(|projection| projection.operands().format().weight.bytes(projection.shape()))
        };
        linears.map(bytes).sum()
    }

    /// Makes this adapter's logits of one row x `[1, d]` of those that the model's own output matrix gave, if it was asked.
    pub(crate) fn apply(&self, device: &Device, x: &Buffer, logits: &mut Vec<f32>) -> Result<(), ServeError> {
        if let Some((linear, position)) = &self.whole {
            *logits = device.read(&linear.forward(x, &StepBatch::new([(*position, 1)]), None)?)?;
        }
        if let Some((linear, tokens)) = &self.rows {
            let own = device.read(&linear.forward(x, &StepBatch::new([(0, 1)]), None)?)?;
            for (token, logit) in tokens.iter().zip(own) {
                if let Some(place) = logits.get_mut(*token as usize) {
                    *place = logit;
                }
            }
        }
        Ok(())
    }
}
