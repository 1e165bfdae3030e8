//! The folder's layout: the one place that knows where `run.sh` finds what.

use std::fs;
use std::io;
use std::path::{Path, PathBuf};
use std::process::{Command, Stdio};

/// The script and what it consists of.
const SCRIPTS: [(&str, &str); 8] = [
    ("run.sh", include_str!("../../gpu/run.sh")),
    ("measure/__main__.py", include_str!("../../gpu/measure/__main__.py")),
    ("measure/kernels.py", include_str!("../../gpu/measure/kernels.py")),
    ("measure/machine.py", include_str!("../../gpu/measure/machine.py")),
    ("measure/program.py", include_str!("../../gpu/measure/program.py")),
    ("measure/sizes.py", include_str!("../../gpu/measure/sizes.py")),
    ("measure/steps.py", include_str!("../../gpu/measure/steps.py")),
    ("measure/toolkit.py", include_str!("../../gpu/measure/toolkit.py")),
];
/// What a folder that was made here has; written first, so that one that was left half made can be renewed.
const MARK: &str = "build.json";

/// The golden files that conformance reads, of the folder of all of them.
const GOLDEN: [&str; 2] = ["mixed", "peft"];

/// The folders in it that are made here. What else lies in it are results.
pub(super) const MADE: [&str; 6] = ["bin", "lib", "kernels", "measure", "peers", "golden"];

/// What the folder is made of.
pub(super) struct Contents<'a> {
    /// The `flora` command.
    pub(super) flora: &'a Path,
    /// The conformance tests' program.
    pub(super) conformance: &'a Path,
    /// The program of the driver's tests.
    pub(super) launches: &'a Path,
    /// The library that stands in for NVRTC.
    pub(super) nvrtc: &'a Path,
    /// The library that plays CUDA's driver in a rehearsal.
    pub(super) emulated: &'a Path,
    /// A folder of Python programs to compare with.
    pub(super) peers: &'a Path,
    /// The folder of PEFT's adapters and outputs.
    pub(super) golden: &'a Path,
    /// What the programs were built from, as JSON.
    pub(super) build: &'a str,
}

/// Why the folder was not made.
#[derive(Debug, thiserror::Error)]
pub(super) enum FolderError {
    #[error("{0} holds something else; name an empty folder, or one that `cargo xtask gpu` made")]
    Foreign(PathBuf),
    #[error("can't write {path}: {source}")]
    Io { path: PathBuf, source: io::Error },
}

/// Makes the folder, or renews it: results in it stay. How many bytes its files have without them.
///
/// # Errors
/// [`FolderError::Foreign`] for a folder with files that has none of ours, and what the file system answers.
pub(super) fn make(contents: &Contents<'_>, out: &Path) -> Result<u64, FolderError> {
    let mark = out.join(MARK);
    let empty = !out.exists() || at(out, out.read_dir())?.next().is_none();
    if !empty && !mark.is_file() {
        return Err(FolderError::Foreign(out.to_owned()));
    }
    // Kernels that were kept are of the programs that were there.
    for part in MADE {
        let part = out.join(part);
        if part.exists() {
            at(&part, fs::remove_dir_all(&part))?;
        }
    }
    let mut bytes = write(&mark, contents.build)?;
    bytes += program(contents.flora, &out.join("bin/flora"))?;
    bytes += program(contents.conformance, &out.join("bin/conformance"))?;
    bytes += program(contents.launches, &out.join("bin/launches"))?;
    bytes += program(contents.nvrtc, &out.join("lib/libnvrtc.so"))?;
    bytes += program(contents.emulated, &out.join("lib/libflora_emulated_driver.so"))?;
    bytes += tree(contents.peers, &out.join("peers"), &|file| file.extension().is_some_and(|end| end == "py"))?;
    for part in GOLDEN {
        bytes += tree(&contents.golden.join(part), &out.join("golden").join(part), &|_| true)?;
    }
    for (name, text) in SCRIPTS {
        bytes += write(&out.join(name), text)?;
    }
    Ok(bytes)
}

/// Copies a program or a library, without its symbols where the tool for that is there: they are a quarter of it.
fn program(from: &Path, to: &Path) -> Result<u64, FolderError> {
    parent(to)?;
    let stripped =
        Command::new("strip").arg("--strip-unneeded").arg("-o").arg(to).arg(from).stderr(Stdio::null()).status();
    if !stripped.is_ok_and(|status| status.success()) {
        at(to, fs::copy(from, to))?;
    }
    Ok(at(to, to.metadata())?.len())
}

/// Copies the files below a folder that `wanted` says yes to.
fn tree(from: &Path, to: &Path, wanted: &dyn Fn(&Path) -> bool) -> Result<u64, FolderError> {
    let mut bytes = 0;
    for entry in at(from, from.read_dir())? {
        let entry = at(from, entry)?;
        let (path, copy) = (entry.path(), to.join(entry.file_name()));
        if path.is_dir() {
            bytes += tree(&path, &copy, wanted)?;
        } else if wanted(&path) {
            parent(&copy)?;
            bytes += at(&copy, fs::copy(&path, &copy))?;
        }
    }
    Ok(bytes)
}

