//! `cargo xtask machine-code`: what bounds the main loops of flora's kernels, and of others' in the same columns.
//!
//! flora's rows are those that its test of machine code holds (`flora-cli/tests/snapshots/cuda.rs`). Other compilers' PTX goes through
//! the same assembler and the same readers.

use std::io;
use std::path::PathBuf;
use std::process::{Command, ExitCode, Stdio};

use flora_toolchain::{Architecture, CompileError, CudaCompiler, FetchError, Source, UnknownArchitecture, heading};
use serde::Deserialize;

use crate::cargo;

/// The table that the test holds.
const TABLE: &str = "flora-cli/tests/snapshots/snapshots/snapshots__cuda__cuda main loops.snap";
/// What prints others' kernels.
const PEERS: &str = "benches/peers/machine_code.py";

/// Whose kernels to compare with.
#[derive(clap::Args)]
pub(crate) struct Arguments {
    /// A Python with Triton 3.5, which compiles without a GPU; without it flora's table is printed alone.
    #[arg(long, value_name = "PYTHON")]
    triton: Option<PathBuf>,
    /// An unpacked source distribution of vLLM, for its kernels as well.
    #[arg(long, value_name = "FOLDER", requires = "triton")]
    vllm: Option<PathBuf>,
}

#[derive(Debug, thiserror::Error)]
enum MachineCodeError {
    #[error("{path}: {source}", path = path.display())]
    Io { path: PathBuf, source: io::Error },
    #[error("{PEERS} failed; see above")]
    Peers,
    #[error("{PEERS} printed no kernels: {0}")]
    Format(#[from] serde_json::Error),
    #[error(transparent)]
    Architecture(#[from] UnknownArchitecture),
    #[error(transparent)]
    Compilers(#[from] FetchError),
    #[error("{title}: {source}")]
    Compile { title: String, source: CompileError },
}

/// A kernel as `benches/peers/machine_code.py` prints it.
#[derive(Deserialize)]
struct Kernel {
    title: String,
    architecture: String,
    source: From,
    ptx: String,
}

/// [`Source`] by name.
#[derive(Deserialize)]
#[serde(rename_all = "snake_case")]
enum From {
    Memory,
    Cache,
}

/// Prints the tables.
pub(crate) fn run(arguments: &Arguments) -> ExitCode {
    match print(arguments) {
        Ok(()) => ExitCode::SUCCESS,
        Err(error) => {
            eprintln!("error: {error}");
            ExitCode::FAILURE
        }
    }
}

fn print(arguments: &Arguments) -> Result<(), MachineCodeError> {
    let path = cargo::root().join(TABLE);
    let table = std::fs::read_to_string(&path).map_err(|source| MachineCodeError::Io { path, source })?;
    println!("{}", body(&table));
    let Some(python) = &arguments.triton else { return Ok(()) };
    let mut command = Command::new(python);
    command.arg(cargo::root().join(PEERS)).stderr(Stdio::inherit());
    if let Some(vllm) = &arguments.vllm {
        command.arg("--vllm").arg(vllm);
    }
    let output = command.output().map_err(|source| MachineCodeError::Io { path: python.clone(), source })?;
    if !output.status.success() {
        return Err(MachineCodeError::Peers);
    }
    let kernels: Vec<Kernel> = serde_json::from_slice(&output.stdout)?;
    let compiler = CudaCompiler::ensure()?;
    println!("{}", heading());
    for Kernel { title, architecture, source, ptx } in kernels {
        let architecture: Architecture = architecture.parse()?;
        let compiled = compiler.compile_ptx(&ptx, architecture);
        let compiled = compiled.map_err(|source| MachineCodeError::Compile { title: title.clone(), source })?;
        let source = match source {
            From::Memory => Source::Memory,
            From::Cache => Source::Cache,
        };
        println!("{}", compiled.row(&title, source).unwrap_or_else(|| format!("{title}: no loop multiplies")));
    }
    Ok(())
}

/// What a snapshot holds, without what is said about it.
fn body(snapshot: &str) -> &str {
    snapshot.strip_prefix("---\n").and_then(|rest| rest.split_once("\n---\n")).map_or(snapshot, |(_, body)| body)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_snapshot_is_told_from_its_head() {
        assert_eq!(body("---\nsource: a.rs\nexpression: b\n---\nkernel\n---\n"), "kernel\n---\n");
        assert_eq!(body("kernel\n"), "kernel\n");
    }

    #[test]
    fn the_table_and_the_peers_are_there() {
        let table = std::fs::read_to_string(cargo::root().join(TABLE)).unwrap();
        assert!(body(&table).starts_with(&heading()), "the test of machine code writes it");
        assert!(cargo::root().join(PEERS).is_file());
    }
}
