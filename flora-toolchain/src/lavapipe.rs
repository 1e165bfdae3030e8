//! Software Vulkan with cooperative matrices, so that tensor-core kernels run on a machine without a GPU.
//!
//! Mesa's lavapipe has `VK_KHR_cooperative_matrix` since version 26, which no stable Debian ships. It is therefore
//! unpacked from Debian's next release into the cache folder together with every library it needs, its C library
//! included, and never installed: a program is started through that tree's own loader and sees nothing else of it.

use std::fs;
use std::path::{Path, PathBuf};
use std::process::Command;

use crate::apt::Packages;
use crate::cache::Cache;
use crate::error::FetchError;

/// The Debian release that the packages come from: the first with Mesa 26. A code name, because the name `testing`
/// moves on to other versions.
const SUITE: &str = "forky";
/// Its packages: the driver, the Vulkan loader, and the C library they were built for.
const PACKAGES: [&str; 3] = ["mesa-vulkan-drivers", "libvulkan1", "libc6"];
/// Where a release's 64-bit libraries lie.
const LIBRARIES: &str = "usr/lib/x86_64-linux-gnu";
/// Lavapipe's manifest, put beside the libraries.
const MANIFEST: &str = "lvp_icd.json";
/// The entry in the cache folder.
const ENTRY: &str = "lavapipe-forky";
/// What is being fetched, for people.
const WHAT: &str = "lavapipe (Mesa's software Vulkan)";
/// What to do where a program of Debian's is missing.
const MEND: &str =
    "it is part of Debian; elsewhere run on a GPU, or install Mesa 26 or newer and run without lavapipe's runner";

/// An unpacked lavapipe.
#[derive(Debug, Clone)]
pub struct Lavapipe {
    libraries: PathBuf,
}

impl Lavapipe {
    /// Lavapipe from the cache folder, fetched into it (70 MB) on first use.
    ///
    /// # Errors
    /// [`FetchError::Unsupported`] where there is no Debian on x86-64, [`FetchError::Offline`] without a network, and
    /// whatever else keeps it from being unpacked.
    pub fn ensure() -> Result<Self, FetchError> {
        Self::ensure_in(&Cache::open()?)
    }

    /// The same in a cache of the caller's choice.
    ///
    /// # Errors
    /// As [`Lavapipe::ensure`].
    pub fn ensure_in(cache: &Cache) -> Result<Self, FetchError> {
        if !cfg!(all(target_os = "linux", target_arch = "x86_64")) {
            return Err(FetchError::Unsupported { what: WHAT, needs: "Linux on x86-64" });
        }
        let folder = cache.install(ENTRY, fetch)?;
        Ok(Self { libraries: folder.join(LIBRARIES) })
    }

    /// A command that runs `program` (a path; the search path is not looked at) with lavapipe as its only Vulkan
    /// device. The caller adds the arguments.
    ///
    /// The program sees the loader as its own executable (`/proc/self/exe`). Programs it starts are ordinary again.
    #[must_use]
    pub fn command(&self, program: &Path) -> Command {
        let mut command = Command::new(self.libraries.join("ld-linux-x86-64.so.2"));
        command.arg("--library-path").arg(&self.libraries);
        // The loader searches its libraries for a name without a slash.
        command.arg(if program.components().count() == 1 { Path::new(".").join(program) } else { program.to_owned() });
        command.env("VK_DRIVER_FILES", self.libraries.join(MANIFEST));
        // Mesa asks for a folder to put sockets in, and warns without one.
        if std::env::var_os("XDG_RUNTIME_DIR").is_none() {
            command.env("XDG_RUNTIME_DIR", std::env::temp_dir());
        }
        command
    }
}

/// Fills `folder` with the unpacked packages.
fn fetch(folder: &Path) -> Result<(), FetchError> {
    let packages = Packages { what: WHAT, suite: SUITE, names: &PACKAGES, without: &[], mend: MEND };
    packages.unpack(folder)?;
    remove_other_drivers(&folder.join(LIBRARIES))?;
    write_manifest(folder)
}

