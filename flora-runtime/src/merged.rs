//! The weight of one adapter, kept whole beside the base weight: its rows meet it in place of the adapter's two parts, in any batch.
//! Who keeps one says so; nothing is merged because of what was asked for.

use flora_plan::schedule::Materialised;

use crate::projection::{Projection, ProjectionError};

impl Projection {
    /// [Makes the W_i](Self::merge_at) of the adapter of this name resident.
    ///
    /// # Errors
    /// A name that isn't loaded, and as [`Self::merge_at`].
    pub fn merge(&mut self, name: &str) -> Result<(), ProjectionError> {
        let position = *self.names.get(name).ok_or_else(|| self.unknown(0, name))?;
        self.merge_at(position)
    }

    /// Makes W_i `[d, k]` of the adapter at a position and keeps it on the device in place of the one before, until the position is
    /// removed: plans that [merge](flora_plan::plan::Plan::merges) multiply the adapter's rows by it, whatever else is in their batch. What the adapter
    /// does to its rows beside its two parts (sparse matrices, an offset) is done as without.
    ///
    /// # Errors
    /// A position without vectors, whose rows are base rows; an adapter with gates, between whose factors there is nothing to multiply
    /// in a whole weight; a weight that the device can't hold. The one before is resident then as it was.
    pub fn merge_at(&mut self, position: u32) -> Result<(), ProjectionError> {
        let slots = self.slots_at(position).ok_or(ProjectionError::NothingToMerge(position))?;
        if self.gated.contains_key(&position) {
            return Err(ProjectionError::GatedMerge(position));
        }
        let weight = self.device.merge(&self.operands, &Materialised::weight_of(slots))?;
        self.unmerge();
        self.operands.set_merged(position, weight);
        self.adapters[position as usize].is_merged = true;
        Ok(())
    }

    /// Gives up the resident W_i, if there is one: its adapter's rows are computed as all others.
    pub fn unmerge(&mut self) {
        if let Some(position) = self.operands.forget_merged() {
            self.adapters[position as usize].is_merged = false;
        }
    }

    /// The same where it is the W_i of the adapter at a position: it is nobody's, whatever is placed there next.
    pub(crate) fn unmerge_at(&mut self, position: u32) {
        if self.operands.merged_adapter() == Some(position) {
            self.unmerge();
        }
    }
}
