//! Subcommands that this build was made without: each takes whatever it is given and says how to have it.

use std::ffi::OsString;

use clap::Args;

use super::error::CommandError;

/// (this build is without it)
#[derive(Args)]
pub(crate) struct Arguments {
    #[arg(trailing_var_arg = true, allow_hyphen_values = true, hide = true)]
    _given: Vec<OsString>,
}

pub(crate) fn missing(command: &'static str, feature: &'static str) -> Result<(), CommandError> {
    Err(CommandError::NotBuilt { command, feature })
}
