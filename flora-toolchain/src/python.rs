//! Packages that Python programs of this project import: pinned with all that they need, and kept out of the machine's own.

use std::fs;
use std::path::{Path, PathBuf};
use std::process::Command;

use sha2::{Digest, Sha256};

use crate::cache::{Cache, from_environment};
use crate::error::FetchError;
use crate::pip;
use crate::program::Fetch;
use crate::wheel::hexadecimal;

/// Asks Python for its version, and for what its binary packages are built for.
const ABOUT: &str = "import sys, sysconfig; \
    print(sys.version_info >= (3, 11), sys.implementation.cache_tag, sysconfig.get_platform())";

/// Pinned packages for Python.
struct Requirements {
    /// For people, and the beginning of the entry in the cache folder.
    name: &'static str,
    /// What pip installs, with the SHA-256 of every wheel.
    text: &'static str,
}

/// The client library of the OpenAI API, which the server is tested with.
const OPENAI: Requirements = Requirements { name: "openai-client", text: include_str!("python/openai.txt") };

/// lm-eval, which scores models through the server, with what it imports for that: no PyTorch, no transformers, and not what only
/// other metrics need.
const LM_EVAL: Requirements = Requirements { name: "lm-eval", text: include_str!("python/lm_eval.txt") };

/// What flora's own Python package is tested with: pytest and NumPy.
const PYTEST: Requirements = Requirements { name: "pytest", text: include_str!("python/pytest.txt") };

/// The same with PyTorch, transformers and PEFT.
const TORCH: Requirements = Requirements { name: "torch", text: include_str!("python/torch.txt") };

/// What its wheels are built with.
const MATURIN: Requirements = Requirements { name: "maturin", text: include_str!("python/maturin.txt") };

/// The machine's Python with pinned packages from the cache folder.
#[derive(Debug, Clone)]
pub struct PythonPackages {
    interpreter: &'static str,
    folder: PathBuf,
}

impl PythonPackages {
    /// A command that starts Python; the caller adds the program.
    #[must_use]
    pub fn command(&self) -> Command {
        let mut command = Command::new(self.interpreter);
        command.env("PYTHONPATH", &self.folder).env("PYTHONNOUSERSITE", "1");
        command
    }

    /// The same with the packages of another folder before its own.
    #[must_use]
    pub fn command_after(&self, folder: &Path) -> Command {
        let mut command = self.command();
        // A folder's path that can't be joined with another's has a separator in it; it can't be Python's then.
        let paths = std::env::join_paths([folder, &self.folder]).unwrap_or_else(|_| folder.into());
        command.env("PYTHONPATH", paths);
        command
    }

    /// Where the packages are.
    #[must_use]
    pub fn folder(&self) -> &Path {
        &self.folder
    }
}

/// Python with the `openai` package, fetched into the cache folder (6 MB) on first use.
///
/// # Errors
/// Any [`FetchError`]; [`FetchError::Offline`] without a network, [`FetchError::MissingProgram`] without Python or pip.
pub fn openai_client() -> Result<PythonPackages, FetchError> {
    OPENAI.ensure(&Cache::open()?)
}

/// The same as the environment variable `FLORA_OPENAI` has it, for tests: `required` fetches it and fails where that fails,
/// `absent` is none, and without it there is what was fetched before.
///
/// # Errors
/// As [`openai_client`], with `required` only.
pub fn openai_client_from_environment() -> Result<Option<PythonPackages>, FetchError> {
    from_environment("FLORA_OPENAI", openai_client, || OPENAI.installed(&Cache::open().ok()?))
}

/// Python with the `lm_eval` package, fetched into the cache folder (some 130 MB, 490 unpacked) on first use.
///
/// # Errors
/// As [`openai_client`].
pub fn lm_eval() -> Result<PythonPackages, FetchError> {
    LM_EVAL.ensure(&Cache::open()?)
}

/// The same as the environment variable `FLORA_LM_EVAL` has it, for tests, as [`openai_client_from_environment`] reads its own.
///
/// # Errors
/// As [`openai_client`], with `required` only.
pub fn lm_eval_from_environment() -> Result<Option<PythonPackages>, FetchError> {
    from_environment("FLORA_LM_EVAL", lm_eval, || LM_EVAL.installed(&Cache::open().ok()?))
}

/// Python with `pytest` and `numpy`, fetched into the cache folder (some 20 MB) on first use.
///
/// # Errors
/// As [`openai_client`].
pub fn pytest() -> Result<PythonPackages, FetchError> {
    PYTEST.ensure(&Cache::open()?)
}

