//! A batch and its inputs from files, checked before anything runs.

use std::collections::BTreeMap;
use std::path::Path;

use flora::prelude::*;
use flora_checkpoint::{Matrix, read_matrices};

use super::samples;
use super::weights::{Module, Weights};
use crate::commands::error::CommandError;
use crate::commands::output;

/// The longest batch file: a million segments.
const BATCH_LIMIT: u64 = 64 << 20;

/// Reads a batch.
pub(super) fn read_batch(path: &Path) -> Result<Batch, CommandError> {
    let failed = |source| CommandError::Io { action: "read", path: path.to_owned(), source };
    let length = std::fs::metadata(path).map_err(failed)?.len();
    if length > BATCH_LIMIT {
        return Err(CommandError::TooMany { what: "the bytes of the batch's file", found: length, limit: BATCH_LIMIT });
    }
    let bytes = std::fs::read(path).map_err(failed)?;
    let not_a_batch =
        |error: serde_json::Error| CommandError::NotABatch { path: path.to_owned(), reason: error.to_string() };
    serde_json::from_slice(&bytes).map_err(not_a_batch)
}

/// The inputs of every module that runs.
pub(super) enum Inputs {
    /// Of a file, `[rows, d]` each.
    Given(BTreeMap<String, Matrix>),
    /// Random.
    Seeded {
        /// The seed.
        seed: u64,
        /// Rows of the batch.
        rows: usize,
    },
}

impl Inputs {
    /// Reads the file at `path`: every module in `modules` has an input of the batch's rows, and nothing else is in it that
    /// the model doesn't know.
    pub(super) fn read(path: &Path, rows: usize, modules: &[Module], weights: &Weights) -> Result<Self, CommandError> {
        let mut given = read_matrices(path)?;
        let known = weights.modules();
        for name in given.keys() {
            if !known.iter().any(|module| module.path == *name) {
                let (module, model) = (name.clone(), weights.name().to_owned());
                return Err(CommandError::UnknownInput { path: path.to_owned(), module, model });
            }
        }
        for module in modules {
            let (path, d) = (path.to_owned(), module.d);
            match given.get(&module.path) {
                None => return Err(CommandError::MissingInput { path, module: module.path.clone(), d }),
                Some(x) if (x.rows, x.columns) != (rows, d) => {
                    let (module, expected_rows) = (module.path.clone(), rows);
                    let (rows, columns) = (x.rows, x.columns);
                    return Err(CommandError::WrongInput { path, module, rows, columns, expected_rows, d });
                }
                Some(_) => {}
            }
        }
        let before = given.len();
        given.retain(|name, _| modules.iter().any(|module| module.path == *name));
        if given.len() < before {
            output::note(&format!("note: {} inputs are of modules that don't run", before - given.len()));
        }
        Ok(Self::Given(given))
    }

    /// The input of a module, `[rows, d]`; each is asked for once.
    pub(super) fn take(&mut self, module: &Module) -> Vec<f32> {
        match self {
            Self::Given(given) => given.remove(&module.path).map(|matrix| matrix.values).unwrap_or_default(),
            Self::Seeded { seed, rows } => samples::input(*seed, &module.path, *rows, module.d),
        }
    }
}
