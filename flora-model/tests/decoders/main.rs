//! Decoders against an independent implementation: transformers' logits and greedy continuations, with and without PEFT's adapters,
//! and the promise that a row's numbers don't depend on what else is in its batch.
//!
//! `FLORA_TEST_DEVICE` names the device (default: the host); on one that isn't there the tests fail, they are not skipped.

mod activated;
mod compositions;
mod ends;
mod families;
mod gates;
mod gguf;
#[path = "../../../flora-checkpoint/tests/checkpoint/gguf_writer.rs"]
#[expect(dead_code, reason = "written for the tests of files, which take more of it")]
mod gguf_writer;
mod golden;
mod invariance;
mod memory;
mod merged;
mod reference;
mod replaced;
mod rounded;
mod served;
mod spans;
mod trained;
mod trained_quantised;
mod trained_served;
mod training;

use flora_runtime::Device;

/// The tests' device.
fn device() -> Device {
    let id = std::env::var("FLORA_TEST_DEVICE").unwrap_or_else(|_| "host".to_owned());
    flora_devices::open(&id).expect("the tests' device")
}

fn is_host() -> bool {
    std::env::var("FLORA_TEST_DEVICE").map_or(true, |id| id == "host")
}
