//! `cargo xtask sanitize SANITIZER -- PROGRAM …`: any program, with the kernels of emulated cards watched.

use std::ffi::OsString;
use std::path::PathBuf;
use std::process::ExitCode;

use flora_toolchain::{CxxCompiler, Sanitizer};

use crate::program::become_program;

/// What watches, the program to run and what to pass to it.
#[derive(clap::Args)]
pub(crate) struct Arguments {
    /// `thread` for races, `address` for accesses beyond buffers and shared arrays.
    sanitizer: Sanitizer,
    /// The program's path; the search path is not looked at.
    program: PathBuf,
    /// Its arguments.
    #[arg(trailing_var_arg = true, allow_hyphen_values = true)]
    arguments: Vec<OsString>,
}

/// Becomes the program (or waits for it where a process can't become another).
pub(crate) fn run(arguments: &Arguments) -> ExitCode {
    match CxxCompiler::find().and_then(|compiler| compiler.watched(arguments.sanitizer, &arguments.program)) {
        Ok(command) => become_program(command, &arguments.arguments),
        Err(error) => {
            eprintln!("error: {error}");
            ExitCode::FAILURE
        }
    }
}
