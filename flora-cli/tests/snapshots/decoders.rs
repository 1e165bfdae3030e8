//! Steps of decoders whose launches between projections are held.

use flora_codegen::target::decoder::{DecoderStep, emit_decoder};
use flora_codegen::target::{EmittedKernel, Target};
use flora_plan::layer::Element;
use flora_runtime::decoding::Heads;

/// A model's attention and a step of it.
#[derive(Clone, Copy)]
pub(crate) struct Step {
    name: &'static str,
    heads: Heads,
    rotates: bool,
    window: Option<u32>,
    width: usize,
    sequences: &'static [(usize, usize)],
}

/// Sequences of a chat of a Llama, of which one has a long prompt and one is long; and StarCoder's, whose queries have one head of keys
/// in common.
pub(crate) const STEPS: [Step; 2] = [
    Step {
        name: "llama step",
        heads: Heads { queries: 32, keys: 8, size: 128 },
        rotates: true,
        window: None,
        width: 4096,
        sequences: &[(0, 300), (700, 1), (31, 1)],
    },
    Step {
        name: "starcoder step",
        heads: Heads { queries: 48, keys: 1, size: 128 },
        rotates: false,
        window: Some(4096),
        width: 6144,
        sequences: &[(1000, 1)],
    },
];

/// Its launches, and what they are called beside their names.
pub(crate) fn emit_step(target: Target, step: Step, element: Element) -> Vec<(String, EmittedKernel)> {
    let Step { name, heads, rotates, window, width, sequences } = step;
    let step = DecoderStep { heads, rotates, window, centred: !rotates, width, element, sequences };
    let kernels = emit_decoder(target, &step).unwrap_or_else(|error| panic!("{name}: {error}"));
    kernels.into_iter().enumerate().map(|(at, kernel)| (format!("{name} {element} {at}"), kernel)).collect()
}
