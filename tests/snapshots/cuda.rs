//! Every CUDA kernel is really compiled, for three architectures, and what it costs is a table: a spill or a narrow load shows
//! in a diff. Needs NVRTC, ptxas and nvdisasm; `cargo xtask test` fetches them, and says so where it can't.

use std::collections::BTreeMap;
use std::fmt::Write;

use flora::prelude::*;
use flora_toolchain::{Architecture, CudaCompiler};

use super::{is_ours, lowered};

#[test]
fn every_cuda_kernel_compiles() {
    let compiler = CudaCompiler::from_environment().expect("FLORA_CUDA=required fetches the compilers");
    let Some(compiler) = compiler else {
        println!("NOT RUN: the CUDA compilers aren't here; `cargo xtask test` fetches them");
        return;
    };
    let targets =
        [("cuda:sm_80", Architecture::Sm80), ("cuda:sm_90", Architecture::Sm90a), ("cuda:sm_100", Architecture::Sm100)];
    let mut rows = BTreeMap::new();
    for (name, architecture) in targets {
        let target: Target = name.parse().expect("a target");
        let mut sources = BTreeMap::new();
        for lowered in lowered() {
            for (d, k) in [(576, 192), (61, 37)] {
                for kernel in lowered.emit(target, d, k) {
                    sources.entry(kernel.name.clone()).or_insert(kernel);
                }
            }
        }
        for (kernel, emitted) in sources {
            let compiled = compiler.compile(&emitted.source, architecture);
            let compiled = compiled.unwrap_or_else(|error| panic!("{kernel} for {name}: {error}"));
            assert_eq!(compiled.spill_bytes, 0, "{kernel} for {name} spills");
            if !is_ours(&emitted) {
                // Which of its shared arrays overlap is chance, and with it the registers.
                continue;
            }
            let loads: Vec<_> = compiled.global_loads.iter().map(|(width, count)| format!("{width}×{count}")).collect();
            let arithmetic = compiled.instructions.get("FFMA").copied().unwrap_or(0);
            rows.insert(
                (kernel, name),
                format!(
                    "{:>4} registers {:>6} shared {:>3} spilled {arithmetic:>5} FFMA  loads {}",
                    compiled.registers,
                    compiled.shared_bytes,
                    compiled.spill_bytes,
                    loads.join(" ")
                ),
            );
        }
    }
    let mut table = String::new();
    for ((kernel, target), row) in rows {
        writeln!(table, "{kernel:<72} {target:<12} {row}").expect("a String takes all");
    }
    insta::assert_snapshot!("cuda machine code", table);
}
