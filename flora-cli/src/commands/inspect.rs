//! `flora inspect`: the source of the kernels that a launch would run, and what it compiles to.

use clap::Args;
use clap::builder::RangedU64ValueParser;
use flora::prelude::*;
use flora_codegen::target::{Capability, EmittedKernel, EqualBatch, Target, emit_gradient, emit_layer};
use flora_plan::lowering::{Part, PartLowering, lowerings_of};
use flora_toolchain::{
    Architecture, Bound, Class, Compiled, CudaCompiler, Defect, Expectations, MAX_WARPS, Mix, Occupancy, Source, Unit,
};
use serde::Serialize;

use super::error::CommandError;
use super::{layer, output, types};

/// Print the kernels that a batch would launch
#[derive(Args)]
pub(crate) struct Arguments {
    /// A built-in layer (linear, flora, flora_mean, hira, lora, ia3, ia3_feedforward, dora) or a file in the text form
    layer: String,
    /// cuda:sm_80, cuda:sm_90, cuda:sm_100, wgsl or spirv
    #[arg(long, default_value = "cuda:sm_90")]
    target: String,
    /// stacked, on_chip, bmm or merged for what is multiplied into the weight (fLoRA, HiRA, IA3), fused, segmented, bmm or merged for
    /// what is added (LoRA); the layer's first legal one unless given
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
    /// Segments of the batch, each with an adapter of its own; 4 unless given, 1 for `merged`
    #[arg(long, value_parser = RangedU64ValueParser::<u32>::new().range(1..=256))]
    segments: Option<u32>,
    /// Rows of a segment
    #[arg(long, default_value = "16", value_parser = RangedU64ValueParser::<u32>::new().range(1..=4096))]
    rows: u32,
    /// The type of activations; the equation's types unless given, which are f32 where it names none
    #[arg(long, value_parser = types::element())]
    dtype: Option<Element>,
    /// The type of adapters; that of the activations, or the equation's, unless given
    #[arg(long, value_parser = types::element())]
    adapter_dtype: Option<Element>,
    /// The format of the base weight; the type of the activations, or the equation's, unless given
    #[arg(long, value_parser = types::weight_format())]
    weight: Option<WeightFormat>,
    /// Let cubes share the depth where the device would be short of work
    #[arg(long)]
    split: bool,
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
    let compiled = layer::open(&arguments.layer)?.compiled;
    let target: Target = arguments.target.parse()?;
    let plan = match (arguments.gradient, arguments.lowering.as_deref()) {
        (true, None) => Plan::fixed_adjoint(),
        (_, lowering) => plan_of(&arguments.layer, &compiled.parts, lowering)?,
    };
    let emit = if arguments.gradient { emit_gradient } else { emit_layer };
    let plan = if arguments.split { plan.with_split() } else { plan };
    let compiler = compiler(arguments, target)?;
    let &Arguments { ref layer, d, k, rank, rows, .. } = arguments;
    let segments = arguments.segments.unwrap_or(if plan.is_merged() { 1 } else { 4 });
    let shape = LayerShape { d, k };
    let format = arguments.dtype.map_or_else(|| compiled.format(), LayerFormat::uniform);
    let format = LayerFormat {
        adapters: arguments.adapter_dtype.unwrap_or(format.adapters),
        weight: arguments.weight.unwrap_or(format.weight),
        ..format
    };
    if !format.weight.fits(shape) {
        return Err(CommandError::PartialBlock { format: format.weight, block: format.weight.whole(1), d });
    }
    let kernels = emit(&compiled, target, plan, (shape, format), EqualBatch { rank, segments, rows })?;
    // A weight that one tile of rows multiplies is read once, from the device's memory.
    let source = if u64::from(segments) * u64::from(rows) <= 128 { Source::Memory } else { Source::Cache };
    let mut reports = Vec::new();
    for kernel in kernels {
        let compiled = match &compiler {
            Some((compiler, architecture)) => {
                let code = compiler.compile(&kernel.source, *architecture)?;
                Some(Checked::of(code, expectations(&kernel.name, format, k), source))
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
        parts => parts.iter().map(|part| plan.of(*part).name()).collect::<Vec<_>>().join(" + "),
    };
    let split = if arguments.split { ", split" } else { "" };
    let pass = if arguments.gradient { "gradients of " } else { "" };
    let launches = match reports.len() {
        1 => "1 launch".to_owned(),
        launches => format!("{launches} launches"),
    };
    let mut text = format!(
        "// {pass}{layer} by {lowerings}{split} for {target}: d {d}, k {k}, {segments} segments of {rows} rows, rank {rank}, {launches}\n\
         // activations {}, adapters {}, base weight {}\n",
        format.activations, format.adapters, format.weight
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

/// The plan in which every part of the layer that `lowering` can compute is computed by it.
fn plan_of(layer: &str, parts: &[Part], lowering: Option<&str>) -> Result<Plan, CommandError> {
    let rows = || parts.iter().flat_map(|part| lowerings_of(*part));
    let wrong = |lowering: &str| {
        let names: Vec<_> = rows().map(|row| row.lowering().name()).collect();
        let help = match &names[..] {
            [] => "the layer has no adapter, only the base GEMM; leave --lowering out".to_owned(),
            names => format!("it can be lowered by {}", names.join(" or ")),
        };
        CommandError::WrongLowering { layer: layer.to_owned(), lowering: lowering.to_owned(), help }
    };
    let Some(name) = lowering else { return Ok(Plan::default()) };
    let wanted = Lowering::from_name(name).ok_or_else(|| wrong(name))?;
    if rows().all(|row| row.lowering() != wanted) {
        return Err(wrong(wanted.name()));
    }
    let computing = [Part::Multiplicative, Part::Additive].map(|part| PartLowering::find(part, wanted));
    Ok(computing.into_iter().flatten().fold(Plan::default(), Plan::with_part))
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
