//! The tests of the Python package: those that need nothing but NumPy, and those with PyTorch and PEFT, which run where these are.

use std::fs;
use std::io::{self, BufRead, BufReader, Write};
use std::path::{Path, PathBuf};
use std::process::{Command, Stdio};
use std::time::Instant;

use flora_toolchain::{pytest, torch_from_environment};

use super::{Outcome, Row};
use crate::cargo::{self, Product};

const NATIVE: &str = "python";
const TORCH: &str = "python with PyTorch, PEFT";

/// Both suites.
pub(super) fn suites() -> Vec<Row> {
    let start = Instant::now();
    let row = |suite, outcome| Row { suite, outcome, failures: Vec::new(), time: start.elapsed() };
    eprintln!("\n== {NATIVE}");
    let (package, driver) = match stage() {
        Ok(staged) => staged,
        Err(error) => return vec![row(NATIVE, Outcome::Failed(error))],
    };
    let native = match pytest() {
        Ok(packages) => {
            let mut python = packages.command_after(&package);
            python.env("FLORA_EMULATED_DRIVER", driver);
            outcome(python, "native")
        }
        Err(error) => Outcome::NotRun(error.to_string()),
    };
    let native = row(NATIVE, native);
    eprintln!("\n== {TORCH}");
    let start = Instant::now();
    let row = |suite, outcome| Row { suite, outcome, failures: Vec::new(), time: start.elapsed() };
    let torch = match torch_from_environment(&package) {
        Ok(Some(command)) => outcome(command, "torch_peft"),
        Ok(None) => Outcome::LeftOut("set FLORA_TORCH to a Python that has both, or to `required` (4 GB)".to_owned()),
        Err(error) => Outcome::NotRun(error.to_string()),
    };
    vec![native, row(TORCH, torch)]
}

/// Builds the native module and puts it beside a copy of the package's sources: the folder to import it from, and the library that
/// plays CUDA's driver.
fn stage() -> Result<(PathBuf, PathBuf), String> {
    let [_, _, library, driver] = cargo::build([
        Product::Binary("flora"),
        Product::Test("facade"),
        Product::Library("flora_python"),
        Product::Library("flora_emulated_driver"),
    ])
    .map_err(|error| error.to_string())?;
    let folder = library.with_file_name("python");
    let failed = |error: io::Error| format!("the package can't be put together in {}: {error}", folder.display());
    if folder.exists() {
        fs::remove_dir_all(&folder).map_err(failed)?;
    }
    copy(&cargo::root().join("flora-python/python/flora"), &folder.join("flora")).map_err(failed)?;
    let suffix = if cfg!(windows) { "pyd" } else { "abi3.so" };
    fs::copy(&library, folder.join("flora").join(format!("_native.{suffix}"))).map_err(failed)?;
    Ok((folder, driver))
}

/// Copies a folder's sources, not what was built in it.
fn copy(from: &Path, to: &Path) -> io::Result<()> {
    fs::create_dir_all(to)?;
    for entry in fs::read_dir(from)? {
        let entry = entry?;
        let (path, name) = (entry.path(), entry.file_name());
        let is_source =
            path.extension().is_some_and(|extension| matches!(extension.to_str(), Some("py" | "pyi" | "typed")));
        if entry.file_type()?.is_dir() && name != "__pycache__" {
            copy(&path, &to.join(name))?;
        } else if is_source {
            fs::copy(&path, to.join(name))?;
        }
    }
    Ok(())
}

/// Runs the tests of a folder by an interpreter.
fn outcome(mut python: Command, tests: &str) -> Outcome {
    python.current_dir(cargo::root().join("flora-python")).env("PYTHONDONTWRITEBYTECODE", "1");
    python.args(["-m", "pytest", "-q", "-p", "no:cacheprovider", &format!("tests/{tests}")]);
    match run(python) {
        Ok((true, summary)) => match counted(&summary) {
            Some(Counted { passed, skipped: 0 }) if passed > 0 => Outcome::Passed(passed),
            _ => Outcome::Failed(format!("it isn't clear that all tests ran: {summary}")),
        },
        Ok((false, summary)) => Outcome::Failed(summary),
        Err(error) => Outcome::Failed(format!("Python can't be run: {error}")),
    }
}

/// Whether a command succeeded, and the last line that it said, which is passed on with all others.
fn run(mut command: Command) -> io::Result<(bool, String)> {
    let mut child = command.stdin(Stdio::null()).stdout(Stdio::piped()).spawn()?;
    let mut last = String::new();
    if let Some(stdout) = child.stdout.take() {
        for line in BufReader::new(stdout).split(b'\n') {
            let line = line?;
            let mut out = io::stdout().lock();
            out.write_all(&line)?;
            out.write_all(b"\n")?;
            let line = String::from_utf8_lossy(&line);
            if !line.trim().is_empty() {
                line.trim().clone_into(&mut last);
            }
        }
    }
    Ok((child.wait()?.success(), last))
}

/// What pytest counted.
#[derive(Debug, PartialEq, Eq)]
struct Counted {
    passed: u64,
    /// Those that didn't run, or weren't expected to pass.
    skipped: u64,
}

/// Reads `154 passed, 1 skipped, 19 warnings in 175.52s (0:02:55)`.
fn counted(summary: &str) -> Option<Counted> {
    let (counts, _) = summary.split_once(" in ")?;
    let mut counted = Counted { passed: 0, skipped: 0 };
    for part in counts.split(", ") {
        let (count, what) = part.split_once(' ')?;
        let count: u64 = count.parse().ok()?;
        match what {
            "passed" => counted.passed += count,
            "warning" | "warnings" => {}
            _ => counted.skipped += count,
        }
    }
    Some(counted)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn what_pytest_counts_is_read() {
        let of = |passed, skipped| Some(Counted { passed, skipped });
        assert_eq!(counted("154 passed, 19 warnings in 175.52s (0:02:55)"), of(154, 0));
        assert_eq!(counted("3 passed, 1 skipped, 2 xfailed, 1 warning in 0.10s"), of(3, 3));
        assert_eq!(counted("no tests ran in 0.00s"), None);
        assert_eq!(counted("ERROR: file or directory not found"), None);
    }
}
