//! The launches of every layer and lowering for CUDA, WGSL and SPIR-V, and the source of every kernel for CUDA and WGSL. The
//! disassembled SPIR-V of a kernel with several loop variables is no snapshot: cubecl orders their phis by chance.

use std::fmt::Write;

use flora::prelude::*;
use flora_codegen::target::{EqualBatch, Target, emit_layer};

use super::decoders::{self, emit_step};
use super::{Load, ODD, SMALL, lowered, quantised};

const TARGETS: [&str; 3] = ["cuda:sm_90", "wgsl", "spirv"];

/// The targets whose text is the same at every run.
const STABLE: [&str; 2] = ["cuda:sm_90", "wgsl"];

fn target(name: &str) -> Target {
    name.parse().expect("a target")
}

#[test]
fn launches() {
    for name in TARGETS {
        let mut text = String::new();
        for lowered in lowered() {
            writeln!(text, "{}", lowered.title()).expect("a String takes all");
            for kernel in lowered.emit(target(name), LayerFormat::default(), SMALL) {
                let cubes = kernel.cube_count.map_or_else(|| "dynamic".to_owned(), |count| format!("{count:?}"));
                writeln!(text, "    {:<70} units {:<14} cubes {cubes}", kernel.name, format!("{:?}", kernel.cube_dim))
                    .expect("a String takes all");
            }
        }
        insta::assert_snapshot!(format!("launches {}", name.replace(':', " ")), text);
    }
}

/// What is printed: every kernel and every option of the tile kernel once, in f32; by fragments in f16; quantised.
fn printed(name: &str) -> Vec<(&'static str, LayerFormat, Load)> {
    let single = LayerFormat::default();
    let mut printed = vec![
        ("linear gemm", single, SMALL),
        ("linear gemm", single, ODD),
        ("flora stacked", single, SMALL),
        ("flora stacked split", single, Load { d: 2048, ..SMALL }),
        ("flora on_chip", single, SMALL),
        ("flora bmm", single, SMALL),
        ("lora fused", single, SMALL),
        ("lora segmented", single, SMALL),
        ("lora bmm", single, SMALL),
        ("flora finished stacked", single, SMALL),
        ("lora finished segmented", single, SMALL),
        ("flora gradient", single, SMALL),
        ("lora gradient", single, SMALL),
        ("linear gemm", LayerFormat { weight: WeightFormat::Q4_1, ..single }, SMALL),
    ];
    // WGSL has no fragments and, in cubecl, no f16 without them worth a snapshot.
    if name != "wgsl" {
        let half = LayerFormat::uniform(Element::F16);
        printed.extend([
            ("linear gemm", half, SMALL),
            ("flora stacked", half, SMALL),
            ("flora on_chip", half, SMALL),
            ("lora fused", half, SMALL),
            ("lora segmented", half, SMALL),
            ("flora gradient", half, SMALL),
            ("linear gemm", quantised(WeightFormat::Q8_0), SMALL),
            // Of each way to decode one: two planes of bits with minima, scales of 16 inputs, a codebook.
            ("linear gemm", quantised(WeightFormat::Q5_K), Load { d: 512, ..SMALL }),
            ("linear gemm", quantised(WeightFormat::Q6_K), Load { d: 512, ..SMALL }),
            ("linear gemm", quantised(WeightFormat::IQ4_NL), SMALL),
        ]);
    }
    printed
}

#[test]
fn sources() {
    for name in STABLE {
        let mut seen = std::collections::BTreeSet::new();
        for (title, format, load) in printed(name) {
            let lowered = lowered().into_iter().find(|lowered| lowered.title() == title).expect("a title");
            for (position, kernel) in lowered.emit(target(name), format, load).into_iter().enumerate() {
                if seen.insert(kernel.source.clone()) {
                    let weight = if format.weight.quantisation().is_some() { format.weight.name() } else { "" };
                    let title = format!("{title} {} {weight} {}x{}", format.activations, load.d, load.k);
                    let kernel_name = format!("{} {title} {position} {}", name.replace(':', " "), kernel.name);
                    insta::assert_snapshot!(kernel_name, kernel.source);
                }
            }
        }
    }
}

/// What decoders launch between projections: in f32, and in f16 for CUDA.
#[test]
fn decoder_sources() {
    for name in STABLE {
        let elements = if name == "wgsl" { &[Element::F32][..] } else { &[Element::F32, Element::F16] };
        let mut seen = std::collections::BTreeSet::new();
        let steps = elements.iter().flat_map(|element| decoders::STEPS.map(|step| (step, *element)));
        for (title, kernel) in steps.flat_map(|(step, element)| emit_step(target(name), step, element)) {
            if seen.insert(kernel.source.clone()) {
                insta::assert_snapshot!(format!("{} {title} {}", name.replace(':', " "), kernel.name), kernel.source);
            }
        }
    }
}

/// The text doesn't depend on what was generated before, on the thread, or on chance.
#[test]
fn sources_are_stable() {
    let all = lowered();
    for name in STABLE {
        let formats = if name == "wgsl" { vec![Element::F32] } else { vec![Element::F32, Element::F16] };
        for format in formats.into_iter().map(LayerFormat::uniform) {
            let emit = |position: usize| all[position].emit(target(name), format, SMALL);
            let forwards: Vec<_> = (0..all.len()).map(emit).collect();
            let mut backwards: Vec<_> =
                std::thread::scope(|scope| scope.spawn(|| (0..all.len()).rev().map(emit).collect()).join())
                    .expect("no panic");
            backwards.reverse();
            for (one, other) in forwards.iter().flatten().zip(backwards.iter().flatten()) {
                let mut lines = one.source.lines().zip(other.source.lines());
                assert_eq!(lines.find(|(one, other)| one != other), None, "{} for {name}", one.name);
            }
            assert_eq!(forwards, backwards);
        }
    }
}

/// WebGPU's default longest buffer is 128 MiB: three weights of 64 MiB are refused, not cut.
#[test]
fn a_batch_that_the_target_cannot_hold_is_refused() {
    let flora = lowered().into_iter().find(|lowered| lowered.title() == "flora bmm").expect("a row of the table");
    let emit = |name: &str| {
        let format = LayerFormat::default();
        let batch = EqualBatch { rank: 1, segments: 3, rows: 1 };
        emit_layer(&flora.layer, target(name), flora.plan, (LayerShape { d: 4096, k: 4096 }, format), batch)
    };
    let refused = emit("wgsl").expect_err("too large").to_string();
    assert_eq!(
        refused,
        "the batch needs a buffer of 201326592 bytes and the device takes 134217728; split the batch, or use another lowering"
    );
    assert!(emit("cuda:sm_90").is_ok());
}
