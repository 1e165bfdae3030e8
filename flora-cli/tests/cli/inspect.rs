//! `flora inspect`: sources for every target and type, and what the CUDA compilers say of them where they are.

use flora_codegen::target::Target;
use flora_plan::lowering::{Part, lowerings_of};
use flora_toolchain::CudaCompiler;
use serde_json::Value;

use super::command::{answer, command, stderr};

fn array(value: &Value) -> &[Value] {
    value.as_array().expect("an array")
}

#[test]
fn every_lowering_is_printed_for_every_target() {
    for (target, _) in Target::ALL {
        for (layer, part) in [("flora", Part::Multiplicative), ("lora", Part::Additive)] {
            for row in lowerings_of(part) {
                let kernels =
                    answer(["inspect", layer, "--target", target, "--lowering", row.lowering().name(), "--json"]);
                assert!(!array(&kernels).is_empty());
                for kernel in array(&kernels) {
                    for key in ["name", "cube_dim", "cube_count", "source"] {
                        assert!(kernel.get(key).is_some(), "no `{key}` in {kernel}");
                    }
                }
            }
        }
    }
    assert_eq!(array(&answer(["inspect", "linear", "--json"])).len(), 1, "a base GEMM");
    assert_eq!(array(&answer(["inspect", "lora", "--lowering", "fused", "--json"])).len(), 1, "one launch");
}

#[test]
fn types_and_the_split_show_in_the_kernels() {
    let names = |more: &[&str]| {
        let kernels = answer(["inspect", "flora", "--d", "4096", "--k", "128", "--json"].iter().chain(more));
        array(&kernels).iter().map(|kernel| kernel["name"].as_str().expect("text").to_owned()).collect::<Vec<_>>()
    };
    let own = names(&[]);
    assert!(own[0].contains("x_f32_w_f32_a_f32"), "{own:?}");
    let half = names(&["--dtype", "f16"]);
    assert!(half[0].contains("x_f16_w_f16_a_f16"), "{half:?}");
    let mixed = names(&["--dtype", "bf16", "--adapter-dtype", "f32", "--weight", "f16"]);
    assert!(mixed[0].contains("x_bf16_w_f16_a_f32"), "{mixed:?}");
    let quantised = names(&["--dtype", "f16", "--weight", "q4_1"]);
    assert!(quantised[0].contains("w_u32"), "{quantised:?}");
    let split = names(&["--split"]);
    assert_eq!(split.len(), own.len() + 1, "partial sums are added up by a kernel of its own: {split:?}");
}

/// Needs NVRTC, ptxas and nvdisasm; `cargo xtask test` fetches them.
#[test]
fn the_machine_code_is_checked() {
    let compiler = CudaCompiler::from_environment().expect("FLORA_CUDA=required fetches the compilers");
    if compiler.is_none() {
        println!("NOT RUN: the CUDA compilers aren't here; `cargo xtask test` fetches them");
        return;
    }
    let check = |more: &[&str]| {
        let mut command = command("/nowhere".as_ref());
        match std::env::var_os("FLORA_CACHE") {
            Some(cache) => command.env("FLORA_CACHE", cache),
            None => command.env_remove("FLORA_CACHE"),
        };
        command.args(["inspect", "lora", "--lowering", "fused", "--check"]).args(more);
        command.output().expect("the binary starts")
    };
    let output = check(&["--dtype", "f16", "--rank", "16", "--json"]);
    assert!(output.status.success(), "{}", stderr(&output));
    let kernels: Value = serde_json::from_slice(&output.stdout).expect("JSON alone");
    let compiled = &kernels[0]["compiled"];
    for key in ["registers", "shared_bytes", "spill_bytes", "mix", "main_loop", "global_loads", "occupancy", "defects"]
    {
        assert!(compiled.get(key).is_some(), "no `{key}` in {compiled}");
    }
    assert!(compiled["main_loop"]["mix"]["tensor_core"].is_object(), "{}", compiled["main_loop"]);
    assert!(compiled["occupancy"]["limiter"].is_string() && compiled["occupancy"]["fraction"].as_f64() > Some(0.0));
    assert!(array(&compiled["defects"]).is_empty());

    let output = check(&["--dtype", "bf16"]);
    let text = String::from_utf8_lossy(&output.stdout).into_owned();
    for expected in ["registers", "occupancy: ", "limited by", "main loop, on tensor cores", "by bits: "] {
        assert!(text.contains(expected), "`{expected}` is not in: {text}");
    }
}
