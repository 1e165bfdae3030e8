//! `flora inspect`: the source of the kernels that a launch would run, and what it compiles to.

use clap::Args;
use flora::prelude::*;
use flora_codegen::target::{Capability, EmittedKernel, EqualBatch, Target, emit_gradient, emit_layer};
use flora_toolchain::{
    Architecture, Bound, Class, Compiled, CudaCompiler, Defect, Expectations, MAX_WARPS, Mix, Occupancy, Source, Unit,
};
use serde::Serialize;

use super::error::CommandError;
use super::output;
use super::selection::{Chosen, Selection};

/// Print the kernels that a batch would launch
#[derive(Args)]
pub(crate) struct Arguments {
    #[command(flatten)]
    selection: Selection,
    /// The backward pass: of the input by the lowering that is given, or as projections choose, and of the adapters' vectors
    #[arg(long)]
    gradient: bool,
    /// Compile the CUDA source too: registers, spills, shared memory, occupancy, instructions, and what is wrong with them, which is
    /// an error
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
    compiled: Option<Checked>,
}

/// What the machine code of a kernel costs, and what is wrong with it.
#[derive(Serialize)]
struct Checked {
    #[serde(flatten)]
    code: Compiled,
    /// `None` where the source doesn't say how it is launched.
    occupancy: Option<Filling>,
    /// `None` where no loop multiplies.
    step: Option<Step>,
    defects: Vec<Found>,
}

/// What a main loop costs for each MMA of 16 × 8 × 16 that it is worth.
#[derive(Serialize)]
struct Step {
    /// Instructions that a warp issues.
    slots: f64,
    /// Cycles of a multiprocessor.
    cycles: Bound,
    /// Which of them is the longest.
    bound: Unit,
}

#[derive(Serialize)]
struct Filling {
    #[serde(flatten)]
    occupancy: Occupancy,
    fraction: f64,
}

#[derive(Serialize)]
struct Found {
    #[serde(flatten)]
    defect: Defect,
    message: String,
}

pub(crate) fn inspect(arguments: &Arguments) -> Result<(), CommandError> {
    let chosen = arguments.selection.chosen(arguments.gradient)?;
    let Chosen { compiled, target, plan, shape, format, batch } = &chosen;
    let (plan, shape, format, batch) = (*plan, *shape, *format, *batch);
    let emit = if arguments.gradient { emit_gradient } else { emit_layer };
    let compiler = compiler(arguments, *target)?;
    let EqualBatch { rank, segments, rows } = batch;
    let kernels = emit(compiled, *target, plan, (shape, format), batch)?;
    // A weight that one tile of rows multiplies is read once, from the device's memory.
    let source = if u64::from(segments) * u64::from(rows) <= 128 { Source::Memory } else { Source::Cache };
    let mut reports = Vec::new();
    for kernel in kernels {
        let compiled = match &compiler {
            Some((compiler, architecture)) => {
                let code = compiler.compile(&kernel.source, *architecture)?;
                Some(Checked::of(code, expectations(&kernel.name, format, shape.k), source))
            }
            None => None,
        };
        reports.push(Report { kernel, compiled });
    }
    if arguments.json {
        output::print_json(&reports)?;
        return verdict(&reports);
    }
    let lowerings = match &compiled.parts[..] {
        [] => "base GEMM".to_owned(),
        _ if plan.merges() && segments == 1 => Lowering::Merged.name().to_owned(),
        parts => {
            let merged = plan.merges().then_some(Lowering::Merged);
            let lowerings = merged.into_iter().chain(parts.iter().map(|part| plan.of(*part)));
            lowerings.map(Lowering::name).collect::<Vec<_>>().join(" + ")
        }
    };
    let split = if arguments.selection.split { ", split" } else { "" };
    let pass = if arguments.gradient { "gradients of " } else { "" };
    let launches = match reports.len() {
        1 => "1 launch".to_owned(),
        launches => format!("{launches} launches"),
    };
    let mut text = format!(
        "// {pass}{} by {lowerings}{split} for {target}: d {}, k {}, {segments} segments of {rows} rows, rank {rank}, {launches}\n\
         // activations {}, adapters {}, base weight {}\n",
        arguments.selection.layer, shape.d, shape.k, format.activations, format.adapters, format.weight
    );
    for (position, report) in reports.iter().enumerate() {
        text += &human(position + 1, report);
    }
    output::print(&text)?;
    verdict(&reports)
}

