//! Which sequences make each batch of a job. It follows from the job's seed, epoch and place alone, so that a resumed job goes on where
//! it was, and company changes nothing.

use serde::{Deserialize, Serialize};

use super::sequences::Dataset;
use crate::random::generator;

/// How far a job is in its data.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
pub struct Position {
    /// How often all of it was learnt.
    pub epoch: u64,
    /// How many sequences of this epoch's order were taken.
    pub taken: usize,
}

/// The order of a dataset in every epoch, and how it is cut into batches: sequences one after the other, as many as fit.
#[derive(Clone, Debug)]
pub struct Order {
    lengths: Vec<usize>,
    seed: u64,
    /// The most tokens of a batch; a sequence that has more is a batch by itself.
    limit: usize,
    /// The order of one epoch, which is kept while it lasts.
    epoch: Option<(u64, Vec<usize>)>,
}

impl Order {
    /// Of `data`, in batches of at most `limit` tokens.
    pub fn new(data: &Dataset, seed: u64, limit: usize) -> Self {
        let lengths = data.sequences().iter().map(|sequence| sequence.tokens.len()).collect();
        Self { lengths, seed, limit, epoch: None }
    }

    /// The sequences of the batch at `position`, by index, and the position after it. Never empty; no batch holds sequences of two
    /// epochs.
    pub fn batch(&mut self, position: Position) -> (Vec<usize>, Position) {
        let Position { epoch, taken } = position;
        let order = self.order(epoch);
        let mut batch: Vec<usize> = Vec::new();
        let (mut tokens, limit) = (0, self.limit);
        for index in order.iter().skip(taken) {
            let length = self.lengths.get(*index).copied().unwrap_or(0);
            if !batch.is_empty() && tokens + length > limit {
                break;
            }
            tokens += length;
            batch.push(*index);
        }
        let taken = taken + batch.len();
        let is_over = taken >= order.len();
        let next = if is_over { Position { epoch: epoch + 1, taken: 0 } } else { Position { epoch, taken } };
        self.epoch = Some((epoch, order));
        (batch, next)
    }

    /// How many batches an epoch has.
    pub fn batches(&mut self, epoch: u64) -> u64 {
        let mut position = Position { epoch, taken: 0 };
        let mut count = 0;
        while position.epoch == epoch {
            position = self.batch(position).1;
            count += 1;
        }
        count
    }

    fn order(&mut self, epoch: u64) -> Vec<usize> {
        match self.epoch.take() {
            Some((known, order)) if known == epoch => order,
            _ => {
                let mut order: Vec<usize> = (0..self.lengths.len()).collect();
                generator(self.seed, "order", epoch).shuffle(&mut order);
                order
            }
        }
    }
}