/// Removes the drivers for hardware, most of what the package holds.
fn remove_other_drivers(libraries: &Path) -> Result<(), FetchError> {
    let entries = fs::read_dir(libraries).map_err(FetchError::io("list", libraries, WHAT))?;
    for entry in entries.flatten() {
        let name = entry.file_name().to_string_lossy().into_owned();
        if name.starts_with("libvulkan_") && name != "libvulkan_lvp.so" {
            fs::remove_file(entry.path()).map_err(FetchError::io("remove", entry.path(), WHAT))?;
        }
    }
    Ok(())
}

/// Puts lavapipe's manifest beside its library and has it name that, wherever the cache folder is moved to.
fn write_manifest(folder: &Path) -> Result<(), FetchError> {
    let from = folder.join("usr/share/vulkan/icd.d").join(MANIFEST);
    let to = folder.join(LIBRARIES).join(MANIFEST);
    let text = fs::read_to_string(&from).map_err(FetchError::io("read", &from, WHAT))?;
    let damaged = |detail: String| FetchError::Damaged { what: WHAT.to_owned(), detail };
    let mut manifest: serde_json::Value =
        serde_json::from_str(&text).map_err(|error| damaged(format!("{MANIFEST}: {error}")))?;
    match manifest.pointer_mut("/ICD/library_path") {
        Some(path) => *path = "./libvulkan_lvp.so".into(),
        None => return Err(damaged(format!("{MANIFEST} has no ICD.library_path"))),
    }
    fs::write(&to, manifest.to_string()).map_err(FetchError::io("write", &to, WHAT))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_program_is_started_through_the_trees_own_loader() {
        let lavapipe = Lavapipe { libraries: PathBuf::from("/cache/lib") };
        let arguments = |program: &str| {
            let command = lavapipe.command(Path::new(program));
            assert_eq!(command.get_program(), "/cache/lib/ld-linux-x86-64.so.2");
            let variables: Vec<_> = command.get_envs().collect();
            let manifest = Some("/cache/lib/lvp_icd.json".as_ref());
            assert!(variables.contains(&("VK_DRIVER_FILES".as_ref(), manifest)), "{variables:?}");
            command.get_args().map(|argument| argument.to_string_lossy().into_owned()).collect::<Vec<_>>()
        };
        assert_eq!(arguments("/a/program"), ["--library-path", "/cache/lib", "/a/program"]);
        assert_eq!(arguments("program"), ["--library-path", "/cache/lib", "./program"]);
    }

    #[test]
    fn the_manifest_names_the_library_beside_it() {
        let folder = tempfile::tempdir().unwrap();
        let from = folder.path().join("usr/share/vulkan/icd.d");
        fs::create_dir_all(&from).unwrap();
        fs::create_dir_all(folder.path().join(LIBRARIES)).unwrap();
        fs::write(from.join(MANIFEST), r#"{"ICD": {"api_version": "1.4", "library_path": "libvulkan_lvp.so"}}"#)
            .unwrap();
        write_manifest(folder.path()).unwrap();
        let text = fs::read_to_string(folder.path().join(LIBRARIES).join(MANIFEST)).unwrap();
        assert!(text.contains(r#""library_path":"./libvulkan_lvp.so""#), "{text}");

        fs::write(from.join(MANIFEST), "{}").unwrap();
        assert!(write_manifest(folder.path()).unwrap_err().to_string().contains("library_path"));
    }

    #[test]
    fn only_lavapipes_driver_stays() {
        let folder = tempfile::tempdir().unwrap();
        for name in ["libvulkan.so.1", "libvulkan_intel.so", "libvulkan_lvp.so", "libLLVM.so"] {
            fs::write(folder.path().join(name), "").unwrap();
        }
        remove_other_drivers(folder.path()).unwrap();
        let mut left: Vec<_> = fs::read_dir(folder.path()).unwrap().map(|entry| entry.unwrap().file_name()).collect();
        left.sort();
        assert_eq!(left, ["libLLVM.so", "libvulkan.so.1", "libvulkan_lvp.so"]);
    }
}
