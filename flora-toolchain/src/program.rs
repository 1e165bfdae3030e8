//! Runs the outside programs that fetch things, and reads from their output why they failed.
//!
//! pip and apt-get say what went wrong in prose only, so the table of phrases below is the one place that knows it.

use std::io::Read;
use std::path::Path;
use std::process::{Command, Output, Stdio};
use std::time::Duration;

use indicatif::{DecimalBytes, ProgressBar, ProgressStyle};

use crate::error::FetchError;

/// What the programs print when they can't reach the other side (in the C locale).
const OFFLINE: &[&str] = &[
    "Temporary failure in name resolution",
    "Temporary failure resolving",
    "Name or service not known",
    "nodename nor servname provided",
    "getaddrinfo failed",
    "Could not resolve",
    "Could not connect",
    "Cannot initiate the connection",
    "Unable to connect",
    "Failed to establish a new connection",
    "Network is unreachable",
    "No route to host",
    "Connection refused",
    "Connection timed out",
    "connection timed out",
    "Connection failed",
    "Connection reset",
    "Read timed out",
    "ConnectTimeoutError",
    "ReadTimeoutError",
    "ProxyError",
    "Tunnel connection failed",
];

/// What the programs print when the disk is full.
const DISK_FULL: &[&str] =
    &["No space left on device", "not enough free space", "You don't have enough free space", "Disk quota exceeded"];

/// The fetching of one thing, by one outside program after the other.
pub(crate) struct Fetch<'a> {
    what: &'a str,
    folder: &'a Path,
    bar: ProgressBar,
}

impl<'a> Fetch<'a> {
    /// Begins to fetch `what` (its name for people) into `folder`, whose growing size moves the progress bar. `bytes` is
    /// what the folder will hold in the end, where that is known.
    pub(crate) fn new(what: &'a str, folder: &'a Path, bytes: Option<u64>) -> Self {
        Self { what, folder, bar: bar(what, bytes) }
    }

    /// Runs `command` to its end, showing how far it is, and gives what it printed.
    ///
    /// `missing` is the error for a program that is not installed.
    ///
    /// # Errors
    /// `missing`, or the cause of the failure as far as the output tells it.
    pub(crate) fn run(&self, mut command: Command, missing: FetchError) -> Result<Output, FetchError> {
        let program = command.get_program().to_string_lossy().into_owned();
        command.env("LC_ALL", "C").stdin(Stdio::null()).stdout(Stdio::piped()).stderr(Stdio::piped());
        let mut child = match command.spawn() {
            Ok(child) => child,
            Err(error) if error.kind() == std::io::ErrorKind::NotFound => return Err(missing),
            Err(error) => return Err(FetchError::io("start", program, self.what)(error)),
        };
        let (stdout, stderr) = (drain(child.stdout.take()), drain(child.stderr.take()));
        let status = loop {
            match child.try_wait().map_err(FetchError::io("wait for", &program, self.what))? {
                Some(status) => break status,
                None => std::thread::sleep(Duration::from_millis(50)),
            }
            let size = size(self.folder);
            self.bar.set_position(self.bar.length().map_or(size, |length| size.min(length)));
        };
        let collect = |reader: std::thread::JoinHandle<Vec<u8>>| reader.join().unwrap_or_default();
        let output = Output { status, stdout: collect(stdout), stderr: collect(stderr) };
        if status.success() { Ok(output) } else { Err(self.failure(program, &output)) }
    }

    /// Why a program failed, told from what it printed.
    fn failure(&self, program: String, output: &Output) -> FetchError {
        let text = [output.stderr.as_slice(), &output.stdout].map(String::from_utf8_lossy).join("\n");
        let what = self.what.to_owned();
        if phrase_in(&text, DISK_FULL).is_some() {
            return FetchError::DiskFull { what, folder: self.folder.to_owned() };
        }
        if let Some(phrase) = phrase_in(&text, OFFLINE) {
            return FetchError::Offline { what, detail: phrase.to_owned() };
        }
        let tail: Vec<_> = text.lines().map(str::trim).filter(|line| !line.is_empty()).collect();
        let detail = shorten(&tail[tail.len().saturating_sub(4)..].join(" | "));
        FetchError::Failed { what, program, status: output.status, detail }
    }
}