fn write(path: &Path, text: &str) -> Result<u64, FolderError> {
    parent(path)?;
    at(path, fs::write(path, text))?;
    Ok(text.len() as u64)
}

fn parent(path: &Path) -> Result<(), FolderError> {
    path.parent().map_or(Ok(()), |folder| at(folder, fs::create_dir_all(folder)))
}

/// Says which path an error is about.
fn at<T>(path: &Path, result: io::Result<T>) -> Result<T, FolderError> {
    result.map_err(|source| FolderError::Io { path: path.to_owned(), source })
}

#[cfg(test)]
mod tests {
    use super::*;

    /// Every file below a folder, relative to it, in order.
    fn files(folder: &Path) -> Vec<String> {
        fn add(folder: &Path, root: &Path, files: &mut Vec<String>) {
            for entry in folder.read_dir().unwrap() {
                let path = entry.unwrap().path();
                if path.is_dir() {
                    add(&path, root, files);
                } else {
                    files.push(path.strip_prefix(root).unwrap().display().to_string());
                }
            }
        }
        let mut found = Vec::new();
        add(folder, folder, &mut found);
        found.sort();
        found
    }

    fn sources(root: &Path) {
        for (name, text) in [
            ("flora", "the command"),
            ("conformance-0123", "the tests"),
            ("launches-0123", "the driver's tests"),
            ("libflora_nvrtc.so", "the library"),
            ("libflora_emulated_driver.so", "the driver"),
            ("peers/torch_lora.py", "python"),
            ("peers/__pycache__/torch_lora.pyc", "compiled"),
            ("golden/mixed/config.json", "{}"),
            ("golden/peft/lora/adapter/adapter_config.json", "{}"),
            ("golden/texts/prompts.json", "{}"),
        ] {
            write(&root.join(name), text).unwrap();
        }
    }

    fn make_from(root: &Path, out: &Path) -> Result<u64, FolderError> {
        let [flora, conformance, launches] = ["flora", "conformance-0123", "launches-0123"].map(|name| root.join(name));
        let [nvrtc, emulated] = ["libflora_nvrtc.so", "libflora_emulated_driver.so"].map(|name| root.join(name));
        let [peers, golden] = ["peers", "golden"].map(|name| root.join(name));
        let contents = Contents {
            flora: &flora,
            conformance: &conformance,
            launches: &launches,
            nvrtc: &nvrtc,
            emulated: &emulated,
            peers: &peers,
            golden: &golden,
            build: "{}",
        };
        make(&contents, out)
    }

    #[test]
    fn the_folder_has_what_the_script_needs_and_is_renewed() {
        let root = tempfile::tempdir().unwrap();
        sources(root.path());
        let out = root.path().join("new/gpu");
        let expected = [
            "bin/conformance",
            "bin/flora",
            "bin/launches",
            "build.json",
            "golden/mixed/config.json",
            "golden/peft/lora/adapter/adapter_config.json",
            "lib/libflora_emulated_driver.so",
            "lib/libnvrtc.so",
            "measure/__main__.py",
            "measure/kernels.py",
            "measure/machine.py",
            "measure/program.py",
            "measure/sizes.py",
            "measure/steps.py",
            "measure/toolkit.py",
            "peers/torch_lora.py",
            "run.sh",
        ];
        let bytes = make_from(root.path(), &out).unwrap();
        assert_eq!(files(&out), expected);
        let sizes = expected.map(|name| out.join(name).metadata().unwrap().len());
        assert_eq!(bytes, sizes.iter().sum::<u64>());

        write(&out.join("golden/old/config.json"), "{}").unwrap();
        write(&out.join("kernels/0123.sm_90a.cubin"), "of the earlier command").unwrap();
        write(&out.join("results/report.json"), "{}").unwrap();
        fs::write(root.path().join("flora"), "a later command").unwrap();
        make_from(root.path(), &out).unwrap();
        assert_eq!(files(&out).len(), expected.len() + 1, "results stay, what is no longer there goes");
        assert_eq!(fs::read_to_string(out.join("bin/flora")).unwrap(), "a later command");
    }

    #[test]
    fn every_script_of_the_folder_is_copied() {
        let scripts = files(&Path::new(env!("CARGO_MANIFEST_DIR")).join("gpu"));
        let scripts: Vec<_> = scripts.into_iter().filter(|name| !name.contains("__pycache__")).collect();
        let mut copied = SCRIPTS.map(|(name, _)| name);
        copied.sort_unstable();
        assert_eq!(scripts, copied);
    }

    #[test]
    fn a_folder_of_somebody_else_is_left_alone() {
        let root = tempfile::tempdir().unwrap();
        sources(root.path());
        let out = root.path().join("golden/peft");
        assert!(matches!(make_from(root.path(), &out), Err(FolderError::Foreign(path)) if path == out));
        assert_eq!(files(&out), ["lora/adapter/adapter_config.json"]);
    }
}
