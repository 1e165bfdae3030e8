//! What can be wrong with a call from outside. Each says what was passed, what the layer takes, and what to do.

use flora_adapters::StoreError;
use flora_checkpoint::AdapterError;
use flora_host::HostError;
use flora_host::attached::AttachedError;
use flora_ir::EvaluateError;
use flora_ir::algebra::FoldError;
use flora_plan::weight::WeightError;
use flora_runtime::{DeviceError, ProjectionError};

/// A call that can't be answered. Nothing has changed then, and nothing was written.
#[derive(Debug, thiserror::Error)]
pub(crate) enum Error {
    /// A tensor of other extents than the layer's, or memory that can't be read where it is said to be.
    #[error("{what} {problem}")]
    Shape {
        /// Which tensor.
        what: String,
        /// What is wrong with it.
        problem: String,
    },
    /// Numbers of another type.
    #[error("{what} is {found}, and this takes {expected}")]
    Type {
        /// Which tensor.
        what: String,
        /// Its type.
        found: String,
        /// What it should be.
        expected: String,
    },
    /// A slot beyond the layer's.
    #[error("row {row} asks for slot {slot}, and the layer has {slots}, counted from 0; -1 is the base")]
    RowSlot {
        /// The row.
        row: usize,
        /// What it asks for.
        slot: i64,
        /// How many there are.
        slots: u32,
    },
    /// A slot or a part that the layer doesn't have.
    #[error("there is no {what} {number}; the layer has {count}, counted from 0")]
    NoSuch {
        /// "slot" or "part".
        what: &'static str,
        /// What was asked for.
        number: u64,
        /// How many there are.
        count: u64,
    },
    /// A layer that is gone, or was never there.
    #[error("no layer has the handle {0}; it was closed, or made in another process")]
    Closed(i64),
    /// A kind or layer of adapter that there isn't.
    #[error("no kind of adapter is called `{name}`; there are: {known}")]
    UnknownKind {
        /// What was asked for.
        name: String,
        /// What there is.
        known: String,
    },
    /// A module that the adapter doesn't adapt.
    #[error("the adapter `{adapter}` doesn't adapt `{module}`; it has {known}")]
    UnknownModule {
        /// The adapter.
        adapter: String,
        /// What was asked for.
        module: String,
        /// What it has, shortened.
        known: String,
    },
    /// A shard of a layer that can't be adapted by itself.
    #[error("{0}")]
    Shard(String),
    /// What training doesn't have.
    #[error("{0}")]
    Training(String),
    /// The pool of threads.
    #[error("{threads} threads can't be started: {reason}")]
    Threads {
        /// How many were asked for.
        threads: usize,
        /// Why not.
        reason: String,
    },
    /// An adapter that can't be read.
    #[error(transparent)]
    Adapter(#[from] AdapterError),
    /// An adapter that can't be folded.
    #[error(transparent)]
    Store(#[from] StoreError),
    /// Operands that don't fold.
    #[error(transparent)]
    Fold(#[from] FoldError),
    /// Operands of wrong extents.
    #[error(transparent)]
    Operands(#[from] EvaluateError),
    /// A weight that can't be packed.
    #[error(transparent)]
    Weight(#[from] WeightError),
    /// A layer that can't be made or run.
    #[error(transparent)]
    Projection(#[from] ProjectionError),
    /// The device refuses.
    #[error(transparent)]
    Device(#[from] DeviceError),
    /// The kernels refuse.
    #[error(transparent)]
    Host(#[from] HostError),
    /// What a card doesn't compute.
    #[cfg(feature = "cuda")]
    #[error("{0}")]
    Cuda(String),
    /// A card, or its driver, refuses.
    #[cfg(feature = "cuda")]
    #[error(transparent)]
    Driver(#[from] flora_driver::DriverError),
    /// No kernels come of a batch.
    #[cfg(feature = "cuda")]
    #[error(transparent)]
    Emit(#[from] flora_codegen::target::EmitError),
    /// The kernels around another's product refuse.
    #[error(transparent)]
    Attached(#[from] AttachedError),
}

impl Error {
    /// A tensor that doesn't fit.
    pub(crate) fn shape(what: impl Into<String>, problem: impl Into<String>) -> Self {
        Self::Shape { what: what.into(), problem: problem.into() }
    }
}

/// The first few of `names`.
pub(crate) fn shortened<'a>(names: impl Iterator<Item = &'a str>) -> String {
    const SHOWN: usize = 8;
    let names: Vec<_> = names.collect();
    let shown = names.get(..SHOWN).unwrap_or(&names).join(", ");
    match names.len().saturating_sub(SHOWN) {
        _ if names.is_empty() => "none".to_owned(),
        0 => shown,
        more => format!("{shown}, and {more} more"),
    }
}
