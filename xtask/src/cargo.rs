//! Runs cargo: its tests, so that the output stays readable and the outcome can be counted, and its builds, so that what
//! they make is found.

use std::collections::BTreeMap;
use std::io::{self, BufRead, BufReader, Write};
use std::path::{Path, PathBuf};
use std::process::{Command, Stdio};

use serde::Deserialize;

/// The most lines of a test binary's output that are said again at the end.
const SAID_AGAIN: usize = 60;

/// What came of one `cargo test`.
#[derive(Debug, Default, PartialEq, Eq)]
pub(crate) struct Tally {
    /// Tests that passed.
    pub(crate) passed: u64,
    /// Tests that failed.
    pub(crate) failed: u64,
    /// Whether cargo itself said that all is well; it doesn't where a build failed.
    pub(crate) success: bool,
    /// The last lines of each test binary that failed or was cut off, so that they can be found in a long output.
    pub(crate) failures: Vec<String>,
    /// Those of the test binary that is running.
    running: Vec<String>,
}

/// Why a build left nothing to use.
#[derive(Debug, thiserror::Error)]
pub(crate) enum BuildError {
    #[error("cargo can't be run: {0}")]
    Cargo(#[from] io::Error),
    #[error("cargo build failed; see above")]
    Failed,
    #[error("cargo built no {0}; is it still a target of the workspace?")]
    Missing(&'static str),
}

/// The workspace's root, where every path in it starts.
pub(crate) fn root() -> &'static Path {
    Path::new(concat!(env!("CARGO_MANIFEST_DIR"), "/.."))
}

/// A cargo command for the whole workspace in release, run in its root.
///
/// Every one names the whole workspace and chooses by target or name, so that all share one build: with other packages
/// chosen, other features would be on and the dependencies built again.
fn workspace(subcommand: &str) -> Command {
    let mut command = Command::new(std::env::var_os("CARGO").unwrap_or_else(|| "cargo".into()));
    command.current_dir(root()).args([subcommand, "--workspace", "--all-features", "--release"]);
    command
}

/// `cargo doc` of the libraries, without what they depend on.
pub(crate) fn document() -> Command {
    let mut command = workspace("doc");
    command.args(["--no-deps", "--lib"]);
    command
}

/// `cargo test`.
pub(crate) fn test(arguments: &[&str]) -> Command {
    let mut command = workspace("test");
    command.arg("--no-fail-fast").args(arguments);
    command
}

/// Something that cargo makes, by its target's name.
#[derive(Clone, Copy)]
pub(crate) enum Product {
    /// A command.
    Binary(&'static str),
    /// The program of an integration test.
    Test(&'static str),
    /// A library that other programs load.
    Library(&'static str),
}

/// Builds products and all libraries; where they lie.
///
/// Naming a test brings in what only tests depend on, for commands too: the features are those of [`fn@test`]'s build.
///
/// # Errors
/// When cargo can't be run or fails, or makes one of them no longer.
pub(crate) fn build<const N: usize>(products: [Product; N]) -> Result<[PathBuf; N], BuildError> {
    let mut command = workspace("build");
    for product in products {
        match product {
            Product::Binary(name) => command.args(["--bin", name]),
            Product::Test(name) => command.args(["--test", name]),
            Product::Library(_) => &mut command,
        };
    }
    command.args(["--lib", "--message-format=json-render-diagnostics"]);
    let mut child = command.stdin(Stdio::null()).stdout(Stdio::piped()).spawn()?;
    let mut made = BTreeMap::new();
    if let Some(stdout) = child.stdout.take() {
        for line in BufReader::new(stdout).lines() {
            made.extend(product(&line?));
        }
    }
    if !child.wait()?.success() {
        return Err(BuildError::Failed);
    }
    let mut paths = products.map(|_| PathBuf::new());
    for (path, product) in paths.iter_mut().zip(products) {
        let (kind, name) = match product {
            Product::Binary(name) => ("bin", name),
            Product::Test(name) => ("test", name),
            Product::Library(name) => ("cdylib", name),
        };
        *path = made.remove(&(kind.into(), name.into())).ok_or(BuildError::Missing(name))?;
    }
    Ok(paths)
}

/// A message of cargo about something that it made, as far as it matters here.
#[derive(Deserialize)]
struct Artifact {
    target: Target,
    executable: Option<PathBuf>,
    filenames: Vec<PathBuf>,
}

#[derive(Deserialize)]
struct Target {
    kind: Vec<String>,
    name: String,
}

/// What a line of cargo's messages says was made to be run or loaded, by its target's kind and name.
fn product(line: &str) -> Option<((String, String), PathBuf)> {
    let Artifact { target, executable, filenames } = serde_json::from_str(line).ok()?;
    let kind = target.kind.into_iter().next()?;
    let file = if kind == "cdylib" { filenames.into_iter().next() } else { executable };
    Some(((kind, target.name), file?))
}

/// Runs `command`, passes its output on as it comes and counts the tests in it.
pub(crate) fn tally(mut command: Command) -> io::Result<Tally> {
    let mut child = command.stdin(Stdio::null()).stdout(Stdio::piped()).spawn()?;
    let mut tally = Tally::default();
    if let Some(stdout) = child.stdout.take() {
        for line in BufReader::new(stdout).split(b'\n') {
            let line = line?;
            tally.add(&String::from_utf8_lossy(&line));
            let mut out = io::stdout().lock();
            out.write_all(&line)?;
            out.write_all(b"\n")?;
        }
    }
    tally.cut_off();
    tally.success = child.wait()?.success();
    Ok(tally)
}

impl Tally {
    /// Counts a line of libtest: `running 8 tests`, what they print, `test result: ok. 8 passed; 0 failed; 0 ignored; …`.
    fn add(&mut self, line: &str) {
        if line.starts_with("running ") && (line.ends_with(" tests") || line.ends_with(" test")) {
            self.cut_off();
            self.running.push(line.to_owned());
        } else if !self.running.is_empty() {
            // What comes between two binaries, as how long doctests took, is no binary's.
            self.running.push(line.to_owned());
        }
        let Some(result) = line.strip_prefix("test result: ") else { return };
        for part in result.split([';', '.']) {
            match part.trim().split_once(' ') {
                Some((count, "passed")) => self.passed += count.parse().unwrap_or(0),
                Some((count, "failed")) => self.failed += count.parse().unwrap_or(0),
                _ => {}
            }
        }
        if !result.starts_with("ok") {
            self.cut_off();
        }
        self.running.clear();
    }

    /// Keeps what a test binary said that gave no good result: one that aborts gives none at all.
    fn cut_off(&mut self) {
        let lines = std::mem::take(&mut self.running);
        if lines.iter().any(|line| !line.trim().is_empty()) {
            self.failures.push(lines[lines.len().saturating_sub(SAID_AGAIN)..].join("\n"));
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn results_of_several_binaries_add_up() {
        let mut tally = Tally::default();
        for line in [
            "running 8 tests",
            "test result: ok. 8 passed; 0 failed; 0 ignored; 0 measured; 1 filtered out; finished in 0.16s",
            "",
            "running 5 tests",
            "test result: FAILED. 3 passed; 2 failed; 0 ignored; 0 measured; 0 filtered out; finished in 1.00s",
            "running 1 test",
            "the test result: ok. 100 passed; 0 failed",
            "test result: ok. 1 passed; 0 failed; 0 ignored; 0 measured; 0 filtered out; finished in 0.16s",
            "all doctests ran in 2.81s; merged doctests compilation took 2.79s",
        ] {
            tally.add(line);
        }
        tally.cut_off();
        assert_eq!((tally.passed, tally.failed, tally.failures.len()), (12, 2, 1));
        assert!(tally.failures[0].starts_with("running 5 tests"), "{tally:?}");
    }

    #[test]
    fn a_binary_that_gives_no_result_is_kept() {
        let mut tally = Tally::default();
        for line in ["running 2 tests", "test a ... ok", "", "running 0 tests"] {
            tally.add(line);
        }
        assert_eq!(tally.failures, ["running 2 tests\ntest a ... ok\n"]);
        for _ in 0..2 * SAID_AGAIN {
            tally.add("noise");
        }
        tally.cut_off();
        assert_eq!(tally.failures[1].lines().count(), SAID_AGAIN);
    }

    #[test]
    fn products_are_told_by_kind_and_name() {
        let artifact = r#"{"reason":"compiler-artifact","target":{"kind":["KIND"],"name":"flora"},"executable":PATH,
            "filenames":["/t/libflora.so"]}"#;
        let found = |kind, path| product(&artifact.replace("KIND", kind).replace("PATH", path));
        assert_eq!(found("bin", "\"/t/flora\""), Some((("bin".into(), "flora".into()), PathBuf::from("/t/flora"))));
        assert_eq!(
            found("test", "\"/t/flora-1\""),
            Some((("test".into(), "flora".into()), PathBuf::from("/t/flora-1")))
        );
        assert_eq!(found("cdylib", "null"), Some((("cdylib".into(), "flora".into()), PathBuf::from("/t/libflora.so"))));
        assert_eq!(found("lib", "null"), None);
        assert_eq!(product(r#"{"reason":"build-finished","success":true}"#), None);
        assert_eq!(product("   Compiling flora v0.1.0"), None);
    }
}
