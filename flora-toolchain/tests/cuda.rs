//! The CUDA compilers on a hand-written kernel, for every architecture.
//!
//! `FLORA_CUDA=required` fetches them; without it these tests use the compilers that were fetched before, and say so when
//! there are none.

use std::fmt::Write;

use flora_toolchain::{Architecture, CompileError, Compiled, CudaCompiler};

const KERNEL: &str = include_str!("kernel.cu");

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
        assert!(compiled.ptx.contains(&format!(".target {architecture}")), "{architecture}: {}", compiled.ptx);
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
    assert!(compiled.spill_bytes > 0);
}

#[test]
fn a_mistake_is_reported_with_its_line() {
    let Some(compiler) = compiler() else { return };
    let error = compiler.compile("\n__global__ void k() { undeclared = 1; }", Architecture::Sm90a).unwrap_err();
    let CompileError::Source { log, .. } = &error else { panic!("{error}") };
    assert!(log.contains("kernel.cu(2)") && log.contains("undeclared"), "{log}");
}

#[test]
fn a_source_without_a_kernel_or_with_a_zero_byte_is_an_error() {
    let Some(compiler) = compiler() else { return };
    let empty = compiler.compile("__device__ int value = 3;", Architecture::Sm80);
    assert!(matches!(empty, Err(CompileError::NoKernel)), "{empty:?}");
    let zero = compiler.compile("__global__ void k() {}\0", Architecture::Sm80);
    assert!(matches!(zero, Err(CompileError::ZeroByte { offset: 22 })), "{zero:?}");
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
