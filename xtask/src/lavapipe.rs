//! `cargo xtask lavapipe -- PROGRAM …`: any program, on lavapipe.

use std::ffi::OsString;
use std::path::PathBuf;
use std::process::ExitCode;

use flora_toolchain::Lavapipe;

use crate::program::become_program;

/// The program to run and what to pass to it.
#[derive(clap::Args)]
pub(crate) struct Arguments {
    /// The program's path; the search path is not looked at.
    program: PathBuf,
    /// Its arguments.
    #[arg(trailing_var_arg = true, allow_hyphen_values = true)]
    arguments: Vec<OsString>,
}

/// Becomes the program (or waits for it where a process can't become another).
pub(crate) fn run(arguments: &Arguments) -> ExitCode {
    match Lavapipe::ensure() {
        Ok(lavapipe) => become_program(lavapipe.command(&arguments.program), &arguments.arguments),
        Err(error) => {
            eprintln!("error: {error}");
            ExitCode::FAILURE
        }
    }
}
