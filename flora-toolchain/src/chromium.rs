//! A web browser without a window, so that the server's page is tested as a person's browser shows it.
//!
//! It is Debian's own headless Chromium of the release that this machine runs, unpacked into the cache folder with every library
//! but the C library, and never installed.

use std::fs;
use std::path::{Path, PathBuf};
use std::process::Command;

use crate::apt::Packages;
use crate::cache::{Cache, from_environment};
use crate::error::FetchError;

/// The browser's package.
const PACKAGES: [&str; 1] = ["chromium-headless-shell"];
/// The C library belongs to the loader, which is the system's.
const WITHOUT: [&str; 1] = ["libc6"];
/// Where a release says its code name.
const RELEASE: &str = "/etc/os-release";
/// Where a release's 64-bit libraries lie.
const LIBRARIES: [&str; 3] =
    ["usr/lib/x86_64-linux-gnu", "lib/x86_64-linux-gnu", "usr/lib/x86_64-linux-gnu/pulseaudio"];
/// The browser within its tree.
const PROGRAM: &str = "usr/lib/chromium/chromium-headless-shell";
/// What is being fetched, for people.
const WHAT: &str = "Chromium (a browser without a window)";

/// An unpacked Chromium.
#[derive(Debug, Clone)]
pub struct Chromium {
    folder: PathBuf,
}

impl Chromium {
    /// Chromium from the cache folder, fetched into it (160 MB, 520 unpacked) on first use.
    ///
    /// # Errors
    /// [`FetchError::Unsupported`] where there is no Debian on x86-64, [`FetchError::Offline`] without a network, and whatever
    /// else keeps it from being unpacked.
    pub fn ensure() -> Result<Self, FetchError> {
        let (release, cache) = (release()?, Cache::open()?);
        let folder = cache.install(&entry(&release), |folder| fetch(folder, &release))?;
        Ok(Self { folder })
    }

    /// The same as the environment variable `FLORA_CHROMIUM` has it, for tests: `required` fetches it and fails where that fails,
    /// `absent` is none, and without it there is what was fetched before.
    ///
    /// # Errors
    /// As [`Chromium::ensure`], with `required` only.
    pub fn from_environment() -> Result<Option<Self>, FetchError> {
        let installed = || {
            let folder = Cache::open().ok()?.installed(&entry(&release().ok()?))?;
            Some(Self { folder })
        };
        from_environment("FLORA_CHROMIUM", Self::ensure, installed)
    }

    /// A command that starts the browser with `profile` as the folder of everything it keeps. It asks nobody for anything that the
    /// pages that it is given don't ask for. The caller adds how it is spoken to.
    ///
    /// It has no sandbox: give it one's own pages alone.
    #[must_use]
    pub fn command(&self, profile: &Path) -> Command {
        let mut command = Command::new(self.folder.join(PROGRAM));
        let libraries = LIBRARIES.map(|folder| self.folder.join(folder));
        // No separator is in the path of a cache folder that other programs could use.
        command.env("LD_LIBRARY_PATH", std::env::join_paths(libraries).unwrap_or_default());
        // The fonts of the tree, whatever the system has.
        command.env("FONTCONFIG_SYSROOT", &self.folder);
        command.args(["--no-sandbox", "--disable-gpu", "--disable-dev-shm-usage", "--no-first-run", "--disable-quic"]);
        command.args(["--disable-background-networking", "--disable-component-update", "--disable-sync"]);
        // A proxy of this machine would be asked for its own loopback.
        command.arg("--no-proxy-server");
        let mut folder = std::ffi::OsString::from("--user-data-dir=");
        folder.push(profile);
        command.arg(folder);
        command
    }
}

/// The entry in the cache folder: another release is another entry.
fn entry(release: &str) -> String {
    format!("chromium-{release}")
}

/// Fills `folder` with the unpacked packages.
fn fetch(folder: &Path, release: &str) -> Result<(), FetchError> {
    let mend = "it is part of Debian; elsewhere FLORA_CHROMIUM=absent leaves the tests of the page out";
    let packages = Packages { what: WHAT, suite: release, names: &PACKAGES, without: &WITHOUT, mend };
    packages.unpack(folder)?;
    if folder.join(PROGRAM).is_file() {
        return Ok(());
    }
    Err(FetchError::Damaged { what: WHAT.to_owned(), detail: format!("there is no {PROGRAM} in it") })
}

/// The code name of the Debian that this machine runs.
fn release() -> Result<String, FetchError> {
    let unsupported = || FetchError::Unsupported { what: WHAT, needs: "Debian on x86-64" };
    if !cfg!(all(target_os = "linux", target_arch = "x86_64")) {
        return Err(unsupported());
    }
    let text = fs::read_to_string(RELEASE).unwrap_or_default();
    code_name(&text).map(str::to_owned).ok_or_else(unsupported)
}

/// Debian's code name in the text of /etc/os-release.
fn code_name(text: &str) -> Option<&str> {
    let value = |name: &str| {
        let value = text.lines().find_map(|line| line.strip_prefix(name)?.strip_prefix('='));
        value.map(|value| value.trim_matches('"'))
    };
    let name = value("VERSION_CODENAME").filter(|name| name.bytes().all(|byte| byte.is_ascii_lowercase()));
    (value("ID") == Some("debian")).then_some(name?)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn only_debian_has_a_code_name_of_debians() {
        let debian = "PRETTY_NAME=\"Debian GNU/Linux 13 (trixie)\"\nVERSION_CODENAME=trixie\nID=debian\n";
        assert_eq!(code_name(debian), Some("trixie"));
        assert_eq!(code_name("ID=ubuntu\nID_LIKE=debian\nVERSION_CODENAME=noble\n"), None);
        assert_eq!(code_name("ID=debian\n"), None);
        assert_eq!(code_name("ID=debian\nVERSION_CODENAME=\"../sid\"\n"), None);
    }
}
