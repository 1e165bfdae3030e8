//! `flora export`: the launches of a batch as files, for programs that make them by themselves.

use std::path::{Path, PathBuf};

use clap::Args;
use flora_codegen::target::export::{Argument, Contents, ExportedKernel, LaunchList, Operand, export as exported};
use flora_codegen::target::{Emission, Pass, Target};
use flora_plan::batch::{AdapterSlots, Segment};
use serde::Serialize;

use super::error::CommandError;
use super::output;
use super::selection::{Chosen, Selection};

/// Write the kernels of a batch, and how they are launched, for another program to do it
///
/// The folder gets manifest.json, the kernels as CUDA C++ and the tables that they read; docs/inspecting.md says how to launch them.
/// The launches are those that flora would make on the card.
#[derive(Args)]
pub(crate) struct Arguments {
    #[command(flatten)]
    selection: Selection,
    /// The folder to write
    #[arg(long, value_name = "DIR")]
    out: PathBuf,
}

/// `manifest.json`
#[derive(Serialize)]
struct Manifest<'a> {
    flora: &'static str,
    target: String,
    layer: &'a str,
    plan: String,
    d: u32,
    k: u32,
    activations: &'static str,
    adapters: &'static str,
    weight: &'static str,
    /// The batch that the tables are of.
    segments: Vec<Segment>,
    /// Where the pools have to have the vectors of the adapters.
    slots: Vec<AdapterSlots>,
    kernels: Vec<Kernel>,
    buffers: Vec<Buffer>,
    launches: Vec<Launch<'a>>,
}

#[derive(Serialize)]
struct Kernel {
    file: String,
    function: String,
    block: [u32; 3],
    dynamic_shared_bytes: u32,
}

#[derive(Serialize)]
struct Buffer {
    bytes: u64,
    #[serde(flatten)]
    contents: Filled,
}

/// [`Contents`], with words in a file.
#[derive(Serialize)]
#[serde(rename_all = "snake_case", tag = "contents")]
enum Filled {
    Operand { operand: Operand },
    Table { file: String },
    State { file: String },
    Scratch,
}

#[derive(Serialize)]
struct Launch<'a> {
    kernel: usize,
    grid: [u32; 3],
    arguments: &'a [Argument],
    by_value: &'a [u32],
}

pub(crate) fn export(arguments: &Arguments) -> Result<(), CommandError> {
    let Chosen { compiled, target, plan, shape, format, batch } = arguments.selection.chosen(false)?;
    let Target::Cuda(capability) = target else {
        return Err(CommandError::NotCuda { option: "export", target: target.to_string() });
    };
    let (segments, adapters) = batch.of(&compiled, &plan);
    let epilogue = compiled.epilogue();
    let (segments, adapters) = (&segments[..], &adapters[..]);
    let emission = Emission { pass: Pass::Forward, shape, format, epilogue, plan, segments, adapters };
    let list = exported(capability, &emission)?;

    let folder = Folder::new(&arguments.out)?;
    let kernels = kernels(&folder, &list)?;
    let buffers = buffers(&folder, &list)?;
    let launches = list.launches.iter().map(|launch| Launch {
        kernel: launch.kernel,
        grid: launch.grid,
        arguments: &launch.arguments,
        by_value: &launch.by_value,
    });
    let manifest = Manifest {
        flora: env!("CARGO_PKG_VERSION"),
        target: target.to_string(),
        layer: &arguments.selection.layer,
        plan: plan.to_string(),
        d: shape.d,
        k: shape.k,
        activations: format.activations.name(),
        adapters: format.adapters.name(),
        weight: format.weight.name(),
        segments: segments.to_vec(),
        slots: adapters.to_vec(),
        kernels,
        buffers,
        launches: launches.collect(),
    };
    let text = serde_json::to_string_pretty(&manifest).map_err(|error| CommandError::Output(error.into()))?;
    folder.write("manifest.json", text.as_bytes())?;
    output::print(&format!(
        "{}: {} launches of {} kernels, {} buffers\n",
        arguments.out.join("manifest.json").display(),
        manifest.launches.len(),
        manifest.kernels.len(),
        manifest.buffers.len(),
    ))
}

fn kernels(folder: &Folder, list: &LaunchList) -> Result<Vec<Kernel>, CommandError> {
    let written = list.kernels.iter().enumerate().map(|(position, kernel)| {
        let file = format!("kernel_{position}.cu");
        folder.write(&file, kernel.source.as_bytes())?;
        let ExportedKernel { name, block, dynamic_shared_bytes, .. } = kernel.clone();
        Ok(Kernel { file, function: name, block, dynamic_shared_bytes })
    });
    written.collect()
}

fn buffers(folder: &Folder, list: &LaunchList) -> Result<Vec<Buffer>, CommandError> {
    let words = |position: usize, words: &[u32]| {
        let file = format!("buffer_{position}.bin");
        let bytes: Vec<_> = words.iter().flat_map(|word| word.to_le_bytes()).collect();
        folder.write(&file, &bytes).map(|()| file)
    };
    let written = list.buffers.iter().enumerate().map(|(position, buffer)| {
        let contents = match &buffer.contents {
            Contents::Operand(operand) => Filled::Operand { operand: *operand },
            Contents::Table(own) => Filled::Table { file: words(position, own)? },
            Contents::State(own) => Filled::State { file: words(position, own)? },
            Contents::Scratch => Filled::Scratch,
        };
        Ok(Buffer { bytes: buffer.bytes, contents })
    });
    written.collect()
}

/// The folder that is written.
struct Folder<'a>(&'a Path);

impl<'a> Folder<'a> {
    fn new(path: &'a Path) -> Result<Self, CommandError> {
        let failed = |source| CommandError::Io { action: "make the folder", path: path.to_owned(), source };
        std::fs::create_dir_all(path).map_err(failed)?;
        Ok(Self(path))
    }

    fn write(&self, name: &str, bytes: &[u8]) -> Result<(), CommandError> {
        output::replace(&self.0.join(name), bytes)
    }
}
