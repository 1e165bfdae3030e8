//! Where tests run: on the card that `FLORA_TEST_DEVICE` names (`cuda`), else on cards that the processor plays, in a process of their own
//! that finds the emulated driver before any other.

use std::os::unix::fs::symlink;
use std::path::PathBuf;
use std::process::Command;

use flora_codegen::target::Capability;
use flora_devices::open;
use flora_driver::{Card, Includes, KernelCache, Kernels};
use flora_runtime::Device;
use flora_toolchain::CxxCompiler;

/// Tells a process that it has the emulated driver.
const PLAYED: &str = "FLORA_TEST_PLAYED";
/// Names the emulated driver's library, where it isn't beside this program.
const LIBRARY: &str = "FLORA_EMULATED_DRIVER";
const FILE: &str = "libflora_emulated_driver.so";

/// A card, and flora's own device on it.
pub(crate) struct Played {
    pub(crate) card: Card,
    pub(crate) device: Device,
    /// Whether it is no card at all.
    pub(crate) is_emulated: bool,
}

/// The device under test; `None` where cards are to be played.
fn named() -> Option<String> {
    std::env::var("FLORA_TEST_DEVICE").ok().filter(|name| name.split(':').next() == Some("cuda"))
}

/// Runs the body of the test `name` where there are cards.
pub(crate) fn on_cards(name: &str, body: impl FnOnce()) {
    if named().is_some() || std::env::var_os(PLAYED).is_some() {
        return body();
    }
    if CxxCompiler::from_environment().expect("FLORA_CXX=required: GCC with its sanitizers").is_none() {
        println!("NOT RUN: there is no C++ compiler to play a card with");
        return;
    }
    let program = std::env::current_exe().expect("this program's path");
    let library = std::env::var_os(LIBRARY).map_or_else(|| program.with_file_name(FILE), PathBuf::from);
    assert!(library.is_file(), "{} is built with this test", library.display());
    let folder = tempfile::tempdir().expect("a folder");
    for name in ["libcuda.so", "libnvrtc.so"] {
        symlink(&library, folder.path().join(name)).expect("a link");
    }
    let mut command = Command::new(program);
    command.args(["--exact", name, "--nocapture"]).env(PLAYED, "1").env("LD_LIBRARY_PATH", folder.path());
    let output = command.output().expect("this program starts");
    let said = format!("{}{}", String::from_utf8_lossy(&output.stdout), String::from_utf8_lossy(&output.stderr));
    assert!(output.status.success() && said.contains("1 passed"), "{said}");
    said.lines().filter(|line| line.starts_with("NOT RUN")).for_each(|line| println!("{line}"));
}

/// The cards of this process.
pub(crate) fn cards() -> Vec<Played> {
    let open = |id: &str| open(id).unwrap_or_else(|error| panic!("{id}: {error}"));
    if let Some(name) = named() {
        let ordinal = name.split_once(':').map_or(0, |(_, ordinal)| ordinal.parse().expect("a number"));
        let card = Card::primary(ordinal).expect("there is a card");
        return vec![Played { card, device: open(&name), is_emulated: false }];
    }
    let card = |(ordinal, (name, _)): (usize, (&str, Capability))| Played {
        card: Card::primary(ordinal as u32).expect("the emulated driver has it"),
        device: open(&format!("cuda-emulated:{name}")),
        is_emulated: true,
    };
    // Where one of them is named, it alone.
    let wanted = std::env::var("FLORA_TEST_DEVICE").ok();
    let wanted = wanted.as_deref().and_then(|device| device.strip_prefix("cuda-emulated:"));
    let named = |(_, (name, _)): &(usize, (&str, Capability))| wanted.is_none_or(|wanted| wanted == *name);
    Capability::ALL.into_iter().enumerate().filter(named).map(card).collect()
}

impl Played {
    /// Kernels with a folder of their own.
    pub(crate) fn kernels(&self, cache: &std::path::Path) -> Kernels {
        Kernels::new(self.card.clone(), KernelCache::at(cache), self.includes(cache))
    }

    /// Where CUDA's headers are; an emulated card has its own, and is only asked for their folder.
    pub(crate) fn includes(&self, scratch: &std::path::Path) -> Includes {
        if !self.is_emulated {
            return Includes::of_toolkit();
        }
        let folder = scratch.join("include");
        std::fs::create_dir_all(&folder).expect("a folder");
        std::fs::write(folder.join("cuda_runtime.h"), "").expect("a file");
        Includes(vec![folder])
    }
}
