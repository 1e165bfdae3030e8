//! `--kind`: kinds of adapters that flora doesn't have, from files that describe them.

use std::path::PathBuf;

use clap::Args;
use flora_adapters::Layers;

use super::error::CommandError;

/// The kinds of adapters that folders may be of.
#[derive(Args, Clone)]
pub(crate) struct KindArguments {
    /// A file that describes a kind of adapter which flora doesn't have: its equation, and which tensors are its operands (see
    /// docs/extending.md); give it again for another kind
    #[arg(long = "kind", value_name = "FILE", requires = "sources")]
    files: Vec<PathBuf>,
}

impl KindArguments {
    /// The built-in kinds and those of the files.
    pub(crate) fn layers(&self) -> Result<Layers, CommandError> {
        let mut layers = Layers::builtin()?;
        for file in &self.files {
            layers.register_file(file)?;
        }
        Ok(layers)
    }
}
