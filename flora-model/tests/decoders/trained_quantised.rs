//! Twenty steps of training over a base that is kept in 8 bits, against the same over the numbers that it decodes to, in f32: which
//! are held against PyTorch in `trained`.

use std::collections::BTreeMap;
use std::path::Path;
use std::sync::Arc;

use flora_adapters::{BaseForm, Layers};
use flora_checkpoint::tensor::transpose;
use flora_checkpoint::{AdapterRequest, Encoding, Model};
use flora_model::{TrainOptions, TrainedModel};
use flora_train::{Ending, Happened, JobOptions, NewJob, Trainer};
use safetensors::SafeTensors;
use safetensors::tensor::{Dtype, TensorView};

use crate::served::golden;
use crate::trained::{KINDS, data, job, rms};
use crate::{device, families, gguf, is_host};

const STEPS: usize = 20;

/// What a job has come to.
#[derive(Debug, Default, PartialEq)]
struct Run {
    losses: Vec<f64>,
    norms: Vec<f64>,
    /// All parameters after the last step.
    weights: Vec<f32>,
}

/// Jobs of every kind in shared batches, by name.
fn run(model: &Model, base: BaseForm, jobs: &[NewJob], layers: &Layers) -> BTreeMap<String, Run> {
    let options = TrainOptions { base, ..TrainOptions::default() };
    let trained = TrainedModel::load(&device(), model, options).expect("a decoder");
    let mut trainer = Trainer::new(trained, 5 * 8 * 64);
    for job in jobs {
        trainer.add(job.clone(), Path::new("trained_quantised.rs"), layers).expect("a job");
    }
    let mut runs = BTreeMap::<String, Run>::new();
    while !trainer.is_idle() {
        for event in trainer.step() {
            if let Happened::Step { loss, norm, .. } = event.what {
                let run = runs.entry(event.job).or_default();
                run.losses.push(loss);
                run.norms.push(norm);
            }
        }
    }
    for ended in trainer.take_ended() {
        assert_eq!(ended.reason, Ending::Complete, "{}", ended.name);
        let run = runs.get_mut(&ended.name).expect("it made steps");
        run.weights = ended.adapter.parameters().flat_map(|own| own.values.values.clone()).collect();
    }
    runs
}

/// A copy of a model's folder whose projections have other numbers: those that they decode to once they are rounded to 8 bits.
fn rounded(model: &Model, from: &Path, to: &Path) {
    std::fs::copy(from.join("config.json"), to.join("config.json")).expect("a copy");
    let bytes = std::fs::read(from.join("model.safetensors")).expect("golden weights");
    let file = SafeTensors::deserialize(&bytes).expect("safetensors");
    let mut changed = 0;
    let tensors: Vec<(String, Vec<usize>, Vec<u8>)> = file
        .tensors()
        .into_iter()
        .map(|(name, view)| {
            assert_eq!(view.dtype(), Dtype::F32, "{name}");
            let path = name.trim_end_matches(".weight");
            let data = match model.projection(path) {
                Err(_) => view.data().to_vec(),
                Ok(projection) => {
                    changed += 1;
                    let values = BaseForm::Int8.weight(model, path).expect("its weight").values;
                    let stored = transpose(&values, projection.d, projection.k);
                    stored.into_iter().flat_map(f32::to_le_bytes).collect()
                }
            };
            (name, view.shape().to_vec(), data)
        })
        .collect();
    assert_eq!(changed, model.projections().len());
    let views = tensors.iter().map(|(name, shape, data)| {
        (name.as_str(), TensorView::new(Dtype::F32, shape.clone(), data).expect("numbers of the shape"))
    });
    safetensors::serialize_to_file(views, None, &to.join("model.safetensors")).expect("a file");
}

/// Asserts that jobs over a base in 8 bits come to what they come to over `dequantised`, and not to what they do over `other`, the
/// numbers before they were rounded.
fn assert_same(
    what: &str,
    found: &BTreeMap<String, Run>,
    dequantised: &BTreeMap<String, Run>,
    other: &BTreeMap<String, Run>,
) {
    assert!(found.keys().map(String::as_str).eq(sorted(KINDS)));
    for (kind, own) in found {
        assert_eq!(own.losses.len(), STEPS, "{what}, {kind}");
        // The host decodes a number as it packs it for a product, to the f32 that the other base has: nothing else is rounded.
        assert_eq!(own, &dequantised[kind], "{what}, {kind}");
        let far = rms(own.losses.iter().zip(&other[kind].losses).map(|(own, other)| own - other));
        assert!(far > 1e-4, "{what}, {kind}: rounding the base changed no more than {far:.2e} nats");
    }
}

fn sorted(mut names: [&str; KINDS.len()]) -> [&str; KINDS.len()] {
    names.sort_unstable();
    names
}

#[test]
fn twenty_steps_over_int8_are_those_over_its_numbers() {
    if !is_host() {
        // Training is the host's.
        return;
    }
    let layers = Layers::builtin().expect("the built-in kinds");
    let from = golden("llama_tiny").join("model");
    let model = Model::open(&from).expect("a golden model");
    let folder = tempfile::tempdir().expect("a temporary folder");
    rounded(&model, &from, folder.path());
    let dequantised = Model::open(folder.path()).expect("a copy of a golden model");
    let jobs = KINDS.map(|kind| job(kind, &layers));
    assert_same(
        "int8",
        &run(&model, BaseForm::Int8, &jobs, &layers),
        &run(&dequantised, BaseForm::F32, &jobs, &layers),
        &run(&model, BaseForm::F32, &jobs, &layers),
    );
}

#[test]
fn twenty_steps_over_blocks_of_a_file_are_those_over_their_numbers() {
    const CASE: &str = "qwen3_tied";
    if !is_host() {
        // Training is the host's.
        return;
    }
    let layers = Layers::builtin().expect("the built-in kinds");
    let folder = tempfile::tempdir().expect("a temporary folder");
    let path = folder.path().join("model.gguf");
    std::fs::write(&path, gguf::in_blocks(CASE, "qwen3")).expect("a file");
    let model = Model::open(&path).expect("a golden model in GGUF");
    let count = model.projections().iter().filter(|projection| projection.encoding == Encoding::Q8_0).count();
    assert!(count > 0, "some projections are in Q8_0");
    let vocabulary = model.decoder().expect("a decoder").vocabulary() as u32;
    let targets = ["q_proj", "k_proj", "up_proj"].map(str::to_owned).to_vec();
    let jobs = KINDS.map(|kind| {
        let golden = job(kind, &layers);
        let rank = (kind != "ia3").then_some(3);
        let adapter = AdapterRequest { rank, targets: targets.clone(), ..golden.options.adapter };
        let options = JobOptions { adapter, ..golden.options };
        NewJob { options, data: Arc::new(data(vocabulary)), begin: None, ..golden }
    });
    let unrounded = families::folder(CASE);
    assert_same(
        "Q8_0",
        &run(&model, BaseForm::Stored, &jobs, &layers),
        &run(&model, BaseForm::F32, &jobs, &layers),
        &run(&Model::open(unrounded.path()).expect("a golden model"), BaseForm::F32, &jobs, &layers),
    );
}
