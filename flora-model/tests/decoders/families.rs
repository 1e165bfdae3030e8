//! The families whose blocks are Llama's but for a few fields, and the scalings of rotary positions: tests/golden/families.py.

use flora_adapters::BaseForm;
use flora_checkpoint::Model;
use flora_model::{DeviceModel, ServeError, ServeOptions};
use flora_plan::layer::Element;

use crate::device;
use crate::golden::check;
use crate::served::{Files, Served, golden, load_files};

/// Each with its outputs.
pub(crate) const CASES: [(&str, &[&str]); 12] = [
    ("llama", &["base", "lora"]),
    ("llama3", &["base", "lora"]),
    ("theta_inside", &["base"]),
    ("linear", &["base", "lora"]),
    ("yarn", &["base", "lora"]),
    ("yarn_mscale", &["base"]),
    ("mistral", &["base", "lora"]),
    ("mistral_without_window", &["base"]),
    ("qwen2", &["base", "lora", "dora"]),
    ("qwen2_window", &["base"]),
    ("qwen3", &["base", "lora", "dora", "ia3", "hira"]),
    ("qwen3_tied", &["base"]),
];

/// Which of the weights a case has: those that its family has tensors for.
pub(crate) fn weights(case: &str) -> &'static str {
    match case {
        "qwen3_tied" => "norms_tied",
        case if case.starts_with("qwen3") => "norms",
        case if case.starts_with("qwen2") => "biases",
        _ => "plain",
    }
}

/// Where the outputs and adapters of a case are, and `model`.
pub(crate) fn files(case: &str, model: &std::path::Path) -> Files {
    let families = golden("families");
    let (outputs, adapters) = (families.join(case).join("outputs"), families.join("adapters"));
    Files { model: model.to_owned(), outputs, adapters, base: BaseForm::default() }
}

pub(crate) fn load(case: &str) -> Served {
    load_by(case, Element::F32, |model, options| flora_model::load(&device(), model, options))
}

pub(crate) fn load_by(
    case: &str,
    element: Element,
    load: impl FnOnce(&Model, &ServeOptions<'_>) -> Result<DeviceModel, ServeError>,
) -> Served {
    let folder = folder(case);
    // The files are mapped: they stay as long as something reads them, though their names go.
    load_files(case, &files(case, folder.path()), element, load)
}

/// The model of a case.
pub(crate) fn folder(case: &str) -> tempfile::TempDir {
    let families = golden("families");
    let folder = tempfile::tempdir().expect("a temporary folder");
    let weights = families.join("weights").join(weights(case)).with_extension("safetensors");
    let copy = |from, name: &str| std::fs::copy(from, folder.path().join(name)).expect("copying a golden file");
    copy(families.join(case).join("config.json"), "config.json");
    copy(weights, "model.safetensors");
    folder
}

#[test]
fn families_equal_transformers() {
    for (case, outputs) in CASES {
        let mut model = load(case);
        outputs.iter().for_each(|name| check(&mut model, name));
    }
}
