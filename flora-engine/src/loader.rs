//! Threads that read adapters, so that a large one stalls no step, nor the comparison of others with the disk.

use std::panic::{AssertUnwindSafe, catch_unwind};
use std::sync::mpsc::{Receiver, Sender, channel};
use std::sync::{Arc, Mutex, PoisonError};
use std::thread;

use crate::composition::AdapterChoice;
use crate::decoder::{AdapterFailure, AdapterSource, Read, Unread};
use crate::engine::panic_text;
use crate::residency::{LoadOrder, LoadOutcome, Loaded};

/// Takes orders; dropping it ends its threads once they are done with what they are at.
#[derive(Debug)]
pub(crate) struct Loader {
    orders: Sender<LoadOrder>,
}

impl Loader {
    /// `done` is called with what came of each order, on threads of the loader.
    pub(crate) fn start<S: AdapterSource>(
        source: Arc<S>,
        threads: usize,
        done: impl Fn(Loaded<S::Prepared>) + Clone + Send + 'static,
    ) -> Result<Self, std::io::Error> {
        let (orders, ordered) = channel();
        let (readings, to_read) = channel();
        let to_read = Arc::new(Mutex::new(to_read));
        for index in 0..threads {
            let (source, to_read, done) = (source.clone(), to_read.clone(), done.clone());
            thread::Builder::new().name(format!("flora-load-{index}")).spawn(move || read(&*source, &to_read, done))?;
        }
        thread::Builder::new()
            .name("flora-versions".into())
            .spawn(move || compare(&*source, &ordered, &readings, done))?;
        Ok(Self { orders })
    }

    pub(crate) fn order(&self, order: LoadOrder) {
        // Its threads outlive it, and end only when it is dropped.
        let _ = self.orders.send(order);
    }
}

/// Compares versions; what has to be read is passed on.
fn compare<S: AdapterSource>(
    source: &S,
    ordered: &Receiver<LoadOrder>,
    readings: &Sender<AdapterChoice>,
    done: impl Fn(Loaded<S::Prepared>),
) {
    for LoadOrder { adapter, known } in ordered {
        let outcome = match guarded(&adapter, || Ok(source.version_of(&adapter)?)) {
            Ok(version) if known == Some(version) => LoadOutcome::Unchanged,
            Ok(_) => {
                let _ = readings.send(adapter);
                continue;
            }
            Err(Unread { version, failure }) => LoadOutcome::Failed { version, failure },
        };
        done(Loaded { adapter, outcome });
    }
}

/// Reads one adapter after the other, beside other threads that do.
fn read<S: AdapterSource>(source: &S, to_read: &Mutex<Receiver<AdapterChoice>>, done: impl Fn(Loaded<S::Prepared>)) {
    loop {
        let next = to_read.lock().unwrap_or_else(PoisonError::into_inner).recv();
        let Ok(adapter) = next else { return };
        let outcome = match guarded(&adapter, || source.read(&adapter)) {
            Ok(Read { version, prepared }) => LoadOutcome::Prepared { version, facts: S::facts(&prepared), prepared },
            Err(Unread { version, failure }) => LoadOutcome::Failed { version, failure },
        };
        done(Loaded { adapter, outcome });
    }
}

/// A panic is a failure like any other: files come from anywhere.
fn guarded<T>(adapter: &AdapterChoice, call: impl FnOnce() -> Result<T, Unread>) -> Result<T, Unread> {
    catch_unwind(AssertUnwindSafe(call)).unwrap_or_else(|panic| {
        let reason = format!("reading it panicked: {}", panic_text(&*panic));
        Err(AdapterFailure::Unusable { name: adapter.to_string(), reason }.into())
    })
}