/// An error if some kernel has a defect.
fn verdict(reports: &[Report]) -> Result<(), CommandError> {
    let defects = |report: &Report| report.compiled.as_ref().map_or(0, |checked| checked.defects.len());
    let (defects, kernels) = (reports.iter().map(defects).sum(), reports.iter().filter(|one| defects(one) > 0).count());
    match defects {
        0 => Ok(()),
        _ => Err(CommandError::Defects { defects, kernels, launches: reports.len() }),
    }
}

/// What a kernel of that name should compile to.
fn expectations(name: &str, format: LayerFormat, k: u32) -> Expectations {
    let multiplies = ["tile", "shrink", "expand", "outer"].iter().any(|start| name.starts_with(start));
    let line_bytes = u64::from(k) * if let WeightFormat::Float(element) = format.weight { element.bytes() } else { 4 };
    let wide_weight_loads = name.starts_with("tile") && line_bytes % 16 == 0;
    Expectations {
        half_types: multiplies && format.activations != Element::F32,
        wide_weight_loads,
        fetches_ahead: wide_weight_loads,
    }
}

impl Checked {
    fn of(code: Compiled, expectations: Expectations, source: Source) -> Self {
        let occupancy = code.occupancy().ok();
        let occupancy = occupancy.map(|occupancy| Filling { fraction: occupancy.fraction(), occupancy });
        let found = |defect: Defect| Found { message: defect.to_string(), defect };
        let defects = code.defects(expectations).into_iter().map(found).collect();
        let step = code.main_loop.as_ref().map(|main| {
            let cycles = main.bound(code.architecture, source);
            Step { slots: main.slots(), cycles, bound: cycles.longest().0 }
        });
        Self { code, occupancy, step, defects }
    }

    /// Comments below the source.
    fn human(&self) -> String {
        let Self { code, occupancy, step, defects } = self;
        let dynamic = code.dynamic_shared_bytes.map_or_else(|| "unknown".to_owned(), |bytes| bytes.to_string());
        let mut text = format!(
            "// {}: {} registers, {} bytes spilled, {} + {dynamic} bytes of static and dynamic shared memory\n",
            code.architecture, code.registers, code.spill_bytes, code.shared_bytes
        );
        text += &match occupancy {
            Some(Filling { occupancy: Occupancy { blocks, warps, limiter }, .. }) => {
                format!("// occupancy: {blocks} cubes, {warps} of {MAX_WARPS} warps, limited by {limiter}\n")
            }
            None => "// occupancy: unknown\n".to_owned(),
        };
        text += &format!("// instructions: {}\n", code.mix);
        text += &match &code.main_loop {
            Some(main) => {
                let products = match main.mix.count(Class::TensorCore) {
                    0 => "without tensor cores",
                    _ => "on tensor cores",
                };
                format!(
                    "// main loop, {products}, at depth {}: {}\n\
                     // loads from global memory around it, by bits: {}; {} of 16 bytes under way while it multiplies\n",
                    main.depth,
                    main.mix,
                    loads(&main.nest),
                    main.loads_ahead
                )
            }
            None => "// main loop: none multiplies\n".to_owned(),
        };
        if let (Some(Step { slots, cycles, bound }), Some(main)) = (step, &code.main_loop) {
            text += &format!(
                "// an MMA of 16×8×16 of it: {slots:.2} slots, {} stages under way; cycles of a multiprocessor: {:.2} arithmetic, {:.2} \
                 issue, {:.2} shared memory, {:.2} global memory; bound by {bound}\n",
                main.stages, cycles.arithmetic, cycles.issue, cycles.shared, cycles.global
            );
        }
        text += &format!("// loads from global memory, by bits: {}\n", loads(&code.mix));
        for Found { message, .. } in defects {
            text += &format!("// DEFECT: {message}\n");
        }
        text
    }
}

