//! The CUDA compilers on a hand-written kernel, for every architecture.
//!
//! `FLORA_CUDA=required` fetches them; without it these tests use the compilers that were fetched before, and say so when
//! there are none.

use std::fmt::Write;

use flora_toolchain::{
    Architecture, Class, CompileError, Compiled, CudaCompiler, Defect, Expectations, Limiter, OccupancyError,
};

const KERNEL: &str = include_str!("kernel.cu");
const ON_CHIP: &str = include_str!("on_chip.cu");
const HALF: Expectations = Expectations { half_types: true, wide_weight_loads: true, fetches_ahead: false };

/// The compilers, or `None` with a line that says the test did not run.
fn compiler() -> Option<CudaCompiler> {
    let compiler = CudaCompiler::from_environment().expect("FLORA_CUDA=required, but the CUDA compilers can't be had");
    if compiler.is_none() {
        eprintln!("NOT RUN: there are no CUDA compilers; FLORA_CUDA=required fetches them");
    }
    compiler
}

#[test]
fn a_tensor_core_kernel_compiles_for_every_architecture() {
    let Some(compiler) = compiler() else { return };
    for architecture in Architecture::ALL {
        let compiled = compiler.compile(KERNEL, architecture).unwrap();
        let count = |opcode: &str| compiled.instructions.get(opcode).copied().unwrap_or(0);
        assert_eq!((compiled.architecture, compiled.kernel.as_str()), (architecture, "product"));
        assert!(count("HMMA") > 0, "{architecture}: no tensor-core instruction in {:?}", compiled.instructions);
        assert_eq!(compiled.spill_bytes, 0, "{architecture}");
        assert_eq!(compiled.shared_bytes, 1024, "{architecture}");
        assert!((8..=255).contains(&compiled.registers), "{architecture}: {}", compiled.registers);
        for width in ["128", "64", "U16"] {
            assert_eq!(compiled.global_loads.get(width), Some(&1), "{architecture}: {:?}", compiled.global_loads);
        }
        assert_eq!(compiled.global_loads.values().sum::<u32>(), count("LDG"), "{architecture}");
        let json = serde_json::to_string(&compiled).unwrap();
        assert_eq!(serde_json::from_str::<Compiled>(&json).unwrap(), compiled);
    }
}

#[test]
fn spills_show() {
    let Some(compiler) = compiler() else { return };
    // More live values than 16 registers hold.
    let mut source = String::from("extern \"C\" __global__ void __maxnreg__(24) k(const float *x, float *y) {\n");
    let values = 0..64;
    values.clone().for_each(|i| writeln!(source, "float v{i} = x[{i} * 4096 + threadIdx.x];").unwrap());
    source.push_str("__syncthreads();\n");
    values.for_each(|i| writeln!(source, "y[{i} * 4096 + threadIdx.x] = v{i} * v{};", (i * 7 + 3) % 64).unwrap());
    source.push('}');
    let compiled = compiler.compile(&source, Architecture::Sm80).unwrap();
    assert!(compiled.registers <= 24, "{}", compiled.registers);
    assert!(compiled.spill_store_bytes > 0 && compiled.spill_load_bytes() > 0);
    assert_eq!(compiled.spill_bytes, compiled.spill_store_bytes + compiled.spill_load_bytes());
    assert!(compiled.mix.count(Class::Local) > 0, "{}", compiled.mix);
    let defects = compiled.defects(Expectations::default());
    assert!(matches!(defects[..], [Defect::Spills { .. }]), "{defects:?}");
}

