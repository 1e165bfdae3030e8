//! The threads that layers compute with: a pool of their own, so that its size can be changed while other users of this process have
//! theirs, and so that a forked child, which has none of its parent's threads, gets new ones.

use std::sync::{Arc, OnceLock, PoisonError, RwLock};

use rayon::{ThreadPool, ThreadPoolBuilder};

use crate::error::Error;

/// The variable that says how many threads there are where nobody else does.
const VARIABLE: &str = "FLORA_NUM_THREADS";

/// More are a mistake.
const MOST: usize = 4096;

/// A pool and the process that it is of.
struct Threads {
    pool: Arc<ThreadPool>,
    process: u32,
}

static THREADS: RwLock<Option<Threads>> = RwLock::new(None);

/// Runs `work` on the pool and waits for it.
pub(crate) fn run<T: Send>(work: impl FnOnce() -> T + Send) -> Result<T, Error> {
    Ok(pool()?.install(work))
}

/// How many threads there are.
pub(crate) fn count() -> Result<usize, Error> {
    Ok(pool()?.current_num_threads())
}

/// Computes with so many threads from now on; calls that are running end with those that they have.
pub(crate) fn set(threads: usize) -> Result<(), Error> {
    let made = Threads::start(threads)?;
    let before = THREADS.write().unwrap_or_else(PoisonError::into_inner).replace(made);
    before.into_iter().for_each(Threads::drop);
    Ok(())
}

fn pool() -> Result<Arc<ThreadPool>, Error> {
    let own = |threads: &Option<Threads>| {
        threads.as_ref().filter(|threads| threads.process == std::process::id()).map(|threads| threads.pool.clone())
    };
    if let Some(pool) = own(&THREADS.read().unwrap_or_else(PoisonError::into_inner)) {
        return Ok(pool);
    }
    let mut threads = THREADS.write().unwrap_or_else(PoisonError::into_inner);
    if let Some(pool) = own(&threads) {
        return Ok(pool);
    }
    let size = threads.as_ref().map_or_else(by_default, |parent| parent.pool.current_num_threads());
    let made = Threads::start(size)?;
    let pool = made.pool.clone();
    threads.replace(made).into_iter().for_each(Threads::drop);
    Ok(pool)
}

/// What the environment says, else the processors that this process may use.
fn by_default() -> usize {
    static SIZE: OnceLock<usize> = OnceLock::new();
    *SIZE.get_or_init(|| {
        let said = std::env::var(VARIABLE).ok().and_then(|said| said.trim().parse().ok());
        let processors = || std::thread::available_parallelism().map_or(1, usize::from);
        said.filter(|size| (1..=MOST).contains(size)).unwrap_or_else(processors)
    })
}

impl Threads {
    fn start(threads: usize) -> Result<Self, Error> {
        let failed = |reason: String| Error::Threads { threads, reason };
        if !(1..=MOST).contains(&threads) {
            return Err(failed(format!("a pool has from 1 to {MOST}")));
        }
        let named = |at| format!("flora-{at}");
        let pool = ThreadPoolBuilder::new().num_threads(threads).thread_name(named).build();
        Ok(Self { pool: Arc::new(pool.map_err(|error| failed(error.to_string()))?), process: std::process::id() })
    }

    /// Lets the pool go. That of a parent process has no threads here that could be told to end.
    fn drop(self) {
        if self.process != std::process::id() {
            std::mem::forget(self.pool);
        }
    }
}
