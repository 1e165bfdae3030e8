//! `flora inspect`: the source of the kernels that a launch would run, and what it compiles to.

use std::collections::BTreeMap;

use clap::Args;
use clap::builder::RangedU64ValueParser;
use flora::codegen::lowering::{Part, lowerings_of};
use flora::codegen::target::{Capability, EmittedKernel};
use flora::prelude::*;
use flora_toolchain::{Architecture, CudaCompiler};
use serde::Serialize;

use super::error::CommandError;
use super::{layer, output};

/// Print the kernels that a batch would launch
#[derive(Args)]
pub(crate) struct Arguments {
    /// A built-in layer (linear, flora, flora_mean, hira, lora, ia3, ia3_feedforward, dora) or a file in the text form
    layer: String,
    /// cuda:sm_80, cuda:sm_90, cuda:sm_100, wgsl or spirv
    #[arg(long, default_value = "cuda:sm_90")]
    target: String,
    /// stacked, bmm or segmented; the layer's first legal one unless given
    #[arg(long)]
    lowering: Option<String>,
    /// Inputs of the layer
    #[arg(long, default_value = "576", value_parser = RangedU64ValueParser::<u32>::new().range(1..=65536))]
    d: u32,
    /// Outputs of the layer
    #[arg(long, default_value = "576", value_parser = RangedU64ValueParser::<u32>::new().range(1..=65536))]
    k: u32,
    /// Rank of every adapter
    #[arg(long, default_value = "8", value_parser = RangedU64ValueParser::<u32>::new().range(1..=1024))]
    rank: u32,
    /// Segments of the batch, each with an adapter of its own
    #[arg(long, default_value = "4", value_parser = RangedU64ValueParser::<u32>::new().range(1..=256))]
    segments: u32,
    /// Rows of a segment
    #[arg(long, default_value = "16", value_parser = RangedU64ValueParser::<u32>::new().range(1..=4096))]
    rows: u32,
    /// Compile the CUDA source too: registers, spills, shared memory, instructions
    #[arg(long)]
    check: bool,
    /// Fetch the CUDA compilers for --check, if they are missing
    #[arg(long, requires = "check")]
    fetch: bool,
    /// Print JSON
    #[arg(long)]
    json: bool,
}

#[derive(Serialize)]
struct Report {
    #[serde(flatten)]
    kernel: EmittedKernel,
    #[serde(skip_serializing_if = "Option::is_none")]
    compiled: Option<Compiled>,
}

/// What the machine code of a kernel costs.
#[derive(Serialize)]
struct Compiled {
    architecture: Architecture,
    registers: u32,
    spill_bytes: u32,
    shared_bytes: u32,
    instructions: BTreeMap<String, u32>,
    global_loads: BTreeMap<String, u32>,
}

pub(crate) fn inspect(arguments: &Arguments) -> Result<(), CommandError> {
    let compiled = layer::open(&arguments.layer)?.compiled;
    let target: Target = arguments.target.parse()?;
    let plan = plan_of(&arguments.layer, &compiled.parts, arguments.lowering.as_deref())?;
    let compiler = compiler(arguments, target)?;
    let shape = LayerShape { d: arguments.d, k: arguments.k };
    let kernels = compiled.emit(
        target,
        plan,
        shape,
        LayerFormat::default(),
        arguments.rank,
        arguments.segments,
        arguments.rows,
    )?;
    let mut reports = Vec::new();
    for kernel in kernels {
        let compiled = match &compiler {
            Some((compiler, architecture)) => Some(compile(compiler, *architecture, &kernel)?),
            None => None,
        };
        reports.push(Report { kernel, compiled });
    }
    if arguments.json {
        return output::print_json(&reports);
    }
    let lowerings = match &compiled.parts[..] {
        [] => "base GEMM".to_owned(),
        parts => parts.iter().map(|part| plan.of(*part).name()).collect::<Vec<_>>().join(" + "),
    };
    let Arguments { layer, d, k, rank, segments, rows, .. } = arguments;
    let mut text = format!(
        "// {layer} by {lowerings} for {target}: d {d}, k {k}, {segments} segments of {rows} rows, rank {rank}, {} launches\n",
        reports.len()
    );
    for (position, report) in reports.iter().enumerate() {
        text += &human(position + 1, report);
    }
    output::print(&text)
}

