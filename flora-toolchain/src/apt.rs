//! Debian's packages, unpacked into a folder: nothing is installed, and what is installed doesn't matter.

use std::fs;
use std::path::{Path, PathBuf};
use std::process::Command;

use crate::error::FetchError;
use crate::program::Fetch;

/// The key ring that Debian's releases are signed with.
const KEYRING: &str = "/usr/share/keyrings/debian-archive-keyring.gpg";

/// Packages of one release, with everything they depend on.
pub(crate) struct Packages<'a> {
    /// What is being fetched, for people.
    pub(crate) what: &'static str,
    /// The release's code name: the names `stable` and `testing` move on to other versions.
    pub(crate) suite: &'a str,
    /// The packages.
    pub(crate) names: &'a [&'a str],
    /// What they depend on, but is the system's own.
    pub(crate) without: &'a [&'a str],
    /// What to do where a program of Debian's is missing.
    pub(crate) mend: &'static str,
}

impl Packages<'_> {
    /// Fills `folder` with the unpacked packages.
    ///
    /// # Errors
    /// [`FetchError::Unsupported`] and [`FetchError::MissingProgram`] where this is no Debian, [`FetchError::Offline`] without a
    /// network, and whatever else keeps them from being unpacked.
    pub(crate) fn unpack(&self, folder: &Path) -> Result<(), FetchError> {
        let fetch = Fetch::new(self.what, folder, None);
        let apt = Apt { packages: self, fetch: &fetch, work: folder.join("apt") };
        for package in apt.download()? {
            let mut unpack = Command::new("dpkg-deb");
            unpack.arg("--extract").arg(package).arg(folder);
            fetch.run(unpack, self.missing("dpkg-deb"))?;
        }
        fs::remove_dir_all(&apt.work).map_err(FetchError::io("remove", &apt.work, self.what))
    }

    /// Whether a file is of a package to leave out: `libc6_2.41-12_amd64.deb` is of `libc6`.
    fn leaves_out(&self, file: &Path) -> bool {
        let name = file.file_name().map(|name| name.to_string_lossy().into_owned()).unwrap_or_default();
        name.split_once('_').is_some_and(|(package, _)| self.without.contains(&package))
    }

    /// The error for a program of Debian's that is not there.
    fn missing(&self, program: &'static str) -> FetchError {
        FetchError::MissingProgram { what: self.what.to_owned(), program, mend: self.mend }
    }
}

/// apt-get with a configuration, lists and an archive of its own, so that the system's are neither changed nor needed.
struct Apt<'a> {
    packages: &'a Packages<'a>,
    fetch: &'a Fetch<'a>,
    work: PathBuf,
}

