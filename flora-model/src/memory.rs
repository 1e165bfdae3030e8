//! The memory of resident adapters: pools that grow by what adapters have, and sparse matrices beside them, up to a limit over all
//! projections. What one projection
//! has to spare goes to the others when the limit is reached.

use std::collections::BTreeMap;

use flora_ir::algebra::FoldedAdapter;
use flora_runtime::{PlannedProjection, ProjectionError};

/// Bytes that adapters take in `projections`: the pools, beyond the one vector that each has from the beginning, and sparse matrices.
fn taken(projections: &BTreeMap<String, PlannedProjection>, element_bytes: u64) -> u64 {
    let slots = |linear: &PlannedProjection| {
        let (in_slots, out_slots) = linear.change(|projection| projection.slots());
        let sparse = linear.change(|projection| projection.sparse_bytes());
        bytes(linear, (in_slots.saturating_sub(1), out_slots.saturating_sub(1)), element_bytes).saturating_add(sparse)
    };
    projections.values().map(slots).sum()
}

/// Bytes of so many in-vectors and out-vectors.
fn bytes(linear: &PlannedProjection, (in_slots, out_slots): (u32, u32), element_bytes: u64) -> u64 {
    let shape = linear.shape();
    let numbers = u64::from(in_slots) * u64::from(shape.d) + u64::from(out_slots) * u64::from(shape.k);
    numbers.saturating_mul(element_bytes)
}

/// A pool that has to grow.
struct Growth<'a> {
    linear: &'a PlannedProjection,
    now: (u32, u32),
    needed: (u32, u32),
}

impl Growth<'_> {
    fn bytes(&self, element_bytes: u64) -> u64 {
        bytes(self.linear, (self.needed.0 - self.now.0, self.needed.1 - self.now.1), element_bytes)
    }
}

fn growths<'a>(
    projections: &'a BTreeMap<String, PlannedProjection>,
    modules: &[(&String, &FoldedAdapter)],
) -> Vec<Growth<'a>> {
    let growth = |(path, folded): &(&String, &FoldedAdapter)| {
        let linear = projections.get(*path)?;
        let (now, needed) = linear.change(|projection| (projection.slots(), projection.slots_with(folded)));
        (needed != now).then_some(Growth { linear, now, needed })
    };
    modules.iter().filter_map(growth).collect()
}

/// Makes room in the pools for an adapter of these modules. Whether there is any within `limit` bytes.
///
/// # Errors
/// The device can't hold it.
pub(crate) fn make_room(
    projections: &BTreeMap<String, PlannedProjection>,
    modules: &[(&String, &FoldedAdapter)],
    limit: u64,
    element_bytes: u64,
) -> Result<bool, ProjectionError> {
    let sparse = modules.iter().map(|(_, folded)| folded.sparse.bytes() as u64).sum::<u64>();
    let total = |growths: &[Growth<'_>]| {
        let taken = taken(projections, element_bytes).saturating_add(sparse);
        growths.iter().map(|growth| growth.bytes(element_bytes)).fold(taken, u64::saturating_add)
    };
    let mut needed = growths(projections, modules);
    if needed.is_empty() && sparse == 0 {
        return Ok(true);
    }
    if total(&needed) > limit {
        projections.values().try_for_each(|linear| linear.change(|projection| projection.trim()))?;
        needed = growths(projections, modules);
    }
    let mut spare = match limit.checked_sub(total(&needed)) {
        Some(spare) => spare,
        None => return Ok(false),
    };
    for Growth { linear, now, needed } in needed {
        // As much again where there is room, so that a pool isn't copied for each adapter that comes.
        let doubled = (needed.0.max(now.0.saturating_mul(2)), needed.1.max(now.1.saturating_mul(2)));
        let more = bytes(linear, (doubled.0 - needed.0, doubled.1 - needed.1), element_bytes);
        let wanted = if more <= spare { doubled } else { needed };
        spare -= if more <= spare { more } else { 0 };
        linear.change(|projection| projection.reserve(wanted.0, wanted.1))?;
    }
    Ok(true)
}
