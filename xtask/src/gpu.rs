//! `cargo xtask gpu`: everything that a machine with a GPU needs to check and measure flora, in one folder.
//!
//! Such a machine may be at hand for an hour and have neither Rust nor a network. So the programs are built here, and a
//! script goes with them that runs them all and writes down what came of it (`docs/gpu.md`).

mod folder;
#[cfg(all(test, unix))]
mod script;

use std::path::{Path, PathBuf};
use std::process::{Command, ExitCode};

use serde::Serialize;

use crate::cargo;
use folder::Contents;

/// Where to leave the folder.
#[derive(clap::Args)]
pub(crate) struct Arguments {
    /// The folder to make, `target/gpu` of the workspace by default; one that an earlier run made is renewed.
    #[arg(long, value_name = "FOLDER")]
    out: Option<PathBuf>,
}

/// What the programs were built from, which goes into the report.
#[derive(Serialize, PartialEq)]
struct Build {
    version: &'static str,
    /// `None` outside of a git checkout.
    commit: Option<String>,
    /// Files that differ from the commit, as `git status --short` lists them.
    modified: Vec<String>,
    rustc: Option<String>,
    architecture: &'static str,
    /// Whether commit or modified files became others while the programs were built: they are of neither for certain.
    changed_during_build: bool,
}

/// Builds the programs and makes the folder.
pub(crate) fn run(arguments: &Arguments) -> ExitCode {
    let out = arguments.out.clone().unwrap_or_else(|| cargo::root().join("target/gpu"));
    let before = Build::of_checkout();
    match cargo::build("flora", "conformance") {
        Err(error) => fail(&error),
        Ok([flora, conformance]) => match leave(&flora, &conformance, before, &out) {
            Err(error) => fail(&error),
            Ok(bytes) => {
                let megabytes = bytes as f64 * 1e-6;
                println!("{} ({megabytes:.0} MB); on the machine with the GPU: sh run.sh", out.display());
                ExitCode::SUCCESS
            }
        },
    }
}

fn fail(error: &dyn std::error::Error) -> ExitCode {
    eprintln!("error: {error}");
    ExitCode::FAILURE
}

/// Makes the folder `out` for two programs; how many bytes it has.
fn leave(flora: &Path, conformance: &Path, before: Build, out: &Path) -> Result<u64, folder::FolderError> {
    let changed_during_build = before != Build::of_checkout();
    let build = serde_json::json!(Build { changed_during_build, ..before }).to_string();
    let (peers, golden) = (cargo::root().join("benches/peers"), cargo::root().join("tests/golden/peft"));
    folder::make(&Contents { flora, conformance, peers: &peers, golden: &golden, build: &build }, out)
}

impl Build {
    fn of_checkout() -> Self {
        let status = said("git", &["status", "--short"]).unwrap_or_default();
        Self {
            version: env!("CARGO_PKG_VERSION"),
            commit: said("git", &["rev-parse", "HEAD"]),
            modified: status.lines().map(|line| line.trim().to_owned()).collect(),
            rustc: said("rustc", &["--version"]),
            architecture: std::env::consts::ARCH,
            changed_during_build: false,
        }
    }
}

/// What a program prints in the workspace's root; `None` where it fails or isn't there.
fn said(program: &str, arguments: &[&str]) -> Option<String> {
    let output = Command::new(program).args(arguments).current_dir(cargo::root()).output().ok()?;
    output.status.success().then(|| String::from_utf8_lossy(&output.stdout).trim().to_owned())
}
