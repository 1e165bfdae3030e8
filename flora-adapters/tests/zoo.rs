//! Adapters of PEFT's zoo and PEFT's own outputs (`tests/golden/make_zoo.py`): loaded, derived and folded, in f64.

use std::collections::{BTreeMap, BTreeSet};
use std::path::{Path, PathBuf};

use flora_adapters::{AdapterStore, Layers, zoo};
use flora_checkpoint::{AdapterFolder, Model, read_matrices};
use flora_ir::{Activation, Value};

fn golden() -> PathBuf {
    Path::new(env!("CARGO_MANIFEST_DIR")).join("../tests/golden/zoo")
}

fn matrix(rows: usize, columns: usize, values: &[f32]) -> Value {
    let values = values.iter().map(|value| f64::from(*value)).collect();
    Value::matrix(rows, columns, values).expect("as many values as the extents say")
}

/// What is wrong with a case. Tolerances are those of `flora-checkpoint/tests/checkpoint/golden.rs`, for twice as many sums: PEFT
/// multiplies three factors of a weight in f32, one after the other.
fn check(case: &Path, layers: &Layers, modules: &mut usize) -> Result<String, String> {
    let failed = |error: &dyn std::fmt::Display| format!("{}: {error}", case.display());
    let adapter = AdapterFolder::open(&case.join("adapter"), layers.kinds()).map_err(|error| failed(&error))?;
    let model = Model::open(&case.join("base.safetensors")).map_err(|error| failed(&error))?;
    adapter.check_against(&model).map_err(|error| failed(&error))?;
    let adapted = layers.prepare(&adapter, &model).map_err(|error| failed(&error))?;
    let inputs = read_matrices(&case.join("inputs.safetensors")).expect("inputs");
    let outputs = read_matrices(&case.join("outputs.safetensors")).expect("outputs");
    assert!(adapted.modules.keys().eq(outputs.keys()), "{}", case.display());
    for (path, folded) in &adapted.modules {
        let base = model.weight(path).expect("a base weight");
        let mut bias: Vec<f64> = base.bias.iter().flatten().map(|bias| f64::from(*bias)).collect();
        bias.resize(base.k, 0.0);
        let offset = adapted.bias_offsets.get(path).into_iter().flatten();
        bias.iter_mut().zip(offset).for_each(|(bias, offset)| *bias += f64::from(*offset));
        let x = matrix(inputs[path].rows, base.d, &inputs[path].values);
        let w0 = matrix(base.d, base.k, &base.values);
        let found = folded.apply(&x, &w0, Some(&Value::vector(bias)), Activation::Identity).expect("it fits");
        let largest = found.data().iter().fold(0.0f64, |largest, value| largest.max(value.abs()));
        let tolerance = 16.0 * (base.d as f64).sqrt() * 2f64.powi(-24) * largest;
        for (index, (found, expected)) in found.data().iter().zip(&outputs[path].values).enumerate() {
            let error = (found - f64::from(*expected)).abs();
            if error > tolerance {
                return Err(failed(&format!("{path} [{index}]: {found} is not PEFT's {expected} ({tolerance})")));
            }
        }
        // What is sparse stays so, and has the entries of its structure.
        let layer = layers.compiled(&adapter.modules[path].layer).expect("a compiled layer");
        if layer.linear.is_sparse() {
            let entries = folded.sparse.entries();
            assert!(folded.low_rank.is_empty() && entries > 0, "{}", case.display());
            let most = match adapter.kind.name() {
                "road" => 2 * base.k,
                "shira" => adapter.modules[path].operands["numbers"].values.len(),
                _ => base.d * base.d.max(base.k),
            };
            assert!(entries <= most, "{}: {entries} entries and not {most}", case.display());
        }
        *modules += 1;
    }
    Ok(adapter.kind.name().to_owned())
}

#[test]
fn every_kind_of_the_zoo_gives_peft_s_outputs() {
    let layers = Layers::builtin().expect("the built-in kinds");
    let mut cases: Vec<PathBuf> =
        std::fs::read_dir(golden()).expect("the golden folder").map(|entry| entry.expect("an entry").path()).collect();
    cases.sort();
    let (mut kinds, mut modules, mut wrong) = (BTreeMap::<String, usize>::new(), 0, Vec::new());
    for case in &cases {
        match check(case, &layers, &mut modules) {
            Ok(kind) => *kinds.entry(kind).or_default() += 1,
            Err(error) => wrong.push(error),
        }
    }
    assert!(wrong.is_empty(), "{}", wrong.join("\n"));
    // Every kind but those of `tests/golden/peft` and flora's own, in two settings at least.
    let elsewhere = BTreeSet::from(["lora", "dora", "ia3", "hira", "flora"]);
    let described = layers.kinds().descriptions().flat_map(|kind| &kind.layers).map(|layer| layer.kind());
    let described: BTreeSet<&str> = described.filter(|kind| !elsewhere.contains(kind)).collect();
    assert!(kinds.keys().map(String::as_str).eq(described), "{kinds:?}");
    assert!(kinds.values().all(|cases| *cases >= 2), "{kinds:?}");
    assert_eq!(modules, 156);
}