#[test]
fn a_good_kernel_has_no_defects_on_any_architecture() {
    let Some(compiler) = compiler() else { return };
    for compiled in compiler.compile_all(&Architecture::ALL.map(|architecture| (ON_CHIP, architecture))) {
        let compiled = compiled.unwrap();
        let architecture = compiled.architecture;
        assert_eq!(compiled.defects(HALF), [], "{architecture}: {}", compiled.mix);
        assert_eq!(compiled.mix.count(Class::Other), 0, "{architecture}: {}", compiled.mix);
        assert_eq!(compiled.mix.total(), compiled.instructions.values().sum::<u32>(), "{architecture}");
        assert_eq!((compiled.threads, compiled.dynamic_shared_bytes), (Some(128), Some(12_288)), "{architecture}");
        assert_eq!((compiled.shared_bytes, compiled.stack_bytes), (0, 0), "{architecture}");
        let main = compiled.main_loop.as_ref().unwrap();
        // 2 halves × 4 × 2 fragments, each two products of 16 × 8 × 16; all in the loop over d.
        let products: Vec<_> = main.mix.forms(Class::TensorCore).collect();
        assert_eq!(products, [("HMMA.16816.F32", 32)], "{architecture}");
        assert_eq!(compiled.mix.count(Class::TensorCore), 32, "{architecture}");
        assert_eq!(main.depth, 1, "{architecture}");
        assert!(main.mix.count(Class::MatrixLoad) > 0, "{architecture}: {}", main.mix);
        assert_eq!(main.mix.count(Class::GlobalStore), 0, "{architecture}: {}", main.mix);
        assert!(compiled.mix.count(Class::GlobalStore) > 0, "{architecture}: {}", compiled.mix);
        let occupancy = compiled.occupancy().unwrap();
        assert_eq!(occupancy.limiter, Limiter::Registers, "{architecture}: {occupancy:?}");
        assert_eq!(occupancy.blocks, 65_536 / 128 / compiled.registers.next_multiple_of(8), "{architecture}");
        let narrowed = compiled.occupancy_of(128, 100_000).unwrap();
        assert_eq!(narrowed.limiter, Limiter::SharedMemory, "{architecture}: {narrowed:?}");
    }
}

#[test]
fn a_kernel_without_tensor_cores_or_wide_loads_is_found_out() {
    let Some(compiler) = compiler() else { return };
    let source = "#include <cuda_fp16.h>
extern \"C\" __global__ void dot(const __half *x, const __half *w, float *y, unsigned d, unsigned n) {
    float sum = 0.0f;
    for (unsigned i = 0; i < d; i++) sum += __half2float(x[i]) * __half2float(w[i * n + threadIdx.x]);
    y[threadIdx.x] = sum;
}";
    for architecture in Architecture::ALL {
        let compiled = compiler.compile(source, architecture).unwrap();
        let main = compiled.main_loop.as_ref().unwrap();
        assert!(main.mix.count(Class::Fma) > 0 && main.mix.count(Class::Conversion) > 0, "{}", main.mix);
        let defects = compiled.defects(HALF);
        let [Defect::NoTensorCore { elsewhere: 0 }, Defect::NarrowLoads { loads }] = &defects[..] else {
            panic!("{architecture}: {defects:?}")
        };
        assert_eq!(loads.keys().map(String::as_str).collect::<Vec<_>>(), ["U16"], "{architecture}");
        assert_eq!(compiled.defects(Expectations::default()), [], "{architecture}");
        assert_eq!(compiled.occupancy(), Err(OccupancyError::UnknownThreads));
        assert_eq!(compiled.occupancy_of(256, 0).unwrap().limiter, Limiter::Threads);
    }
}

#[test]
fn arrays_in_local_memory_are_found_out() {
    let Some(compiler) = compiler() else { return };
    let source = "extern \"C\" __global__ void pick(const float *x, float *y, unsigned i) {
    float values[32];
    for (int j = 0; j < 32; j++) values[j] = x[j * 32 + threadIdx.x];
    for (unsigned j = 0; j < i; j++) values[(j * j + i) % 32] += values[(j * 7 + threadIdx.x) % 32];
    for (int j = 0; j < 32; j++) y[j * 32 + threadIdx.x] = values[j];
}";
    let compiled = compiler.compile(source, Architecture::Sm90a).unwrap();
    assert_eq!(compiled.defects(Expectations::default()), [Defect::LocalArrays { bytes: 128 }]);
}

