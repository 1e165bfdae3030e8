//! Adapter folders that are written, changed, broken, taken away and put back.

use std::collections::BTreeMap;
use std::fs;
use std::path::Path;
use std::sync::atomic::{AtomicBool, Ordering};
use std::thread;
use std::time::Duration;

use flora_checkpoint::{AdapterFolder, AdapterKinds, AdapterModule, Model, Operand, Projection};

/// Folders.
const COUNT: usize = 30;
const RANK: usize = 4;
const CONFIG: &str = "adapter_config.json";
const TENSORS: &str = "adapter_model.safetensors";

/// The modules that adapters adapt.
pub(crate) fn adapted(model: &Model) -> Vec<String> {
    let names = ["q_proj", "k_proj", "c_attn"].map(str::to_owned);
    names.into_iter().filter(|name| model.projections().iter().any(|own| own.path.ends_with(name.as_str()))).collect()
}

fn modules(model: &Model) -> impl Iterator<Item = &Projection> {
    let names = adapted(model);
    model.projections().iter().filter(move |own| names.iter().any(|name| own.path.ends_with(name.as_str())))
}

/// Bytes of one of them on the device.
pub(crate) fn bytes(model: &Model) -> u64 {
    modules(model).map(|own| (own.d + own.k) as u64 * RANK as u64 * 4).sum()
}

fn write(folder: &Path, model: &Model, number: usize, seed: u64) {
    let mut random = fastrand::Rng::with_seed(seed);
    let mut operand = |shape: Vec<usize>, centre: f32, half_width: f32| {
        let count = shape.iter().product();
        let values = (0..count).map(|_| centre + half_width * (2.0 * random.f32() - 1.0)).collect();
        Operand { shape, values }
    };
    let (layer, centre) = match number % 3 {
        0 => ("lora", 0.0),
        1 => ("flora", 0.5),
        _ => ("hira", 0.0),
    };
    let module = |own: &Projection| {
        let (b, a) = (operand(vec![own.d, RANK], centre, 0.1), operand(vec![RANK, own.k], centre, 0.1));
        let mut operands = BTreeMap::from([("b".to_owned(), b), ("a".to_owned(), a)]);
        if layer == "lora" {
            operands.insert("s".to_owned(), Operand { shape: Vec::new(), values: vec![2.0] });
        }
        (own.path.clone(), AdapterModule { layer: layer.to_owned(), rank: RANK, operands })
    };
    let modules = modules(model).map(module).collect();
    let kind = AdapterKinds::builtin().kind_of_layer(layer).expect("a built-in layer");
    // A folder is written once; another one takes its place.
    let _ = fs::remove_dir_all(folder.join(format!("adapter-{number}")));
    AdapterFolder::new(format!("adapter-{number}"), kind, modules).write(folder).expect("a folder that can be written");
}

/// Writes all of them; their names.
pub(crate) fn write_all(folder: &Path, model: &Model) -> Vec<String> {
    (0..COUNT).for_each(|number| write(folder, model, number, number as u64));
    (0..COUNT).map(|number| format!("adapter-{number}")).collect()
}

/// Changes one folder after the other until `stop`; how many.
pub(crate) fn change(folder: &Path, model: &Model, names: &[String], stop: &AtomicBool) -> usize {
    let mut random = fastrand::Rng::with_seed(99);
    let mut changes = 0;
    while !stop.load(Ordering::SeqCst) {
        let number = random.usize(0..names.len());
        let own = folder.join(&names[number]);
        match random.u8(0..6) {
            // Half a file, as a copy that was broken off leaves it.
            0 => {
                let whole = fs::read(own.join(TENSORS)).unwrap_or_default();
                let _ = fs::write(own.join(TENSORS), &whole[..whole.len() / 2]);
            }
            1 => {
                let _ = fs::write(own.join(CONFIG), "{\"peft_type\": \"LORA\", \"r\": [");
            }
            2 => {
                let _ = fs::remove_dir_all(&own);
            }
            _ => write(folder, model, number, random.u64(..)),
        }
        changes += 1;
        thread::sleep(Duration::from_millis(random.u64(5..60)));
    }
    changes
}