impl Apt<'_> {
    /// Downloads the packages with everything they depend on; gives the files.
    fn download(&self) -> Result<Vec<PathBuf>, FetchError> {
        for folder in ["lists/partial", "archives/partial"] {
            let folder = self.work.join(folder);
            fs::create_dir_all(&folder).map_err(FetchError::io("create", &folder, self.packages.what))?;
        }
        let mut outcome =
            Err(FetchError::Unsupported { what: self.packages.what, needs: "a Debian whose apt knows a mirror" });
        for mirror in self.mirrors()? {
            outcome = self.update(&mirror);
            // Another mirror is no help where there is no network.
            if outcome.as_ref().map_or_else(FetchError::is_offline, |()| true) {
                break;
            }
        }
        outcome?;
        let install = ["-y", "--no-install-recommends", "--download-only", "install"];
        self.run(install.iter().chain(self.packages.names))?;
        let archives = self.work.join("archives");
        let entries = fs::read_dir(&archives).map_err(FetchError::io("list", &archives, self.packages.what))?;
        let mut packages: Vec<_> = entries.flatten().map(|entry| entry.path()).collect();
        packages.retain(|path| path.extension().is_some_and(|extension| extension == "deb"));
        packages.retain(|path| !self.packages.leaves_out(path));
        packages.sort();
        Ok(packages)
    }

    /// The mirrors that this system's apt is set up with, its own release's first. One of a third party may be among
    /// them, which the check of the signature then turns down.
    fn mirrors(&self) -> Result<Vec<String>, FetchError> {
        if !Path::new(KEYRING).is_file() {
            return Err(FetchError::Unsupported {
                what: self.packages.what,
                needs: "Debian, with its debian-archive-keyring",
            });
        }
        let mut list = Command::new("apt-get");
        // Without release information the targets are listed even where no list was downloaded yet.
        list.args([
            "indextargets",
            "--no-release-info",
            "--format",
            "$(COMPONENT) $(REPO_URI)",
            "Created-By: Packages",
        ]);
        let output = self.fetch.run(list, self.packages.missing("apt-get"))?;
        let mut mirrors: Vec<String> = Vec::new();
        for line in String::from_utf8_lossy(&output.stdout).lines() {
            if let Some(mirror) = line.strip_prefix("main ")
                && !mirrors.iter().any(|known| known == mirror)
            {
                mirrors.push(mirror.to_owned());
            }
        }
        Ok(mirrors)
    }

    /// Fetches the release's package lists from `mirror`.
    fn update(&self, mirror: &str) -> Result<(), FetchError> {
        let (sources, suite) = (self.work.join("sources.list"), self.packages.suite);
        fs::write(&sources, format!("deb [arch=amd64 signed-by={KEYRING}] {mirror} {suite} main\n"))
            .map_err(FetchError::io("write", &sources, self.packages.what))?;
        // Without this a mirror that can't be reached is but a warning.
        self.run(&["-o", "APT::Update::Error-Mode=any", "update"])
    }

    /// Runs apt-get with the private configuration.
    fn run<'s>(&self, arguments: impl IntoIterator<Item = &'s &'s str>) -> Result<(), FetchError> {
        let here = |name: &str| self.work.join(name).display().to_string();
        let mut command = Command::new("apt-get");
        command.arg("-qq");
        for option in [
            format!("Dir::Etc::sourcelist={}", here("sources.list")),
            "Dir::Etc::sourceparts=/dev/null".to_owned(),
            "Dir::Etc::preferences=/dev/null".to_owned(),
            "Dir::Etc::preferencesparts=/dev/null".to_owned(),
            format!("Dir::State::lists={}", here("lists")),
            // No package counts as installed, so that all of them are downloaded.
            "Dir::State::status=/dev/null".to_owned(),
            format!("Dir::State::extended_states={}", here("extended_states")),
            format!("Dir::Cache::archives={}", here("archives")),
            "Dir::Cache::pkgcache=".to_owned(),
            "Dir::Cache::srcpkgcache=".to_owned(),
            // The folder belongs to the user who runs this, root or not.
            "APT::Sandbox::User=".to_owned(),
            "Debug::NoLocking=true".to_owned(),
            "APT::Architecture=amd64".to_owned(),
            "Acquire::Languages=none".to_owned(),
            "Acquire::Retries=2".to_owned(),
            "Acquire::http::Timeout=20".to_owned(),
            "Acquire::https::Timeout=20".to_owned(),
        ] {
            command.arg("-o").arg(option);
        }
        command.args(arguments);
        self.fetch.run(command, self.packages.missing("apt-get")).map(drop)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_package_is_left_out_by_its_whole_name() {
        let packages = Packages { what: "", suite: "", names: &[], without: &["libc6"], mend: "" };
        let leaves_out = |file: &str| packages.leaves_out(Path::new(file));
        assert!(leaves_out("archives/libc6_2.41-12_amd64.deb"));
        assert!(!leaves_out("archives/libc6-dev_2.41-12_amd64.deb"));
        assert!(!leaves_out("archives/libnss3_2%3a3.110-1_amd64.deb"));
    }
}
