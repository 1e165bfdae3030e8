//! The machine's own pip, which knows this machine's index, mirror and proxy.

use std::ffi::OsStr;
use std::path::Path;
use std::process::{Command, Output};

use crate::error::FetchError;
use crate::program::Fetch;

/// Runs `pip SUBCOMMAND ARGUMENTS` as a step of `fetch`; `what` is being fetched, and what pip keeps for a while goes into
/// `work`, so that the bar sees it and no other disk fills up.
///
/// # Errors
/// [`FetchError::MissingProgram`] without Python or pip, or what pip's output tells.
pub(crate) fn run<A: AsRef<OsStr>>(
    fetch: &Fetch<'_>,
    what: &str,
    subcommand: &str,
    work: &Path,
    arguments: impl IntoIterator<Item = A>,
) -> Result<Output, FetchError> {
    let arguments: Vec<A> = arguments.into_iter().collect();
    let with = |interpreter: &str| {
        let mut command = Command::new(interpreter);
        command
            .args(["-m", "pip", subcommand, "--only-binary=:all:", "--no-cache-dir", "--no-input"])
            .args(["--disable-pip-version-check", "--progress-bar=off", "--retries=2", "--timeout=20"])
            .args(&arguments)
            .env("TMPDIR", work);
        match fetch.run(command, missing_python(what)) {
            Err(FetchError::Failed { detail, .. }) if detail.contains("No module named pip") => {
                Err(missing(what, "pip", "install it (Debian: apt-get install python3-pip)"))
            }
            outcome => outcome,
        }
    };
    either_name(with)
}

/// Runs Python by its name; Windows has no `python3`.
pub(crate) fn either_name<T>(run: impl Fn(&'static str) -> Result<T, FetchError>) -> Result<T, FetchError> {
    match run("python3") {
        Err(FetchError::MissingProgram { program: "python3", .. }) => run("python"),
        outcome => outcome,
    }
}

pub(crate) fn missing_python(what: &str) -> FetchError {
    missing(what, "python3", "install Python 3 with pip (Debian: apt-get install python3-pip)")
}

fn missing(what: &str, program: &'static str, mend: &'static str) -> FetchError {
    FetchError::MissingProgram { what: what.to_owned(), program, mend }
}