#[test]
fn asynchronous_copies_count_as_loads_of_their_width() {
    let Some(compiler) = compiler() else { return };
    let source = "#include <cuda_pipeline.h>
extern \"C\" __global__ void __launch_bounds__(64) copy(const float4 *x, float4 *y) {
    __shared__ float4 tile[64];
    __pipeline_memcpy_async(&tile[threadIdx.x], &x[threadIdx.x], 16);
    __pipeline_commit();
    __pipeline_wait_prior(0);
    __syncthreads();
    y[threadIdx.x] = tile[63 - threadIdx.x];
}";
    for architecture in Architecture::ALL {
        let compiled = compiler.compile(source, architecture).unwrap();
        assert_eq!(compiled.global_loads.get("128"), Some(&1), "{architecture}: {}", compiled.mix);
        assert_eq!(compiled.main_loop, None, "{architecture}");
        assert_eq!(compiled.mix.count(Class::Other), 0, "{architecture}: {}", compiled.mix);
    }
}

#[test]
fn a_main_loop_is_found_through_a_table_of_branches() {
    let Some(compiler) = compiler() else { return };
    let source = "extern \"C\" __global__ void k(const float *x, const int *kinds, float *y, int n) {
    float s = x[0];
    for (int i = 0; i < n; i++) {
        switch (kinds[i]) {
        case 0: s = s * x[i] + 1.0f; break;
        case 1: s = s / x[i]; break;
        case 2: s = sqrtf(s); break;
        case 3: s = s - x[i + 1]; break;
        case 4: s = expf(s); break;
        case 5: s = fmaf(s, s, x[i + 9]); break;
        }
    }
    y[threadIdx.x] = s;
}";
    for architecture in Architecture::ALL {
        let compiled = compiler.compile(source, architecture).unwrap();
        assert!(compiled.instructions.contains_key("BRX"), "{architecture}: {}", compiled.mix);
        let main = compiled.main_loop.as_ref().unwrap();
        assert_eq!(main.depth, 1, "{architecture}");
        assert!(main.mix.forms(Class::Branch).any(|(opcode, _)| opcode == "BRX"), "{architecture}: {}", main.mix);
        assert!(main.mix.total() * 2 > compiled.mix.total(), "{architecture}: {} of {}", main.mix, compiled.mix);
    }
}

#[test]
fn a_result_outlives_the_compiler() {
    let Some(compiler) = compiler() else { return };
    let first = compiler.compile(KERNEL, Architecture::Sm90a).unwrap();
    let second = self::compiler().unwrap();
    assert_eq!(second.compile(KERNEL, Architecture::Sm90a).unwrap(), first);
}

#[test]
fn a_mistake_is_reported_with_its_line() {
    let Some(compiler) = compiler() else { return };
    let error = compiler.compile("\n__global__ void k() { undeclared = 1; }", Architecture::Sm90a).unwrap_err();
    let CompileError::Source { log, .. } = &error else { panic!("{error}") };
    assert!(log.contains("kernel.cu(2)") && log.contains("undeclared"), "{log}");
}

#[test]
fn a_source_without_one_kernel_or_with_a_zero_byte_is_an_error() {
    let Some(compiler) = compiler() else { return };
    let empty = compiler.compile("__device__ int value = 3;", Architecture::Sm80);
    assert!(matches!(empty, Err(CompileError::NoKernel)), "{empty:?}");
    let zero = compiler.compile("__global__ void k() {}\0", Architecture::Sm80);
    assert!(matches!(zero, Err(CompileError::ZeroByte { offset: 22 })), "{zero:?}");
    let two = "extern \"C\" __global__ void one() {} extern \"C\" __global__ void other() {}";
    let several = compiler.compile(two, Architecture::Sm80);
    let Err(CompileError::SeveralKernels(mut names)) = several else { panic!("{several:?}") };
    names.sort();
    assert_eq!(names, ["one", "other"]);
}

#[test]
fn threads_may_compile_at_once() {
    let Some(compiler) = compiler() else { return };
    let alone = Architecture::ALL.map(|architecture| compiler.compile(KERNEL, architecture).unwrap());
    let compiler = &compiler;
    let together = std::thread::scope(|scope| {
        Architecture::ALL
            .map(|architecture| scope.spawn(move || compiler.compile(KERNEL, architecture).unwrap()))
            .map(|thread| thread.join().unwrap())
    });
    assert_eq!(alone, together);
}
