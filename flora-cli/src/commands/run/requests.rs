//! The requests of a run: those whose adapter can't be used fail, and the others are run without them.

use std::ops::Range;

use flora::prelude::*;
use flora_adapters::AdapterStore;

use crate::commands::error::CommandError;

/// A batch, parted.
pub(super) struct Requests {
    /// Those that are run.
    pub(super) served: Batch,
    /// The rows of all that those have, in order.
    rows: Vec<Range<usize>>,
    /// Rows of all.
    total: usize,
    /// The adapters of the others.
    failed: Vec<String>,
}

impl Requests {
    pub(super) fn new(batch: Batch, store: &AdapterStore) -> Self {
        let (mut first, mut rows, mut served, mut failed) = (0, Vec::new(), Vec::new(), Vec::new());
        for segment in batch.segments() {
            let own = first..first + segment.rows as usize;
            first = own.end;
            match &segment.adapter {
                Some(name) if store.failed().contains_key(name) => failed.push(name.clone()),
                adapter => {
                    served.push((adapter.clone(), segment.rows));
                    rows.push(own);
                }
            }
        }
        failed.sort_unstable();
        failed.dedup();
        let served = Batch::new(served.iter().map(|(adapter, rows)| (adapter.as_deref(), *rows)));
        Self { served, rows, total: first, failed }
    }

    /// Of all rows `[rows, width]`, those that are run.
    pub(super) fn served_rows(&self, all: Vec<f32>, width: usize) -> Vec<f32> {
        if self.failed.is_empty() {
            return all;
        }
        self.rows.iter().flat_map(|rows| &all[rows.start * width..rows.end * width]).copied().collect()
    }

    /// Of the rows that were run, all `[rows, width]`: those that weren't hold no numbers.
    pub(super) fn all_rows(&self, served: Vec<f32>, width: usize) -> Vec<f32> {
        if self.failed.is_empty() {
            return served;
        }
        let mut all = vec![f32::NAN; self.total * width];
        let mut left = &served[..];
        for rows in &self.rows {
            let (own, rest) = left.split_at(rows.len() * width);
            all[rows.start * width..rows.end * width].copy_from_slice(own);
            left = rest;
        }
        all
    }

    /// # Errors
    /// A request failed.
    pub(super) fn verdict(&self, store: &AdapterStore) -> Result<(), CommandError> {
        let error = self.failed.first().and_then(|name| store.failed().get(name));
        error.map_or(Ok(()), |error| {
            Err(CommandError::FailedRequests { adapters: self.failed.join(", "), error: error.clone() })
        })
    }
}
