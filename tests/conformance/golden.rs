//! Adapters and outputs that PEFT itself made (`tests/golden/make_peft.py`), through the device's kernels in mixed batches.

use std::path::{Path, PathBuf};

use flora::prelude::*;
use flora_adapters::{AdapterStore, Layers, StoreError};
use flora_checkpoint::{AdapterFolder, Model, read_matrices};

use super::case::{device, plans};

/// A folder of golden files: of `FLORA_GOLDEN` where the tests run away from the checkout that they were built in.
pub(crate) fn golden(name: &str) -> PathBuf {
    let built_in = || Path::new(env!("CARGO_MANIFEST_DIR")).join("tests/golden");
    std::env::var_os("FLORA_GOLDEN").map_or_else(built_in, PathBuf::from).join(name)
}

fn cases() -> Vec<PathBuf> {
    let folder = golden("peft");
    let mut cases: Vec<_> =
        folder.read_dir().expect("the golden folder").map(|entry| entry.expect("an entry").path()).collect();
    cases.sort();
    cases
}

#[test]
fn kernels_give_peft_s_outputs() {
    let mut refused = Vec::new();
    for case in cases() {
        let layers = Layers::builtin().expect("the built-in kinds");
        let adapter = AdapterFolder::open(&case.join("adapter"), layers.kinds()).expect("an adapter");
        let model = Model::open(&case.join("base.safetensors")).expect("a model");
        let name = adapter.name.clone();
        let store = AdapterStore::from_folders(vec![adapter], layers).expect("one adapter");
        match store.check_against(&model) {
            Err(StoreError::ScaledBias { .. }) => {
                refused.push(case.file_name().expect("a folder").to_string_lossy().into_owned());
                continue;
            }
            result => result.expect("an adapter of this model"),
        }
        let inputs = read_matrices(&case.join("inputs.safetensors")).expect("inputs");
        let outputs = read_matrices(&case.join("outputs.safetensors")).expect("outputs");
        for (module, expected) in &outputs {
            let base = model.weight(module).expect("a base weight");
            let folded = store.fold(module, &base).expect("the adapter folds");
            let shape = LayerShape { d: base.d as u32, k: base.k as u32 };
            let bias = base.bias.as_deref();
            let mut projection =
                Projection::new(device(), shape, &base.values, bias, Activation::Identity).expect("it fits");
            projection
                .load(folded.iter().map(|(name, loaded)| (*name, loaded.as_ref().map(|loaded| &loaded.folded))))
                .expect("it fits");
            // The same rows twice, base rows between them: what PEFT says of a row must not depend on its neighbours.
            let rows = inputs[module].rows as u32;
            let batch = Batch::new([(Some(name.as_str()), rows), (None, rows), (Some(name.as_str()), rows)]);
            let x = [&inputs[module].values[..]; 3].concat();
            for plan in plans() {
                let y = projection.forward(&batch, &plan, &x).expect("the batch runs");
                let (own, other) = (&y[..expected.values.len()], &y[2 * expected.values.len()..]);
                assert_eq!(own, other, "{} {module} {plan:?}", case.display());
                // Both sides round: twice the bound that the loader's test gives for PEFT against f64.
                let largest = expected.values.iter().fold(0.0f32, |largest, value| largest.max(value.abs()));
                let tolerance = 16.0 * (base.d as f32).sqrt() * f32::EPSILON / 2.0 * largest;
                for (found, expected) in own.iter().zip(&expected.values) {
                    assert!(
                        (found - expected).abs() <= tolerance,
                        "{} {module} {plan:?}: {found} {expected}",
                        case.display()
                    );
                }
            }
        }
    }
    // PEFT scales the bias with the output there, which a bias that all rows share can't do.
    assert_eq!(refused, ["ia3_bias"]);
}