/// A file of a golden case with a few numbers of its header, config or data changed.
fn mutated(case: &Path, parent: &Path, changes: &[(bool, u32, u8)]) -> PathBuf {
    let folder = parent.join("mutated");
    std::fs::create_dir_all(&folder).expect("a temporary folder");
    for name in ["adapter_config.json", "adapter_model.safetensors"] {
        let mut bytes = std::fs::read(case.join("adapter").join(name)).expect("a golden file");
        let is_config = name.ends_with("json");
        // Digits become digits: shapes and numbers that are other ones, in files that are still read.
        let mut places: Vec<usize> = (0..bytes.len()).filter(|at| bytes[*at].is_ascii_digit()).collect();
        places.truncate(if is_config { places.len() } else { places.len() * 2 / 3 });
        for (_, at, digit) in changes.iter().filter(|(config, ..)| *config == is_config) {
            if let Some(place) = places.get(*at as usize % places.len().max(1)) {
                bytes[*place] = b'0' + digit % 10;
            }
        }
        std::fs::write(folder.join(name), bytes).expect("a writable folder");
    }
    folder
}

/// Whatever the numbers of a folder are, it is an adapter or an error with words.
#[test]
fn changed_folders_are_adapters_or_errors() {
    let layers = Layers::builtin().expect("the built-in kinds");
    let mut cases: Vec<PathBuf> =
        std::fs::read_dir(golden()).expect("the golden folder").map(|entry| entry.expect("an entry").path()).collect();
    cases.sort();
    let mut state = 0x00F1_0AA0u64;
    let mut random = || {
        state = state.wrapping_mul(6_364_136_223_846_793_005).wrapping_add(1_442_695_040_888_963_407);
        (state >> 33) as u32
    };
    let (mut refused, mut accepted) = (0, 0);
    for case in &cases {
        let model = Model::open(&case.join("base.safetensors")).expect("a model");
        for round in 0..40 {
            let changes: Vec<(bool, u32, u8)> =
                (0..=round % 4).map(|_| (random() % 2 == 0, random(), (random() % 10) as u8)).collect();
            let parent = tempfile::tempdir().expect("a temporary folder");
            let folder = mutated(case, parent.path(), &changes);
            let opened = AdapterFolder::open(&folder, layers.kinds()).map_err(|error| error.to_string());
            let prepared = opened.and_then(|adapter| {
                // What isn't held against the model first, too.
                let store = AdapterStore::from_folders(vec![adapter.clone()], layers.clone()).expect("one adapter");
                for path in adapter.modules.keys() {
                    if let Ok(base) = model.weight(path) {
                        drop(store.fold(path, &base).map_err(|error| assert!(!error.to_string().is_empty())));
                    }
                }
                layers.prepare(&adapter, &model).map_err(|error| error.to_string())
            });
            match prepared {
                Ok(adapted) => {
                    accepted += 1;
                    let rows = adapted.modules.values().flat_map(|folded| &folded.low_rank);
                    assert!(
                        rows.flat_map(|pair| pair.shrink.iter().chain(&pair.expand)).all(|number| number.is_finite())
                    );
                    let matrices = adapted.modules.values().flat_map(|folded| folded.sparse.matrices());
                    assert!(matrices.flat_map(|matrix| matrix.values()).all(|number| number.is_finite()));
                }
                Err(error) => {
                    refused += 1;
                    assert!(!error.is_empty());
                }
            }
        }
    }
    assert!(refused > 100 && accepted > 100, "{refused} refused, {accepted} accepted");
}

/// The table of `docs/adapters.md` is what the command prints, and has every kind of PEFT (`tests/golden/peft_types.txt`).
#[test]
fn the_table_of_kinds_is_the_one_that_is_printed() {
    let layers = Layers::builtin().expect("the built-in kinds");
    let root = Path::new(env!("CARGO_MANIFEST_DIR")).join("..");
    let types = std::fs::read_to_string(root.join("tests/golden/peft_types.txt")).expect("PEFT's kinds");
    let listed: BTreeSet<String> = zoo::kinds(&layers).into_iter().map(|kind| kind.peft_type).collect();
    let expected: BTreeSet<String> = types.lines().map(str::to_owned).chain(["FLORA".to_owned()]).collect();
    assert_eq!(listed, expected);
    let page = root.join("docs/adapters.md");
    let text = std::fs::read_to_string(&page).expect("the page");
    let (marks, table) = (["<!-- flora explain --zoo -->\n", "<!-- end -->"], zoo::markdown(&layers));
    let (before, rest) = text.split_once(marks[0]).expect("the first mark");
    let (own, after) = rest.split_once(marks[1]).expect("the second mark");
    if std::env::var_os("FLORA_UPDATE_DOCS").is_some() {
        std::fs::write(&page, format!("{before}{}{table}{}{after}", marks[0], marks[1])).expect("a writable page");
        return;
    }
    assert_eq!(own, table, "write it anew: FLORA_UPDATE_DOCS=1 cargo test -p flora-adapters --test zoo");
}
