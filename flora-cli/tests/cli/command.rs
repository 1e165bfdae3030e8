//! Runs the built binary.

use std::ffi::OsStr;
use std::path::{Path, PathBuf};
use std::process::{Command, Output};
use std::sync::LazyLock;

/// A settings folder with coefficients of the host in it, so that no test measures.
static CONFIG: LazyLock<PathBuf> = LazyLock::new(|| {
    let folder = Path::new(env!("CARGO_TARGET_TMPDIR")).join("cli-config");
    let output =
        command(&folder).args(["tune", "--effort", "least", "--device", "host"]).output().expect("the binary starts");
    assert!(output.status.success(), "{}", stderr(&output));
    folder
});

/// The command on the host with `config` as its settings folder and no cache folder that could be filled.
pub(crate) fn command(config: &Path) -> Command {
    let mut command = Command::new(env!("CARGO_BIN_EXE_flora"));
    command.env("FLORA_CONFIG", config).env("FLORA_CACHE", "/dev/null/no-cache");
    command
}

/// Runs the command and checks what holds of every run.
pub(crate) fn flora<S: AsRef<OsStr>>(arguments: impl IntoIterator<Item = S>) -> Output {
    let output = command(&CONFIG).args(arguments).output().expect("the binary starts");
    assert!(!stderr(&output).contains("panicked"), "{}", stderr(&output));
    output
}

/// The JSON that a successful run printed.
pub(crate) fn answer<S: AsRef<OsStr>>(arguments: impl IntoIterator<Item = S>) -> serde_json::Value {
    let output = flora(arguments);
    assert!(output.status.success(), "{}", stderr(&output));
    serde_json::from_slice(&output.stdout).expect("standard output is JSON alone")
}

/// What a run said to people.
pub(crate) fn stderr(output: &Output) -> String {
    String::from_utf8_lossy(&output.stderr).into_owned()
}