impl Drop for Fetch<'_> {
    fn drop(&mut self) {
        self.bar.finish_and_clear();
    }
}

/// A bar on a terminal; elsewhere one plain line.
fn bar(what: &str, bytes: Option<u64>) -> ProgressBar {
    let bar = match bytes {
        Some(bytes) => {
            ProgressBar::new(bytes).with_style(style("{msg} [{bar:32}] {decimal_bytes}/{decimal_total_bytes} {eta}"))
        }
        None => ProgressBar::new_spinner().with_style(style("{spinner} {msg} {decimal_bytes}")),
    };
    let message = format!("fetching {what}");
    if bar.is_hidden() {
        let size = bytes.map(|bytes| format!(" ({})", DecimalBytes(bytes)));
        tracing::info!("{message}{}", size.unwrap_or_default());
    }
    bar.with_message(message)
}

/// A style from a template that is known to be well formed; the default one should it ever not be.
fn style(template: &str) -> ProgressStyle {
    ProgressStyle::with_template(template).unwrap_or_else(|_| ProgressStyle::default_bar())
}

/// The first of `phrases` that `text` holds.
fn phrase_in<'p>(text: &str, phrases: &[&'p str]) -> Option<&'p str> {
    phrases.iter().copied().find(|phrase| text.contains(phrase))
}

/// At most 400 characters of `text`, so that an error stays readable.
fn shorten(text: &str) -> String {
    match text.char_indices().nth(400) {
        Some((end, _)) => format!("{} …", &text[..end]),
        None => text.to_owned(),
    }
}

/// Reads a pipe to its end on a thread of its own, so that the program never blocks on it.
fn drain(pipe: Option<impl Read + Send + 'static>) -> std::thread::JoinHandle<Vec<u8>> {
    std::thread::spawn(move || {
        let mut bytes = Vec::new();
        if let Some(mut pipe) = pipe {
            // What was read before an error is still worth showing.
            let _ = pipe.read_to_end(&mut bytes);
        }
        bytes
    })
}

/// Bytes of all files below `folder`; files that vanish meanwhile count nothing.
fn size(folder: &Path) -> u64 {
    let Ok(entries) = std::fs::read_dir(folder) else { return 0 };
    entries
        .flatten()
        .map(|entry| match entry.metadata() {
            Ok(metadata) if metadata.is_dir() => size(&entry.path()),
            Ok(metadata) => metadata.len(),
            Err(_) => 0,
        })
        .sum()
}

#[cfg(test)]
#[cfg(unix)]
mod tests {
    use super::*;

    fn run(script: &str) -> Result<Output, FetchError> {
        let folder = tempfile::tempdir().unwrap();
        let mut command = Command::new("sh");
        command.args(["-c", script]);
        Fetch::new("a thing", folder.path(), None).run(command, FetchError::NoCacheFolder)
    }

    #[test]
    fn output_of_a_program_that_succeeds_is_returned() {
        assert_eq!(run("echo right; echo wrong >&2").unwrap().stdout, b"right\n");
    }

    #[test]
    fn causes_are_read_from_the_output() {
        let offline = run("echo 'W: Temporary failure resolving mirror' >&2; exit 100").unwrap_err();
        assert!(offline.is_offline(), "{offline}");
        let full = run("echo 'OSError: [Errno 28] No space left on device' >&2; exit 2").unwrap_err();
        assert!(matches!(full, FetchError::DiskFull { .. }), "{full}");
        let other = run("echo 'Segmentation of the sky' >&2; exit 3").unwrap_err();
        assert!(matches!(&other, FetchError::Failed { detail, .. } if detail.contains("of the sky")), "{other}");
    }

    #[test]
    fn a_program_that_is_not_installed_is_the_given_error() {
        let folder = tempfile::tempdir().unwrap();
        let error = Fetch::new("a thing", folder.path(), None)
            .run(Command::new("no-such-program-anywhere"), FetchError::NoCacheFolder)
            .unwrap_err();
        assert!(matches!(error, FetchError::NoCacheFolder), "{error}");
    }

    #[test]
    fn more_output_than_a_pipe_holds_does_not_block() {
        assert_eq!(run("head -c 1000000 /dev/zero").unwrap().stdout.len(), 1_000_000);
    }
}
