//! Every CUDA kernel is really compiled, for three architectures, and what it costs is a table, so that a spill shows in a diff.
//! A kernel of half types without tensor cores in its main loop, a narrow load of a weight, and a main loop that waits for its
//! loads, fail. So does a main loop whose predicted bound, or anything else of its row, changes: `INSTA_UPDATE=always` takes the new
//! table, and its diff says what became worse. Needs NVRTC, ptxas and nvdisasm; `cargo xtask test` fetches them, and says so where it can't.

use std::collections::BTreeMap;
use std::fmt::Write;

use flora::prelude::*;
use flora_codegen::target::Target;
use flora_toolchain::{Architecture, Class, CudaCompiler, Defect, Expectations, Source, heading};

use super::decoders::{self, emit_step};
use super::{DECODE, Load, ODD, PREFILL, SMALL, lowered, quantised};

const TARGETS: [(&str, Architecture); 3] =
    [("cuda:sm_80", Architecture::Sm80), ("cuda:sm_90", Architecture::Sm90a), ("cuda:sm_100", Architecture::Sm100)];

/// The loads of the table of main loops: a weight that is read once, and one that many tiles of rows read.
const SOURCES: [(Load, Source); 2] = [(DECODE, Source::Memory), (PREFILL, Source::Cache)];

/// A kernel to compile and what is expected of it.
struct Kernel {
    title: String,
    source: String,
    expectations: Expectations,
    /// How its main loop is called in the table of main loops, and where its loads are answered; `None` for one that isn't there.
    main_loop: Option<(String, Source)>,
}

/// All kernels of `lowered` titles in a format, each text once.
fn kernels(target: Target) -> Vec<Kernel> {
    let half = LayerFormat::uniform(Element::F16);
    let brain = LayerFormat::uniform(Element::Bf16);
    let serving = ["linear gemm", "flora stacked", "flora on_chip", "lora fused"];
    let every = |_: &str| true;
    let served = move |title: &str| serving.contains(&title);
    let plain = |title: &str| title == "linear gemm";
    let decoded = |weight, activations| LayerFormat { weight, ..LayerFormat::uniform(activations) };
    type Chosen = Box<dyn Fn(&str) -> bool>;
    let sets: Vec<(Chosen, LayerFormat, Load)> = vec![
        (Box::new(every), LayerFormat::default(), SMALL),
        (Box::new(every), half, SMALL),
        (Box::new(every), brain, SMALL),
        (Box::new(served), LayerFormat::default(), ODD),
        (Box::new(served), half, ODD),
        (Box::new(served), half, DECODE),
        (Box::new(served), brain, DECODE),
        (Box::new(served), half, PREFILL),
        (Box::new(served), brain, PREFILL),
        (Box::new(served), quantised(WeightFormat::Int8), DECODE),
        (Box::new(served), quantised(WeightFormat::Q8_0), DECODE),
        (Box::new(served), quantised(WeightFormat::Q4_0), DECODE),
        (Box::new(served), quantised(WeightFormat::Q4_1), PREFILL),
        (Box::new(served), quantised(WeightFormat::Q5_K), DECODE),
        (Box::new(served), quantised(WeightFormat::Q6_K), DECODE),
        (Box::new(served), quantised(WeightFormat::IQ4_NL), DECODE),
        (Box::new(plain), decoded(WeightFormat::Q8_0, Element::F16), PREFILL),
        (Box::new(plain), decoded(WeightFormat::Q8_0, Element::Bf16), PREFILL),
        (Box::new(plain), decoded(WeightFormat::Q4_0, Element::F16), PREFILL),
        (Box::new(plain), decoded(WeightFormat::Q4_0, Element::Bf16), PREFILL),
    ];
    let mut found: BTreeMap<String, Kernel> = BTreeMap::new();
    for (chosen, format, load) in sets {
        for lowered in lowered().into_iter().filter(|lowered| chosen(&lowered.title())) {
            for emitted in lowered.emit(target, format, load) {
                let wide_weight_loads = emitted.name.starts_with("tile") && load.k % 8 == 0;
                let multiplies =
                    ["tile", "shrink", "expand", "outer"].iter().any(|name| emitted.name.starts_with(name));
                let is_half = format.activations != Element::F32;
                let title = format!("{format} {}x{} {} {}", load.d, load.k, lowered.title(), emitted.name);
                let source = SOURCES.iter().find(|(of, _)| *of == load).map(|(_, source)| *source);
                let main_loop = source.filter(|_| emitted.name.starts_with("tile"));
                let rows = load.segments * load.rows;
                let main_loop = main_loop.map(|source| (format!("{} {format} {rows} rows", lowered.title()), source));
                found.entry(emitted.source.clone()).or_insert(Kernel {
                    title,
                    source: emitted.source,
                    expectations: Expectations {
                        half_types: multiplies && is_half,
                        wide_weight_loads,
                        fetches_ahead: wide_weight_loads,
                    },
                    main_loop,
                });
            }
        }
    }
    for (step, element) in decoders::STEPS.into_iter().flat_map(|step| Element::ALL.map(|element| (step, element))) {
        for (title, emitted) in emit_step(target, step, element) {
            let title = format!("{title} {}", emitted.name);
            found.entry(emitted.source.clone()).or_insert(Kernel {
                title,
                source: emitted.source,
                // Attention multiplies by units.
                expectations: Expectations::default(),
                main_loop: None,
            });
        }
    }
    found.into_values().collect()
}

