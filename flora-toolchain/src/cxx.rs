//! The system's C++ compiler, which turns text into a library that a program loads.
//!
//! Libraries stay in the cache folder under a name that is a hash of all that went into them, so that the same text is compiled
//! once.

use std::ffi::OsString;
use std::fs;
use std::path::{Path, PathBuf};
use std::process::{Command, Output, Stdio};

use sha2::{Digest, Sha256};

use crate::cache::Cache;

/// Flags of every library. Products and sums are rounded each by itself, because what a compiler fuses depends on what stands beside
/// it.
const FLAGS: [&str; 9] = [
    "-std=c++17",
    "-x",
    "c++",
    "-march=native",
    "-ffp-contract=off",
    // Numbers are read as words and written as halves, as a card's compilers allow.
    "-fno-strict-aliasing",
    "-fPIC",
    "-shared",
    "-w",
];
/// The variable that tells a process which sanitizer it was started with.
const WATCHED: &str = "FLORA_SANITIZER";
/// The folder of the cache that holds libraries.
const ENTRY: &str = "libraries";

/// What watches a library while it runs.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
pub enum Sanitizer {
    /// Races: two accesses that nothing orders.
    Thread,
    /// Accesses beyond an object, of misaligned pointers, and shifts that C++ doesn't define.
    Address,
}

impl Sanitizer {
    /// Each, with its name.
    pub const ALL: [(&'static str, Self); 2] = [("thread", Self::Thread), ("address", Self::Address)];

    /// The sanitizer whose runtime this process was started with ([`CxxCompiler::watched`]).
    pub fn of_process() -> Option<Self> {
        std::env::var(WATCHED).ok()?.parse().ok()
    }

    /// Flags of a library that is watched.
    fn flags(self) -> &'static [&'static str] {
        match self {
            Self::Thread => &["-O1", "-g1", "-fsanitize=thread"],
            Self::Address => &["-O1", "-g1", "-fsanitize=address,alignment,shift", "-fno-sanitize-recover=all"],
        }
    }

    /// The library that a watched one needs.
    fn runtime(self) -> &'static str {
        match self {
            Self::Thread => "libtsan.so",
            Self::Address => "libasan.so",
        }
    }

    /// The variable that holds its options, and options for a program of which only some libraries are watched: the first report ends
    /// it.
    fn options(self) -> (&'static str, &'static str) {
        match self {
            Self::Thread => ("TSAN_OPTIONS", "halt_on_error=1:exitcode=66:ignore_interceptors_accesses=1"),
            Self::Address => ("ASAN_OPTIONS", "detect_leaks=0:exitcode=66:detect_stack_use_after_return=0"),
        }
    }
}

impl std::fmt::Display for Sanitizer {
    fn fmt(&self, formatter: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        let found = Self::ALL.iter().find(|(_, sanitizer)| sanitizer == self);
        formatter.pad(found.map_or("", |(name, _)| name))
    }
}

impl std::str::FromStr for Sanitizer {
    type Err = UnknownSanitizer;
    fn from_str(name: &str) -> Result<Self, UnknownSanitizer> {
        let found = Self::ALL.iter().find(|(known, _)| *known == name);
        found.map(|(_, sanitizer)| *sanitizer).ok_or_else(|| UnknownSanitizer(name.to_owned()))
    }
}

/// The name is no sanitizer's.
#[derive(Clone, Debug, PartialEq, Eq, thiserror::Error)]
#[error("unknown sanitizer `{0}`; use thread or address")]
pub struct UnknownSanitizer(pub String);