/// The plan in which every part of the layer that `lowering` can compute is computed by it.
fn plan_of(layer: &str, parts: &[Part], lowering: Option<&str>) -> Result<Plan, CommandError> {
    let legal = |part| lowerings_of(part).map(|row| row.lowering);
    let wrong = |lowering: &str| {
        let names: Vec<_> = parts.iter().flat_map(|part| legal(*part)).map(Lowering::name).collect();
        let help = match &names[..] {
            [] => "the layer has no adapter, only the base GEMM; leave --lowering out".to_owned(),
            names => format!("it can be lowered by {}", names.join(" or ")),
        };
        CommandError::WrongLowering { layer: layer.to_owned(), lowering: lowering.to_owned(), help }
    };
    let wanted = match lowering {
        None => None,
        Some(name) => Some(Lowering::from_name(name).ok_or_else(|| wrong(name))?),
    };
    if let Some(wanted) = wanted
        && !parts.iter().any(|part| legal(*part).any(|lowering| lowering == wanted))
    {
        return Err(wrong(wanted.name()));
    }
    let choose = |part, fallback| {
        let first = legal(part).next().unwrap_or(fallback);
        wanted.filter(|wanted| legal(part).any(|lowering| lowering == *wanted)).unwrap_or(first)
    };
    let multiplicative = choose(Part::Multiplicative, Lowering::Stacked);
    Ok(Plan::new(multiplicative, choose(Part::Additive, Lowering::Segmented))?)
}

/// The compilers for --check.
fn compiler(arguments: &Arguments, target: Target) -> Result<Option<(CudaCompiler, Architecture)>, CommandError> {
    if !arguments.check {
        return Ok(None);
    }
    let architecture = match target {
        Target::Cuda(Capability::Sm80) => Architecture::Sm80,
        Target::Cuda(Capability::Sm90) => Architecture::Sm90a,
        Target::Cuda(Capability::Sm100) => Architecture::Sm100,
        Target::Wgsl | Target::Spirv => {
            return Err(CommandError::NotCuda { option: "--check", target: target.to_string() });
        }
    };
    let compiler = match CudaCompiler::installed() {
        Some(compiler) => compiler,
        None if arguments.fetch => CudaCompiler::ensure()?,
        None => return Err(CommandError::NoCudaCompilers),
    };
    Ok(Some((compiler, architecture)))
}

fn compile(
    compiler: &CudaCompiler,
    architecture: Architecture,
    kernel: &EmittedKernel,
) -> Result<Compiled, CommandError> {
    let compiled = compiler.compile(&kernel.source, architecture)?;
    Ok(Compiled {
        architecture,
        registers: compiled.registers,
        spill_bytes: compiled.spill_bytes,
        shared_bytes: compiled.shared_bytes,
        instructions: compiled.instructions,
        global_loads: compiled.global_loads,
    })
}

fn human(number: usize, Report { kernel, compiled }: &Report) -> String {
    let extents = |[x, y, z]: [u32; 3]| format!("{x} × {y} × {z}");
    let count = kernel.cube_count.map_or_else(|| "as many as the device decides".to_owned(), extents);
    let mut text = format!("\n// kernel {number}: {}\n", kernel.name);
    text += &format!("// cubes of {} units, {count} cubes\n", extents(kernel.cube_dim));
    text += kernel.source.trim_end();
    text += "\n";
    if let Some(compiled) = compiled {
        text += &format!(
            "// {}: {} registers, {} bytes spilled, {} bytes of static shared memory\n",
            compiled.architecture, compiled.registers, compiled.spill_bytes, compiled.shared_bytes
        );
        let counts = |counts: &BTreeMap<String, u32>| {
            let mut sorted: Vec<_> = counts.iter().collect();
            sorted.sort_by(|one, other| other.1.cmp(one.1).then(one.0.cmp(other.0)));
            sorted.into_iter().map(|(name, count)| format!("{name} {count}")).collect::<Vec<_>>().join(", ")
        };
        text += &format!("// instructions: {}\n", counts(&compiled.instructions));
        text += &format!("// loads from global memory by bits: {}\n", counts(&compiled.global_loads));
    }
    text
}