#[test]
fn every_cuda_kernel_compiles() {
    let compiler = CudaCompiler::from_environment().expect("FLORA_CUDA=required fetches the compilers");
    let Some(compiler) = compiler else {
        println!("NOT RUN: the CUDA compilers aren't here; `cargo xtask test` fetches them");
        return;
    };
    let (mut rows, mut main_loops) = (Vec::new(), Vec::new());
    let mut defects = Vec::new();
    for (name, architecture) in TARGETS {
        let kernels = kernels(name.parse().expect("a target"));
        let sources: Vec<_> = kernels.iter().map(|kernel| (kernel.source.as_str(), architecture)).collect();
        for (kernel, compiled) in kernels.iter().zip(compiler.compile_all(&sources)) {
            let title = &kernel.title;
            let compiled = compiled.unwrap_or_else(|error| panic!("{title} for {name}: {error}"));
            // ptxas keeps f32 kernels at a number of registers that suits its idea of occupancy and spills a few bytes for it, in
            // other kernels after every change; the table has them.
            let own = compiled.defects(kernel.expectations).into_iter();
            let is_f32 = title.starts_with("f32/") || title.contains(" step f32 ");
            let failing = own.filter(|defect| !is_f32 || !matches!(defect, Defect::Spills { .. }));
            defects.extend(failing.map(|defect| format!("{title} for {name}: {defect}")));
            let occupancy = compiled.occupancy();
            let occupancy = occupancy.unwrap_or_else(|error| panic!("{title} for {name}: {error}"));
            let (tensor, wide, ahead) = compiled.main_loop.as_ref().map_or((0, 0, 0), |main| {
                (main.mix.count(Class::TensorCore), main.nest.wide_global_loads(), main.loads_ahead)
            });
            let main_loop = kernel.main_loop.as_ref();
            main_loops.extend(main_loop.and_then(|(title, source)| compiled.row(title, *source)));
            rows.push(format!(
                "{title:<90} {name:<12} {:>4} registers {:>7} shared {:>3} spilled {:>4.2} occupancy {tensor:>4} tensor {:>5} FMA  \
                 {wide:>3} wide loads {ahead:>3} ahead",
                compiled.registers,
                compiled.shared_bytes + compiled.dynamic_shared_bytes.unwrap_or(0),
                compiled.spill_bytes,
                occupancy.fraction(),
                compiled.mix.count(Class::Fma),
            ));
        }
    }
    insta::assert_snapshot!("cuda machine code", table(String::new(), rows));
    insta::assert_snapshot!("cuda main loops", table(heading() + "\n", main_loops));
    assert!(defects.is_empty(), "{}", defects.join("\n"));
}

/// The rows in order, after a head.
fn table(mut table: String, mut rows: Vec<String>) -> String {
    rows.sort();
    for row in rows {
        writeln!(table, "{row}").expect("a String takes all");
    }
    table
}
