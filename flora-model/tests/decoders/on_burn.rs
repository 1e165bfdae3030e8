//! The operations of Burn's backends, which decoders run on on every device but the host, on the backend that needs no device.

use flora_burn::{BurnDevice, Host};
use flora_plan::layer::Element;

use crate::families;
use crate::golden::check;
use crate::invariance::crowd_changes_no_bit;
use crate::served::{Served, load_by};

fn load(name: &str) -> Served {
    let device = BurnDevice::<Host>::of(&flora_devices::host()).expect("the host");
    load_by(name, Element::F32, |model, options| flora_model::load_on_burn(&device, model, options))
}

#[test]
fn gpt_big_code_equals_transformers() {
    let mut model = load("gpt_bigcode");
    ["base", "lora", "lora_all"].iter().for_each(|name| check(&mut model, name));
}

#[test]
fn a_llama_equals_transformers() {
    let mut model = load("llama_tiny");
    ["base", "lora", "hira"].iter().for_each(|name| check(&mut model, name));
}

#[test]
fn families_equal_transformers() {
    for (case, outputs) in families::CASES {
        let device = BurnDevice::<Host>::of(&flora_devices::host()).expect("the host");
        let mut model =
            families::load_by(case, Element::F32, |model, options| flora_model::load_on_burn(&device, model, options));
        outputs.iter().for_each(|name| check(&mut model, name));
        if case == "mistral" {
            crowd_changes_no_bit(&mut model);
        }
    }
}

#[test]
fn the_rest_of_the_batch_changes_no_bit() {
    ["llama_tiny", "gpt_bigcode"].iter().for_each(|name| crowd_changes_no_bit(&mut load(name)));
}
