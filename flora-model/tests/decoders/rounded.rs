//! Activations in 8 bits: what they cost is told, and asked for in vain they are refused.

use flora_adapters::BaseForm;
use flora_checkpoint::Model;
use flora_model::{ServeError, ServeOptions, rounding_cost};
use flora_plan::layer::Element;
use flora_runtime::Device;

use crate::served::{Files, Served, golden, load_files};
use crate::{device, is_host};

fn rounding() -> Device {
    device().rounding_activations().expect("the host rounds")
}

/// A golden model whose weights are in int8, on the host that rounds activations.
pub(crate) fn load(name: &str) -> Served {
    let of = |part: &str| golden(name).join(part);
    let (model, outputs, adapters) = (of("model"), of("outputs"), of("adapters"));
    let files = Files { model, outputs, adapters, base: BaseForm::Int8 };
    load_files(name, &files, Element::F32, |model, options| flora_model::load(&rounding(), model, options))
}

#[test]
fn what_rounding_costs_is_measured_or_refused() {
    if !is_host() {
        println!("NOT RUN: the host alone rounds activations");
        return;
    }
    let model = Model::open(&golden("llama_tiny").join("model")).expect("a golden model");
    let cost = |base: BaseForm, device: Device| {
        let options = ServeOptions { base, ..ServeOptions::default() };
        let mut decoder = flora_model::load(&device, &model, &options).expect("a decoder");
        [rounding_cost(&device, &mut decoder), rounding_cost(&device, &mut decoder)]
    };
    let [first, second] = cost(BaseForm::Int8, rounding()).map(|cost| cost.expect("weights of 8 bits"));
    assert_eq!(first, second, "the model is as it was before");
    // A 127th of a block's largest number is off by a half, in each of a few layers.
    assert!(first.difference > 1e-4 && first.difference < 0.1, "{first}");
    assert!(first.tokens > 0 && first.other_likeliest < first.tokens / 4, "{first}");
    for [refused, _] in [cost(BaseForm::Int8, device()), cost(BaseForm::F32, rounding())] {
        assert!(matches!(refused, Err(ServeError::NothingRounded)), "{refused:?}");
    }
}
