//! Hands this process over to another program.

use std::ffi::OsString;
use std::process::{Command, ExitCode};

/// Becomes the program with these arguments, or waits for it where a process can't become another.
pub(crate) fn become_program(mut command: Command, arguments: &[OsString]) -> ExitCode {
    command.args(arguments);
    #[cfg(unix)]
    let error = std::os::unix::process::CommandExt::exec(&mut command);
    #[cfg(not(unix))]
    let error = match command.status() {
        Ok(status) => return ExitCode::from(u8::try_from(status.code().unwrap_or(1)).unwrap_or(1)),
        Err(error) => error,
    };
    eprintln!("error: can't run {}: {error}", command.get_program().to_string_lossy());
    ExitCode::FAILURE
}
