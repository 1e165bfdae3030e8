//! Runs `cargo test` so that its output stays readable and its outcome can be counted.

use std::io::{self, BufRead, BufReader, Write};
use std::process::{Command, Stdio};

/// What came of one `cargo test`.
#[derive(Debug, Default, Clone, Copy, PartialEq, Eq)]
pub(crate) struct Tally {
    /// Tests that passed.
    pub(crate) passed: u64,
    /// Tests that failed.
    pub(crate) failed: u64,
    /// Whether cargo itself said that all is well; it doesn't where a build failed.
    pub(crate) success: bool,
}

/// `cargo test` for the whole workspace in release, run in its root.
///
/// Every suite names the whole workspace and chooses by target or name, so that all share one build: with other packages
/// chosen, other features would be on and the dependencies built again.
pub(crate) fn test(arguments: &[&str]) -> Command {
    let mut command = Command::new(std::env::var_os("CARGO").unwrap_or_else(|| "cargo".into()));
    command.current_dir(concat!(env!("CARGO_MANIFEST_DIR"), "/.."));
    command.args(["test", "--workspace", "--release", "--no-fail-fast"]).args(arguments);
    command
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
    tally.success = child.wait()?.success();
    Ok(tally)
}

impl Tally {
    /// Counts a line of libtest: `test result: ok. 8 passed; 0 failed; 0 ignored; …`.
    fn add(&mut self, line: &str) {
        let Some(result) = line.strip_prefix("test result: ") else { return };
        for part in result.split([';', '.']) {
            match part.trim().split_once(' ') {
                Some((count, "passed")) => self.passed += count.parse().unwrap_or(0),
                Some((count, "failed")) => self.failed += count.parse().unwrap_or(0),
                _ => {}
            }
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
            "test result: FAILED. 3 passed; 2 failed; 0 ignored; 0 measured; 0 filtered out; finished in 1.00s",
            "the test result: ok. 100 passed; 0 failed",
        ] {
            tally.add(line);
        }
        assert_eq!(tally, Tally { passed: 11, failed: 2, success: false });
    }
}
