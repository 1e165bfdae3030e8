//! What flora generates, held in files that are reviewed like code: `cargo insta review` shows what a change to a lowering or a
//! kernel does to every target's source.

mod compilations;
mod cuda;
mod decoders;
mod kernels;
mod plan;
mod report;

use flora::prelude::*;
use flora_codegen::target::{EmittedKernel, EqualBatch, Pass, Target, emit_gradient, emit_layer};
use flora_ir::builtin;
use flora_plan::lowering::lowerings_of;
use flora_plan::pipeline::CompiledLayer;

/// fLoRA with everything that an epilogue does.
#[flora::layer]
fn flora_finished(x: Tokens<D>, w0: Weight<D, K>, b: Adapter<D, R>, a: Adapter<R, K>, bias: Bias<K>) -> Tokens<K> {
    (x.matmul(w0 * b.matmul(a)) + bias).gelu()
}

/// LoRA with an epilogue, which runs by itself after the last addition.
#[flora::layer]
fn lora_finished(
    x: Tokens<D>,
    w0: Weight<D, K>,
    b: Adapter<D, R>,
    a: Adapter<R, K>,
    s: Scale,
    bias: Bias<K>,
) -> Tokens<K> {
    (x.matmul(w0 + s * b.matmul(a)) + bias).silu()
}

/// A batch to emit launches for: segments of so many rows, each with an adapter of its own.
#[derive(Clone, Copy, PartialEq, Eq)]
struct Load {
    d: u32,
    k: u32,
    rank: u32,
    segments: u32,
    rows: u32,
}

/// A few rows of a small layer.
const SMALL: Load = Load { d: 576, k: 192, rank: 4, segments: 3, rows: 5 };
/// The same where nothing divides anything.
const ODD: Load = Load { d: 61, k: 37, ..SMALL };
/// 32 requests that decode, at StarCoder 15B's query projection.
const DECODE: Load = Load { d: 6144, k: 6144, rank: 16, segments: 32, rows: 1 };
/// Four long prompts.
const PREFILL: Load = Load { d: 2048, k: 2048, rank: 16, segments: 4, rows: 256 };

/// A layer with one of its lowerings.
struct Lowered {
    name: &'static str,
    layer: CompiledLayer,
    lowering: &'static str,
    pass: Pass,
    plan: Plan,
}

/// Every built-in layer, and two with an epilogue, with every lowering that it has.
fn lowered() -> Vec<Lowered> {
    let mut all = Vec::new();
    let builtin = |name| builtin::builtin(name).expect("a built-in layer").clone();
    let layers = builtin::names().map(|name| (name, builtin(name)));
    for (name, layer) in
        layers.chain([("flora finished", flora_finished::layer()), ("lora finished", lora_finished::layer())])
    {
        let layer = compile_verified(layer).expect("it compiles");
        let (pass, default) = (Pass::Forward, Plan::default());
        if layer.parts.is_empty() {
            all.push(Lowered { name, layer: layer.clone(), lowering: "gemm", pass, plan: default });
        }
        for part in &layer.parts {
            for row in lowerings_of(*part) {
                let plan = default.with_part(row.computes);
                if !plan.merges() {
                    all.push(Lowered { name, layer: layer.clone(), lowering: row.lowering().name(), pass, plan });
                }
            }
        }
        if name == "flora" {
            let plan = default.with_split();
            all.push(Lowered { name, layer: layer.clone(), lowering: "stacked split", pass, plan });
        }
        if ["flora", "lora"].contains(&name) {
            all.push(Lowered { name, layer, lowering: "gradient", pass: Pass::Backward, plan: Plan::fixed_adjoint() });
        }
    }
    all
}

impl Lowered {
    fn emit(&self, target: Target, format: LayerFormat, load: Load) -> Vec<EmittedKernel> {
        let Load { d, k, rank, segments, rows } = load;
        let emit = match self.pass {
            Pass::Forward => emit_layer,
            Pass::Backward => emit_gradient,
        };
        let emitted =
            emit(&self.layer, target, self.plan, (LayerShape { d, k }, format), EqualBatch { rank, segments, rows });
        emitted.unwrap_or_else(|error| panic!("{} {} for {target}: {error}", self.name, self.lowering))
    }

    fn title(&self) -> String {
        format!("{} {}", self.name, self.lowering)
    }
}

/// f16 throughout, the weight quantised.
fn quantised(weight: WeightFormat) -> LayerFormat {
    LayerFormat { weight, ..LayerFormat::uniform(Element::F16) }
}
