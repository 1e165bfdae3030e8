//! `cargo xtask wheel`: the Python package as one wheel for every CPython from 3.10 on.

use std::path::PathBuf;
use std::process::{Command, ExitCode};

use flora_toolchain::maturin;

use crate::cargo;

/// Where to.
#[derive(clap::Args)]
pub(crate) struct Arguments {
    /// The folder that the wheel is put into.
    #[arg(long, default_value = "target/wheels")]
    out: PathBuf,
    /// With layers on cards of NVIDIA's, whose libraries are loaded when they are first asked for.
    #[arg(long)]
    cuda: bool,
}

/// Builds it.
pub(crate) fn run(arguments: &Arguments) -> ExitCode {
    let maturin = match maturin() {
        Ok(packages) => packages.folder().join("bin/maturin"),
        Err(error) => {
            eprintln!("error: {error}");
            return ExitCode::FAILURE;
        }
    };
    let mut command = Command::new(&maturin);
    command.args(["build", "--release", "--locked", "--manifest-path"]);
    command.arg(cargo::root().join("flora-python/Cargo.toml")).arg("--out").arg(&arguments.out);
    if arguments.cuda {
        command.args(["--features", "cuda"]);
    }
    match command.status() {
        Ok(status) if status.success() => ExitCode::SUCCESS,
        Ok(_) => ExitCode::FAILURE,
        Err(error) => {
            eprintln!("error: {} can't be run: {error}", maturin.display());
            ExitCode::FAILURE
        }
    }
}