/// A command that starts a Python with PyTorch, transformers, PEFT and pytest, and the packages of `folder` before them, as the
/// environment variable `FLORA_TORCH` has it: `required` fetches them (some 4 GB) and fails where that fails, `absent` is none, a path is
/// that of an interpreter that has them, and without it there is what was fetched before.
///
/// # Errors
/// As [`openai_client`], with `required` only.
pub fn torch_from_environment(folder: &Path) -> Result<Option<Command>, FetchError> {
    const VARIABLE: &str = "FLORA_TORCH";
    if let Some(path) = std::env::var_os(VARIABLE).filter(|said| Path::new(said).components().count() > 1) {
        let mut command = Command::new(path);
        command.env("PYTHONPATH", folder).env("PYTHONNOUSERSITE", "1");
        return Ok(Some(command));
    }
    let packages =
        from_environment(VARIABLE, || TORCH.ensure(&Cache::open()?), || TORCH.installed(&Cache::open().ok()?));
    Ok(packages?.map(|packages| packages.command_after(folder)))
}

/// Python with `maturin`, which builds wheels, fetched into the cache folder (some 10 MB) on first use.
///
/// # Errors
/// As [`openai_client`].
pub fn maturin() -> Result<PythonPackages, FetchError> {
    MATURIN.ensure(&Cache::open()?)
}

impl Requirements {
    /// The packages, fetched on first use.
    fn ensure(&self, cache: &Cache) -> Result<PythonPackages, FetchError> {
        let (interpreter, entry) = self.entry()?;
        let folder = cache.install(&entry, |folder| {
            let work = folder.join("pip");
            fs::create_dir(&work).map_err(FetchError::io("create", &work, self.name))?;
            let list = work.join("requirements.txt");
            fs::write(&list, self.text).map_err(FetchError::io("write", &list, self.name))?;
            let fetch = Fetch::new(self.name, folder, None);
            // The list has all that is needed, and for lm-eval no more.
            let arguments =
                ["--no-deps".as_ref(), "--require-hashes".as_ref(), "--requirement".as_ref(), list.as_os_str()];
            let target = ["--target".as_ref(), folder.as_os_str()];
            pip::run(&fetch, self.name, "install", &work, arguments.into_iter().chain(target))?;
            fs::remove_dir_all(&work).map_err(FetchError::io("remove", &work, self.name))
        })?;
        Ok(PythonPackages { interpreter, folder })
    }

    /// The packages, if they were fetched before.
    fn installed(&self, cache: &Cache) -> Option<PythonPackages> {
        let (interpreter, entry) = self.entry().ok()?;
        Some(PythonPackages { interpreter, folder: cache.installed(&entry)? })
    }

    /// The interpreter, and the entry in the cache folder: other packages, and another Python, are another entry.
    fn entry(&self) -> Result<(&'static str, String), FetchError> {
        pip::either_name(|interpreter| {
            let output = match Command::new(interpreter).args(["-c", ABOUT]).output() {
                Ok(output) => output,
                Err(error) if error.kind() == std::io::ErrorKind::NotFound => {
                    return Err(pip::missing_python(self.name));
                }
                Err(error) => return Err(FetchError::io("start", interpreter, self.name)(error)),
            };
            let about = String::from_utf8_lossy(&output.stdout).into_owned();
            let Some(("True", tag)) = about.trim().split_once(' ') else {
                return Err(FetchError::Unsupported { what: self.name, needs: "Python 3.11 or newer" });
            };
            let digest = hexadecimal(&Sha256::digest(self.text));
            Ok((interpreter, format!("{}-{}-{}", self.name, &digest[..12], tag.replace(' ', "-"))))
        })
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn every_package_is_pinned_by_version_and_digest() {
        for (requirements, package, least) in [
            (OPENAI, "openai", 6),
            (LM_EVAL, "lm-eval", 40),
            (PYTEST, "pytest", 6),
            (TORCH, "torch", 30),
            (MATURIN, "maturin", 1),
        ] {
            let lines = requirements.text.lines();
            let packages = lines.filter(|line| line.starts_with(|first: char| first.is_ascii_lowercase()));
            let mut count = 0;
            for line in packages {
                assert!(line.contains("==") && line.ends_with('\\'), "{line}");
                count += 1;
            }
            assert!(count >= least, "{count}");
            assert!(requirements.text.contains(&format!("\n{package}==")));
        }
    }
}
