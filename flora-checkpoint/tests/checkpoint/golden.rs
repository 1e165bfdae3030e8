//! Adapters and outputs that PEFT itself made (`tests/golden/make_peft.py`), against flora's layers in f64.

use flora_checkpoint::{AdapterFolder, AdapterKinds, AdapterModule, Matrix, Model, Operand, read_matrices};
use flora_ir::{Bindings, Value, builtin, evaluate_root};
use std::path::{Path, PathBuf};

fn golden() -> PathBuf {
    Path::new(env!("CARGO_MANIFEST_DIR")).join("../tests/golden/peft")
}

fn f64s(values: &[f32]) -> Vec<f64> {
    values.iter().map(|value| f64::from(*value)).collect()
}

fn value(operand: &Operand) -> Value {
    match operand.shape[..] {
        [] => Value::scalar(operand.values[0].into()),
        [_] => Value::vector(f64s(&operand.values)),
        [rows, columns] => matrix(rows, columns, &operand.values),
        _ => panic!("an operand of shape {:?}", operand.shape),
    }
}

fn matrix(rows: usize, columns: usize, values: &[f32]) -> Value {
    Value::matrix(rows, columns, f64s(values)).expect("as many values as the extents say")
}

/// The module's output by the oracle, bias included.
fn expected(model: &Model, path: &str, adapter: &AdapterModule, inputs: &Matrix) -> Vec<f64> {
    let base = model.weight(path).expect("a base weight");
    let layer = builtin::builtin(&adapter.layer).expect("a built-in layer");
    let mut bindings = Bindings::new();
    bindings.insert("x", matrix(inputs.rows, inputs.columns, &inputs.values));
    bindings.insert("w0", matrix(base.d, base.k, &base.values));
    for (name, operand) in &adapter.operands {
        bindings.insert(name.clone(), value(operand));
    }
    let mut output = evaluate_root(layer, &bindings).expect("bound operands").data().to_vec();
    if let Some(bias) = base.bias {
        for (index, output) in output.iter_mut().enumerate() {
            let column = index % base.k;
            // PEFT scales the whole output of an IA3 module, its bias too.
            let scale = if adapter.layer == "ia3" { adapter.operands["l"].values[column] } else { 1.0 };
            *output += f64::from(bias[column]) * f64::from(scale);
        }
    }
    output
}

/// The worst error of any module of the case, relative to the module's largest output, in units of its tolerance.
///
/// PEFT sums d products in f32, each rounded to 2⁻²⁴ of its size; the roundings add up like a random walk, so √d·2⁻²⁴ of the
/// largest output, times 8 for the few sums that follow each other (base, shrink, expand, norm) and for the tail of the walk.
fn check(case: &Path) -> usize {
    let adapter = AdapterFolder::open(&case.join("adapter"), &AdapterKinds::builtin()).expect("an adapter");
    let model = Model::open(&case.join("base.safetensors")).expect("a model");
    adapter.check_against(&model).expect("an adapter of this model");
    let inputs = read_matrices(&case.join("inputs.safetensors")).expect("inputs");
    let outputs = read_matrices(&case.join("outputs.safetensors")).expect("outputs");
    assert_eq!(adapter.modules.keys().collect::<Vec<_>>(), outputs.keys().collect::<Vec<_>>(), "{}", case.display());
    for (path, module) in &adapter.modules {
        let (input, output) = (&inputs[path], &outputs[path]);
        let expected = expected(&model, path, module, input);
        assert_eq!(expected.len(), output.values.len());
        let largest = expected.iter().fold(0.0f64, |largest, value| largest.max(value.abs()));
        let tolerance = 8.0 * (input.columns as f64).sqrt() * 2f64.powi(-24) * largest;
        for (index, (expected, found)) in expected.iter().zip(&output.values).enumerate() {
            let error = (expected - f64::from(*found)).abs();
            assert!(error <= tolerance, "{} {path} [{index}]: {expected} is not PEFT's {found}", case.display());
        }
    }
    adapter.modules.len()
}

#[test]
fn every_adapter_that_peft_made_gives_peft_s_outputs() {
    let cases: Vec<PathBuf> =
        std::fs::read_dir(golden()).expect("the golden folder").map(|entry| entry.expect("an entry").path()).collect();
    assert_eq!(cases.len(), 11);
    let modules: usize = cases.iter().map(|case| check(case)).sum();
    assert_eq!(modules, 38);
}

#[test]
fn the_golden_adapters_cover_every_layer_that_peft_has() {
    let layer = |case: &str, path: &str| {
        let adapter =
            AdapterFolder::open(&golden().join(case).join("adapter"), &AdapterKinds::builtin()).expect("an adapter");
        let module = &adapter.modules[path];
        (module.layer.clone(), module.rank)
    };
    let (q, k) = ("model.layers.0.self_attn.q_proj", "model.layers.1.self_attn.k_proj");
    assert_eq!(layer("lora", q), ("lora".to_string(), 3));
    assert_eq!(layer("patterns", q), ("lora".to_string(), 5));
    assert_eq!(layer("patterns", k), ("lora".to_string(), 4));
    assert_eq!(layer("dora", q), ("dora".to_string(), 3));
    assert_eq!(layer("ia3", k), ("ia3".to_string(), 0));
    assert_eq!(layer("ia3", "model.layers.0.mlp.down_proj"), ("ia3_feedforward".to_string(), 0));
    assert_eq!(layer("hira", q), ("hira".to_string(), 3));
}

#[test]
fn golden_adapters_survive_writing() {
    for entry in std::fs::read_dir(golden()).expect("the golden folder") {
        let path = entry.expect("an entry").path().join("adapter");
        let adapter = AdapterFolder::open(&path, &AdapterKinds::builtin()).expect("an adapter");
        let parent = tempfile::tempdir().expect("a temporary folder");
        let written = adapter.write(parent.path()).expect("a writable adapter");
        let again = AdapterFolder::open(&written, &AdapterKinds::builtin()).expect("what was written");
        assert_eq!((again.kind, again.modules), (adapter.kind, adapter.modules), "{}", path.display());
    }
}
