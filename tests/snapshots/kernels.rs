//! The launches of every layer and lowering, and the source of every kernel for CUDA, WGSL and SPIR-V.

use std::collections::BTreeMap;
use std::fmt::Write;

use flora::prelude::*;

use super::{is_ours, lowered};

const TARGETS: [&str; 3] = ["cuda:sm_90", "wgsl", "spirv"];

#[test]
fn launches() {
    for name in TARGETS {
        let target: Target = name.parse().expect("a target");
        let mut text = String::new();
        for lowered in lowered() {
            writeln!(text, "{}", lowered.title()).expect("a String takes all");
            for kernel in lowered.emit(target, 576, 192) {
                let cubes = kernel.cube_count.map_or_else(|| "dynamic".to_owned(), |count| format!("{count:?}"));
                writeln!(text, "    {:<70} units {:<14} cubes {cubes}", kernel.name, format!("{:?}", kernel.cube_dim))
                    .expect("a String takes all");
            }
        }
        insta::assert_snapshot!(format!("launches {}", name.replace(':', " ")), text);
    }
}

/// The first of every kernel's variants by name, with vectors and without: k = 192 divides by 4, k = 37 does not.
#[test]
fn sources() {
    for name in TARGETS {
        let target: Target = name.parse().expect("a target");
        let mut sources = BTreeMap::new();
        for lowered in lowered() {
            for (d, k) in [(576, 192), (61, 37)] {
                for kernel in lowered.emit(target, d, k).into_iter().filter(is_ours) {
                    sources.entry(kernel.name).or_insert(kernel.source);
                }
            }
        }
        for (kernel, source) in sources {
            insta::assert_snapshot!(format!("{} {kernel}", name.replace(':', " ")), source);
        }
    }
}

/// The text of flora's kernels doesn't depend on what was generated before, on the thread, or on chance. (The matmul library's
/// overlap shared arrays that are never alive together, and which ones cubecl lays over each other is chance.)
#[test]
fn sources_are_stable() {
    let all = lowered();
    for name in TARGETS {
        let target: Target = name.parse().expect("a target");
        let emit = |position: usize| {
            let kernels = all[position].emit(target, 576, 192).into_iter();
            kernels.filter(is_ours).collect::<Vec<_>>()
        };
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

/// WebGPU's default longest buffer is 128 MiB: three weights of 64 MiB are refused, not cut.
#[test]
fn a_batch_that_the_target_cannot_hold_is_refused() {
    let flora = lowered().into_iter().find(|lowered| lowered.title() == "flora bmm").expect("a row of the table");
    let emit = |name: &str| {
        let target: Target = name.parse().expect("a target");
        flora.layer.emit(target, flora.plan, LayerShape { d: 4096, k: 4096 }, LayerFormat::default(), 1, 3, 1)
    };
    let refused = emit("wgsl").expect_err("too large").to_string();
    assert_eq!(
        refused,
        "the batch needs a buffer of 201326592 bytes and the device takes 134217728; split the batch, or use another lowering"
    );
    assert!(emit("cuda:sm_90").is_ok());
}
