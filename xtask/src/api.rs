//! `cargo xtask api`: the public items of every library as text, so that a change of what others build on is seen in review. The
//! listings are in `docs/api`; they are compared, or written anew. Documentation is checked on the way.

use std::ffi::{OsStr, OsString};
use std::path::{Path, PathBuf};
use std::process::{Command, ExitCode};

use crate::cargo;

/// The libraries, the facade first. The macro's face is its documentation.
const LIBRARIES: [&str; 17] = [
    "flora",
    "flora-ir",
    "flora-plan",
    "flora-runtime",
    "flora-host",
    "flora-codegen",
    "flora-devices",
    "flora-driver",
    "flora-checkpoint",
    "flora-adapters",
    "flora-tune",
    "flora-oracle",
    "flora-burn",
    "flora-engine",
    "flora-train",
    "flora-convert",
    "flora-model",
];

/// Names the real rustdoc to this program where cargo starts it in rustdoc's place.
const RUSTDOC: &str = "FLORA_XTASK_RUSTDOC";

/// Whether to write or to compare.
#[derive(clap::Args)]
pub(crate) struct Arguments {
    /// Write the listings instead of comparing them.
    #[arg(long)]
    write: bool,
}

#[derive(Debug, thiserror::Error)]
enum ApiError {
    #[error("{} can't be run: {source}", command.display())]
    Run { command: PathBuf, source: std::io::Error },
    #[error("cargo doc failed; see above")]
    Failed,
    #[error("{} can't be listed: {source}; the listing reads what rustdoc of Rust 1.95 writes", path.display())]
    Listing { path: PathBuf, source: Box<public_api::Error> },
    #[error("{}: {source}", path.display())]
    Io { path: PathBuf, source: std::io::Error },
}

/// Compares or writes the listings.
pub(crate) fn run(arguments: &Arguments) -> ExitCode {
    match listings(arguments.write) {
        Ok(changed) if changed.is_empty() || arguments.write => ExitCode::SUCCESS,
        Ok(changed) => {
            changed.iter().for_each(|change| println!("{change}"));
            println!(
                "The public items are not those that docs/api lists; if they are meant, run `cargo xtask api --write`."
            );
            ExitCode::FAILURE
        }
        Err(error) => {
            eprintln!("{error}");
            ExitCode::FAILURE
        }
    }
}

/// Lists every library; what differs from the listings that are there.
fn listings(write: bool) -> Result<Vec<String>, ApiError> {
    let documents = describe()?;
    let folder = cargo::root().join("docs/api");
    let mut changed = Vec::new();
    for library in LIBRARIES {
        let path = documents.join(format!("{}.json", library.replace('-', "_")));
        let listing = public_api::Builder::from_rustdoc_json(&path)
            .omit_blanket_impls(true)
            .omit_auto_trait_impls(true)
            .omit_auto_derived_impls(true)
            .build()
            .map_err(|source| ApiError::Listing { path, source: source.into() })?
            .to_string();
        let path = folder.join(format!("{library}.txt"));
        let failed = |source| ApiError::Io { path: path.clone(), source };
        if write {
            std::fs::create_dir_all(&folder).map_err(failed)?;
            std::fs::write(&path, listing).map_err(failed)?;
            continue;
        }
        let listed = match std::fs::read_to_string(&path) {
            Err(error) if error.kind() == std::io::ErrorKind::NotFound => String::new(),
            listed => listed.map_err(failed)?,
        };
        changed.extend(difference(library, &listed, &listing));
    }
    Ok(changed)
}

/// Lines that one of two listings has and the other hasn't.
fn difference(library: &str, listed: &str, found: &str) -> Vec<String> {
    let of = |text: &str| text.lines().map(str::to_owned).collect::<std::collections::BTreeSet<_>>();
    let (listed, found) = (of(listed), of(found));
    let gone = listed.difference(&found).map(|line| format!("{library} - {line}"));
    gone.chain(found.difference(&listed).map(|line| format!("{library} + {line}"))).collect()
}

/// Has rustdoc describe the workspace as JSON; the folder of the descriptions. What is wrong with the documentation is an error.
///
/// Stable Rust's rustdoc writes JSON when it is told to take unstable options. Whoever tells that to the compiler too builds every
/// dependency again, so this program stands in for rustdoc alone.
fn describe() -> Result<PathBuf, ApiError> {
    let failed = |command: &Path| {
        let command = command.to_owned();
        |source| ApiError::Run { command, source }
    };
    let this = std::env::current_exe().map_err(failed(Path::new("xtask")))?;
    let rustdoc = std::env::var_os("RUSTDOC").unwrap_or_else(|| "rustdoc".into());
    let mut command = cargo::document();
    command
        .env("RUSTDOC", &this)
        .env(RUSTDOC, rustdoc)
        .env("RUSTDOCFLAGS", "-D warnings -Z unstable-options --output-format json");
    let status = command.status().map_err(failed(Path::new("cargo")))?;
    if !status.success() {
        return Err(ApiError::Failed);
    }
    // This program is in `release`, beside which the descriptions are.
    let target = this.parent().and_then(Path::parent).unwrap_or(Path::new("target"));
    Ok(target.join("doc"))
}

/// Stands in for rustdoc where cargo starts this program as such.
pub(crate) fn as_rustdoc(mut arguments: impl Iterator<Item = OsString>) -> Option<ExitCode> {
    let rustdoc = std::env::var_os(RUSTDOC)?;
    arguments.next();
    let status = Command::new(OsStr::new(&rustdoc)).args(arguments).env("RUSTC_BOOTSTRAP", "1").status();
    Some(match status {
        Ok(status) if status.success() => ExitCode::SUCCESS,
        Ok(_) => ExitCode::FAILURE,
        Err(error) => {
            eprintln!("{} can't be run: {error}", rustdoc.display());
            ExitCode::FAILURE
        }
    })
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_difference_names_what_came_and_what_went() {
        assert_eq!(
            difference("a", "pub fn x()\npub fn y()\n", "pub fn y()\npub fn z()\n"),
            ["a - pub fn x()", "a + pub fn z()"]
        );
        assert_eq!(difference("a", "pub fn x()\n", "pub fn x()\n"), [""; 0]);
    }
}
