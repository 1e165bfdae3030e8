//! Who computes a call's tasks: rayon's threads, or those of a program that has threads of its own, which would otherwise wait beside
//! ours, and spin while they wait.

use std::sync::atomic::{AtomicUsize, Ordering};

use rayon::prelude::*;

use crate::partition::PARALLEL_MACS;

/// Threads for the tasks of a call.
#[derive(Clone, Copy, Debug)]
pub enum Team {
    /// Those of the pool that the caller is in.
    Rayon,
    /// Another program's: calls what it is given once on each of them, the caller's among them, and returns when all calls have.
    Foreign(fn(&(dyn Fn() + Sync))),
}

impl Team {
    /// Does `work` for every task. `macs` are the multiply-adds of all of them: a call with few is the caller's alone.
    pub(crate) fn run(self, tasks: usize, macs: u64, work: &(dyn Fn(usize) + Sync)) {
        if tasks <= 1 || macs < PARALLEL_MACS {
            return (0..tasks).for_each(work);
        }
        match self {
            Team::Rayon => (0..tasks).into_par_iter().for_each(work),
            Team::Foreign(team) => {
                let next = AtomicUsize::new(0);
                team(&|| {
                    while let Some(task) = Some(next.fetch_add(1, Ordering::Relaxed)).filter(|task| *task < tasks) {
                        work(task);
                    }
                });
            }
        }
    }
}
