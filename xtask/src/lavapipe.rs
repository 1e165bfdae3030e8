//! `cargo xtask lavapipe -- PROGRAM …`: any program, on lavapipe.

use std::ffi::OsString;
use std::path::PathBuf;
use std::process::ExitCode;

use flora_toolchain::Lavapipe;

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
    let mut command = match Lavapipe::ensure() {
        Ok(lavapipe) => lavapipe.command(&arguments.program),
        Err(error) => {
            eprintln!("error: {error}");
            return ExitCode::FAILURE;
        }
    };
    command.args(&arguments.arguments);
    #[cfg(unix)]
    let error = std::os::unix::process::CommandExt::exec(&mut command);
    #[cfg(not(unix))]
    let error = match command.status() {
        Ok(status) => return ExitCode::from(u8::try_from(status.code().unwrap_or(1)).unwrap_or(1)),
        Err(error) => error,
    };
    eprintln!("error: can't run {}: {error}", arguments.program.display());
    ExitCode::FAILURE
}