/// Why no library came out.
#[derive(Debug, thiserror::Error)]
#[non_exhaustive]
pub enum CxxError {
    /// No compiler.
    #[error("no C++ compiler: `{program}` can't be started ({source}); install g++ or name another one in CXX")]
    Missing {
        /// What was tried.
        program: String,
        /// What the system answered.
        source: std::io::Error,
    },
    /// The compiler refuses the text.
    #[error("`{program}` refuses a source: {log}")]
    Source {
        /// The compiler.
        program: String,
        /// Its first words.
        log: String,
    },
    /// The folder for libraries can't be used.
    #[error("can't keep libraries in {path}: {source}; set FLORA_CACHE to a folder that can be written", path = path.display())]
    Folder {
        /// The folder or file.
        path: PathBuf,
        /// What the system answered.
        source: std::io::Error,
    },
    /// The compiler has no runtime for that sanitizer.
    #[error("`{program}` has no {library}; install GCC's sanitizers")]
    NoSanitizer {
        /// The compiler.
        program: String,
        /// The library.
        library: &'static str,
    },
}

/// A C++ compiler that works.
#[derive(Clone, Debug)]
pub struct CxxCompiler {
    program: OsString,
    /// What it says of itself: part of a library's hash.
    version: String,
    folder: PathBuf,
}

impl CxxCompiler {
    /// The compiler that `CXX` names, or `g++`; libraries go to the cache folder, or to a temporary one where there is none.
    ///
    /// # Errors
    /// It can't be started.
    pub fn find() -> Result<Self, CxxError> {
        let program = std::env::var_os("CXX").filter(|name| !name.is_empty()).unwrap_or_else(|| "g++".into());
        let output = run(&program, ["--version"])?;
        // `-march=native` is another thing on another processor: a cache folder may be carried to one.
        let native = run(&program, ["-march=native", "-Q", "--help=target"])?;
        let version = format!("{}{}", String::from_utf8_lossy(&output.stdout), String::from_utf8_lossy(&native.stdout));
        let root = Cache::open().map_or_else(|_| std::env::temp_dir().join("flora"), |cache| cache.root().to_owned());
        Ok(Self { program, version, folder: root.join(ENTRY) })
    }

    /// As [`Self::find`], with the runtime of every sanitizer.
    ///
    /// # Errors
    /// One of these isn't there.
    pub fn ensure() -> Result<Self, CxxError> {
        let compiler = Self::find()?;
        for (_, sanitizer) in Sanitizer::ALL {
            compiler.watched(sanitizer, Path::new(""))?;
        }
        Ok(compiler)
    }

    /// The compiler as tests get it, with its sanitizers: `FLORA_CXX` says whether it has to be there (`required`) or is not (`absent`);
    /// without the variable there is what is installed.
    ///
    /// # Errors
    /// What is required isn't there.
    pub fn from_environment() -> Result<Option<Self>, CxxError> {
        match std::env::var("FLORA_CXX").as_deref() {
            Ok("required") => Self::ensure().map(Some),
            Ok("absent") => Ok(None),
            _ => Ok(Self::ensure().ok()),
        }
    }

    /// What the compiler calls itself.
    pub fn name(&self) -> &str {
        self.version.lines().next().unwrap_or_default()
    }

