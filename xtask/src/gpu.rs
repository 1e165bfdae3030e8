//! `cargo xtask gpu`: everything that a machine with a GPU needs to check and measure flora, in one folder and one archive of it.
//!
//! Such a machine may be at hand for ten minutes and have neither Rust nor a network. So the programs are built here, and a
//! script goes with them that runs them all and writes down what came of it (`docs/gpu.md`). A rehearsal runs the script here, on a
//! card that the processor plays, and keeps the machine code of every kernel that it meets.

mod archive;
mod folder;
#[cfg(all(test, unix))]
mod script;

use std::path::{Path, PathBuf};
use std::process::{Command, ExitCode};

use serde::Serialize;

use crate::cargo::{self, Product};
use folder::Contents;

/// Where to leave the folder, and whether to try it out.
#[derive(clap::Args)]
pub(crate) struct Arguments {
    /// The folder to make, `target/gpu` of the workspace by default; one that an earlier run made is renewed. The archive and its
    /// script lie beside it.
    #[arg(long, value_name = "FOLDER")]
    out: Option<PathBuf>,
    /// Run the folder's script here, at small sizes, on a card of this kind that the processor plays (needs a C++ compiler), and keep
    /// the machine code of the kernels for such a card.
    #[arg(long, value_name = "CARD", num_args = 0..=1, default_missing_value = "sm_90")]
    rehearse: Option<String>,
    /// Pack the folder as it is, with kernels that were kept since.
    #[arg(long, conflicts_with = "rehearse")]
    pack: bool,
    /// The rehearsal's time budget.
    #[arg(long, value_name = "MINUTES", default_value = "10", requires = "rehearse")]
    minutes: f64,
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

/// Why nothing is there to be carried.
#[derive(Debug, thiserror::Error)]
enum GpuError {
    #[error(transparent)]
    Build(#[from] cargo::BuildError),
    #[error(transparent)]
    Folder(#[from] folder::FolderError),
    #[error(transparent)]
    Archive(#[from] archive::ArchiveError),
    #[error("the kernels of a rehearsal can't be compiled: {0}")]
    Compilers(#[from] flora_toolchain::FetchError),
    #[error("the folder's script can't be run: {0}")]
    Script(std::io::Error),
    #[error("the rehearsal failed; see its report, {}", .0.display())]
    Rehearsal(PathBuf),
}

/// Builds the programs, makes the folder, rehearses where that is asked for, and packs.
pub(crate) fn run(arguments: &Arguments) -> ExitCode {
    match prepare(arguments) {
        Ok(()) => ExitCode::SUCCESS,
        Err(error) => {
            eprintln!("error: {error}");
            ExitCode::FAILURE
        }
    }
}

fn prepare(arguments: &Arguments) -> Result<(), GpuError> {
    let out = arguments.out.clone().unwrap_or_else(|| cargo::root().join("target/gpu"));
    if arguments.pack {
        return pack(&out);
    }
    let before = Build::of_checkout();
    let products = cargo::build([
        Product::Binary("flora"),
        Product::Test("conformance"),
        Product::Test("launches"),
        Product::Library("flora_nvrtc"),
        Product::Library("flora_emulated_driver"),
    ])?;
    let bytes = leave(&products, before, &out)?;
    println!("{} ({:.0} MB)", out.display(), bytes as f64 * 1e-6);
    let rehearsed = arguments.rehearse.as_ref().map(|card| rehearse(&out, card, arguments.minutes));
    // A failed rehearsal is no reason not to look at what there is on a card.
    pack(&out)?;
    rehearsed.unwrap_or(Ok(()))
}

fn pack(folder: &Path) -> Result<(), GpuError> {
    let archive = archive::pack(folder)?;
    println!(
        "{} ({:.1} MB) and {}, which unpacks and runs it; on the machine with the GPU: sh {}",
        archive.file.display(),
        archive.bytes as f64 * 1e-6,
        archive.script.display(),
        archive.script.file_name().unwrap_or_default().display()
    );
    Ok(())
}

/// Runs the script on a card of this kind that the processor plays.
fn rehearse(out: &Path, card: &str, minutes: f64) -> Result<(), GpuError> {
    flora_toolchain::CudaCompiler::ensure()?;
    let results = out.join("rehearsal");
    let mut script = Command::new("sh");
    script.arg(out.join("run.sh")).args(["--rehearse", card, "--keep-kernels", "--minutes", &minutes.to_string()]);
    let status = script.arg("--out").arg(&results).status().map_err(GpuError::Script)?;
    if status.success() { Ok(()) } else { Err(GpuError::Rehearsal(results.join("report.json"))) }
}

/// Makes the folder `out` for what was built; how many bytes it has.
fn leave(
    [flora, conformance, launches, nvrtc, emulated]: &[PathBuf; 5],
    before: Build,
    out: &Path,
) -> Result<u64, folder::FolderError> {
    let changed_during_build = before != Build::of_checkout();
    let build = serde_json::json!(Build { changed_during_build, ..before }).to_string();
    let (peers, golden) = (cargo::root().join("benches/peers"), cargo::root().join("tests/golden"));
    let (peers, golden, build) = (&peers, &golden, &build);
    folder::make(&Contents { flora, conformance, launches, nvrtc, emulated, peers, golden, build }, out)
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
