//! Decoders against an independent implementation: transformers' logits and greedy continuations, with and without PEFT's adapters,
//! and the promise that a row's numbers don't depend on what else is in its batch.
//!
//! `FLORA_TEST_DEVICE` names the device (default: the host); on one that isn't there the tests fail, they are not skipped.

mod compositions;
mod golden;
mod invariance;
mod served;

use flora_runtime::{Device, Place};

/// What a test asks of a model on whatever device it is.
type Check = fn(&mut dyn served::Model);

/// Runs `check` on the golden model `name` on the tests' device.
fn on_device(name: &str, check: Check) {
    let id = std::env::var("FLORA_TEST_DEVICE").unwrap_or_else(|_| "host".to_owned());
    let device = Device::open(&id).expect("the tests' device");
    match device.place() {
        Place::Host => check(&mut served::load::<flora_burn::Host>(&device, name)),
        Place::Wgpu(_) => check(&mut served::load::<flora_burn::Wgpu>(&device, name)),
        Place::Cuda(_) => check(&mut served::load::<flora_burn::Cuda>(&device, name)),
    }
}

fn is_host() -> bool {
    std::env::var("FLORA_TEST_DEVICE").map_or(true, |id| id == "host")
}
