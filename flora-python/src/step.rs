//! From the slot of every row to a batch. The layers of one step get the same slots, so the last few batches are kept, with the
//! schedules that were laid out for them.

use std::sync::{Arc, Mutex, PoisonError};

use flora_plan::batch::Segment;
use flora_runtime::StepBatch;

use crate::error::Error;

/// Batches that are kept, the latest last: a step's own, those of parts that run beside it, and those of a few steps before.
const KEPT: usize = 16;

static RECENT: Mutex<Vec<Arc<StepBatch>>> = Mutex::new(Vec::new());

/// The slots of a batch's rows.
#[derive(Clone, Copy, Debug)]
pub(crate) enum RowSlots<'a> {
    /// One for each row; -1 is the base.
    Each(&'a [i64]),
    /// All rows alike.
    All {
        /// Of every row.
        slot: i64,
        /// How many.
        rows: usize,
    },
}

impl RowSlots<'_> {
    /// Runs of equal slots: slot and rows.
    fn runs(&self) -> impl Iterator<Item = (i64, usize)> {
        let (slots, all) = match *self {
            Self::Each(slots) => (slots, None),
            Self::All { slot, rows } => (&[][..], (rows > 0).then_some((slot, rows))),
        };
        slots.chunk_by(|one, other| one == other).map(|run| (run[0], run.len())).chain(all)
    }

    /// Nothing, or the first row whose slot isn't among `slots`.
    fn check(&self, slots: u32) -> Result<(), Error> {
        let wrong = |slot: i64| !(-1..i64::from(slots)).contains(&slot);
        let mut row = 0;
        for (slot, rows) in self.runs() {
            if wrong(slot) {
                return Err(Error::RowSlot { row, slot, slots });
            }
            row += rows;
        }
        match u32::try_from(row) {
            Ok(_) => Ok(()),
            Err(_) => Err(Error::shape("the batch", format!("has {row} rows, and kernels index 2^32; split it"))),
        }
    }

    /// The batch of these rows: slot s is position s + `first` of a layer's table, -1 the base.
    ///
    /// # Errors
    /// A slot that the layer doesn't have.
    pub(crate) fn batch(&self, slots: u32, first: u32) -> Result<Arc<StepBatch>, Error> {
        self.check(slots)?;
        let position = |slot: i64| u32::try_from(slot).map_or(0, |slot| slot + first);
        let segments = || self.runs().map(|(slot, rows)| Segment { rows: rows as u32, adapter: position(slot) });
        let mut recent = RECENT.lock().unwrap_or_else(PoisonError::into_inner);
        let is_this = |batch: &Arc<StepBatch>| batch.segments().iter().copied().eq(segments());
        let batch = match recent.iter().rposition(is_this) {
            Some(at) if at + 1 == recent.len() => return Ok(recent[at].clone()),
            Some(at) => recent.remove(at),
            None => Arc::new(StepBatch::new(segments().map(|segment| (segment.adapter, segment.rows)))),
        };
        if recent.len() == KEPT {
            recent.remove(0);
        }
        recent.push(batch.clone());
        Ok(batch)
    }
}