fn loads(mix: &Mix) -> String {
    let loads: Vec<_> = mix.forms(Class::GlobalLoad).map(|(width, count)| format!("{width}×{count}")).collect();
    if loads.is_empty() { "none".to_owned() } else { loads.join(" ") }
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

fn human(number: usize, Report { kernel, compiled }: &Report) -> String {
    let extents = |[x, y, z]: [u32; 3]| format!("{x} × {y} × {z}");
    let count = kernel.cube_count.map_or_else(|| "as many as the device decides".to_owned(), extents);
    let mut text = format!("\n// kernel {number}: {}\n", kernel.name);
    text += &format!("// cubes of {} units, {count} cubes\n", extents(kernel.cube_dim));
    text += kernel.source.trim_end();
    text += "\n";
    if let Some(checked) = compiled {
        text += &checked.human();
    }
    text
}

#[cfg(test)]
mod tests {
    use super::*;

    fn report(spill_bytes: u32) -> Report {
        let code = Compiled {
            kernel: "tile_of_a_test".to_owned(),
            architecture: Architecture::Sm90a,
            registers: 255,
            spill_bytes,
            spill_store_bytes: spill_bytes / 2,
            stack_bytes: spill_bytes,
            shared_bytes: 0,
            dynamic_shared_bytes: Some(1024),
            threads: Some(256),
            instructions: Default::default(),
            global_loads: Default::default(),
            mix: Mix::default(),
            main_loop: None,
        };
        let (cube_dim, cube_count) = ([256, 1, 1], None);
        let kernel = EmittedKernel { name: code.kernel.clone(), cube_dim, cube_count, source: String::new() };
        Report {
            kernel,
            compiled: Some(Checked::of(code, expectations("reduce", LayerFormat::default(), 8), Source::Memory)),
        }
    }

    #[test]
    fn a_defect_is_an_error_after_the_answer() {
        assert!(verdict(&[report(0)]).is_ok());
        let reports = [report(0), report(12)];
        let error = verdict(&reports).expect_err("it spills").to_text();
        assert!(error.contains("1 in 1 of 2 kernels"), "{error}");
        let text = human(1, &reports[1]);
        assert!(
            text.contains("DEFECT: registers spill") && text.contains("8 of 64 warps, limited by registers"),
            "{text}"
        );
        let json = serde_json::to_value(&reports).expect("JSON");
        assert_eq!(json[0]["compiled"]["defects"], serde_json::json!([]));
        assert_eq!(json[1]["compiled"]["defects"][0]["defect"], "spills");
        assert!(json[1]["compiled"]["defects"][0]["message"].is_string());
    }

    #[test]
    fn what_is_expected_depends_on_the_kernel_and_its_types() {
        let half = LayerFormat::uniform(Element::F16);
        let both = |half_types, wide_weight_loads| Expectations {
            half_types,
            wide_weight_loads,
            fetches_ahead: wide_weight_loads,
        };
        assert_eq!(expectations("tile_x", half, 8), both(true, true));
        assert_eq!(expectations("tile_x", half, 4), both(true, false));
        assert_eq!(expectations("tile_x", LayerFormat::default(), 4), both(false, true));
        assert_eq!(expectations("tile_x", LayerFormat { weight: WeightFormat::Q4_0, ..half }, 4), both(true, true));
        assert_eq!(expectations("shrink_x", half, 8), both(true, false));
        assert_eq!(expectations("materialise", half, 8), both(false, false));
    }
}