    /// The library made of `source`, which may include `headers` (name, text).
    ///
    /// # Errors
    /// The text isn't C++; the folder for libraries can't be written.
    pub fn library(
        &self,
        source: &str,
        headers: &[(&str, &str)],
        sanitizer: Option<Sanitizer>,
    ) -> Result<PathBuf, CxxError> {
        let flags = sanitizer.map_or(&["-O2"][..], Sanitizer::flags);
        let mut hash = Sha256::new();
        let parts = headers.iter().flat_map(|(name, text)| [*name, *text]);
        for part in parts.chain([source, &self.version]).chain(flags.iter().copied()).chain(FLAGS) {
            hash.update((part.len() as u64).to_le_bytes());
            hash.update(part);
        }
        let hash: String = hash.finalize().iter().map(|byte| format!("{byte:02x}")).collect();
        let library = self.folder.join(format!("{hash}.so"));
        if library.is_file() {
            return Ok(library);
        }
        let failed = |path: &Path| {
            let path = path.to_owned();
            move |source| CxxError::Folder { path, source }
        };
        fs::create_dir_all(&self.folder).map_err(failed(&self.folder))?;
        let part = tempfile::tempdir_in(&self.folder).map_err(failed(&self.folder))?;
        for (name, text) in headers.iter().chain([&("source.cpp", source)]) {
            let path = part.path().join(name);
            fs::write(&path, text).map_err(failed(&path))?;
        }
        let made = part.path().join("library.so");
        let mut arguments: Vec<OsString> = FLAGS.iter().chain(flags).map(Into::into).collect();
        arguments.extend(["-I".into(), part.path().into(), "-o".into(), made.clone().into()]);
        arguments.push(part.path().join("source.cpp").into());
        let output = run(&self.program, arguments)?;
        if !output.status.success() {
            let log = String::from_utf8_lossy(&output.stderr);
            let errors = log.lines().filter(|line| line.contains("error:"));
            let log = errors.take(3).collect::<Vec<_>>().join("; ");
            return Err(CxxError::Source { program: self.program.to_string_lossy().into_owned(), log });
        }
        fs::rename(&made, &library).map_err(failed(&library))?;
        Ok(library)
    }

    /// A command that runs `program` with the runtime of `sanitizer`, without which no library that is watched can be loaded; there
    /// [`Sanitizer::of_process`] knows it.
    ///
    /// # Errors
    /// The compiler has no such runtime.
    pub fn watched(&self, sanitizer: Sanitizer, program: &Path) -> Result<Command, CxxError> {
        let library = sanitizer.runtime();
        let output = run(&self.program, [format!("-print-file-name={library}")])?;
        let path = PathBuf::from(String::from_utf8_lossy(&output.stdout).trim());
        // A name comes back as it went in where there is no such file.
        if !path.is_absolute() {
            return Err(CxxError::NoSanitizer { program: self.program.to_string_lossy().into_owned(), library });
        }
        let mut command = Command::new(program);
        let (variable, options) = sanitizer.options();
        command.env("LD_PRELOAD", path).env(variable, options).env(WATCHED, sanitizer.to_string());
        Ok(command)
    }
}

fn run(
    program: &OsString,
    arguments: impl IntoIterator<Item = impl AsRef<std::ffi::OsStr>>,
) -> Result<Output, CxxError> {
    let mut command = Command::new(program);
    // A sanitizer of this process isn't the compiler's.
    command.args(arguments).env("LC_ALL", "C").env_remove("LD_PRELOAD").stdin(Stdio::null());
    command.output().map_err(|source| CxxError::Missing { program: program.to_string_lossy().into_owned(), source })
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_library_is_made_once_and_a_wrong_source_says_why() {
        let Some(compiler) = CxxCompiler::from_environment().unwrap() else {
            println!("NOT RUN: there is no C++ compiler with GCC's sanitizers");
            return;
        };
        let folder = tempfile::tempdir().unwrap();
        let compiler = CxxCompiler { folder: folder.path().to_owned(), ..compiler };
        let headers = [("seven.h", "const int seven = 7;")];
        let source = "#include <seven.h>\nextern \"C\" int seven_of() { return seven; }";
        let library = compiler.library(source, &headers, None).unwrap();
        assert_eq!(compiler.library(source, &headers, None).unwrap(), library);
        assert_ne!(compiler.library(source, &[("seven.h", "const int seven = 8;")], None).unwrap(), library);
        // SAFETY: the library has no constructors.
        let seven = unsafe {
            let library = libloading::Library::new(&library).unwrap();
            library.get::<extern "C" fn() -> i32>(b"seven_of").unwrap()()
        };
        assert_eq!(seven, 7);
        let error = compiler.library("int x = y;", &[], None).unwrap_err();
        assert!(
            error.to_string().contains("‘y’ was not declared") || error.to_string().contains("'y' was not declared"),
            "{error}"
        );
        let left = fs::read_dir(folder.path()).unwrap().count();
        assert_eq!(left, 2, "only libraries stay");
    }
}
