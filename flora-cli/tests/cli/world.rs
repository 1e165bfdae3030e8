//! A tiny model and adapters of every kind, written byte by byte as other programs would, with the dense f64 weight that each
//! stands for.

use std::collections::BTreeMap;
use std::path::{Path, PathBuf};

use flora_checkpoint::{Matrix, write_matrices};
use safetensors::tensor::{Dtype, TensorView};
use serde_json::json;

/// Modules of each of the two layers: path, d, k, whether it has a bias.
const MODULES: [(&str, usize, usize, bool); 3] =
    [("self_attn.q_proj", 12, 10, true), ("self_attn.k_proj", 12, 5, false), ("mlp.down_proj", 7, 12, false)];

/// A module of the model. Weights are `[k, d]`, as PyTorch has them.
pub(crate) struct Module {
    pub(crate) path: String,
    pub(crate) d: usize,
    pub(crate) k: usize,
    weight: Vec<f32>,
    pub(crate) bias: Option<Vec<f32>>,
    /// By adapter, the dense weight `[k, d]` that its rows meet.
    adapted: BTreeMap<&'static str, Vec<f64>>,
}

impl Module {
    /// The weight `[k, d]` that rows of `adapter` meet.
    pub(crate) fn weight_for(&self, adapter: Option<&str>) -> Vec<f64> {
        let adapted = adapter.and_then(|name| self.adapted.get(name));
        adapted.cloned().unwrap_or_else(|| self.weight.iter().map(|value| f64::from(*value)).collect())
    }
}

/// The folders of a run.
pub(crate) struct World {
    pub(crate) folder: tempfile::TempDir,
    pub(crate) modules: Vec<Module>,
    random: fastrand::Rng,
}

/// The names of the adapters.
pub(crate) const ADAPTERS: [&str; 5] = ["a-lora", "b-dora", "c-hira", "d-ia3", "e-flora"];

type Tensors = BTreeMap<String, (Vec<usize>, Vec<f32>)>;

impl World {
    pub(crate) fn new() -> Self {
        let folder = tempfile::tempdir().expect("a temporary folder");
        let mut world = Self { folder, modules: Vec::new(), random: fastrand::Rng::with_seed(7) };
        world.write_model();
        for name in ADAPTERS {
            world.write_adapter(name);
        }
        world
    }

    pub(crate) fn path(&self, name: &str) -> PathBuf {
        self.folder.path().join(name)
    }

    /// Writes text to a file of the folder.
    pub(crate) fn write(&self, name: &str, text: &str) -> PathBuf {
        std::fs::write(self.path(name), text).expect("a writable folder");
        self.path(name)
    }

    /// `count` numbers between −1 and 1.
    fn numbers(&mut self, count: usize) -> Vec<f32> {
        (0..count).map(|_| 2.0 * self.random.f32() - 1.0).collect()
    }

    fn write_model(&mut self) {
        let folder = self.path("model");
        std::fs::create_dir(&folder).expect("a writable folder");
        let mut tensors = Tensors::new();
        for layer in 0..2 {
            for (name, d, k, has_bias) in MODULES {
                let path = format!("model.layers.{layer}.{name}");
                let weight = self.numbers(d * k);
                let bias = has_bias.then(|| self.numbers(k));
                tensors.insert(format!("{path}.weight"), (vec![k, d], weight.clone()));
                if let Some(bias) = &bias {
                    tensors.insert(format!("{path}.bias"), (vec![k], bias.clone()));
                }
                self.modules.push(Module { path, d, k, weight, bias, adapted: BTreeMap::new() });
            }
        }
        write_tensors(&folder.join("model.safetensors"), &tensors);
        let config = json!({ "architectures": ["LlamaForCausalLM"], "model_type": "llama" });
        std::fs::write(folder.join("config.json"), config.to_string()).expect("a writable folder");
    }

    /// Writes an adapter and notes the weights that it stands for.
    fn write_adapter(&mut self, name: &'static str) {
        let (rank, alpha) = (3, 6.0);
        let (config, targets): (serde_json::Value, &[&str]) = match name {
            "a-lora" => {
                (json!({ "peft_type": "LORA", "r": rank, "lora_alpha": alpha }), &["q_proj", "k_proj", "down_proj"])
            }
            "b-dora" => (
                json!({ "peft_type": "LORA", "r": rank, "lora_alpha": alpha, "use_dora": true, "use_rslora": true }),
                &["q_proj", "down_proj"],
            ),
            "c-hira" => (json!({ "peft_type": "HIRA", "r": rank }), &["q_proj", "k_proj"]),
            "d-ia3" => (json!({ "peft_type": "IA3", "feedforward_modules": ["down_proj"] }), &["k_proj", "down_proj"]),
            _ => (json!({ "peft_type": "FLORA", "r": rank, "reduce": "mean" }), &["q_proj", "k_proj", "down_proj"]),
        };
        let mut config = config;
        config["target_modules"] = json!(targets);
        let mut tensors = Tensors::new();
        let mut modules = std::mem::take(&mut self.modules);
        for module in modules.iter_mut().filter(|module| targets.iter().any(|target| module.path.ends_with(target))) {
            let (d, k) = (module.d, module.k);
            let (down, up) = (self.numbers(rank * d), self.numbers(k * rank));
            let mut put = |suffix: &str, shape: &[usize], values: &[f32]| {
                tensors.insert(format!("base_model.model.{}.{suffix}", module.path), (shape.to_vec(), values.to_vec()));
            };
            let w = |row: usize, column: usize| f64::from(module.weight[row * d + column]);
            // up @ down, `[k, d]`
            let product = |row: usize, column: usize| -> f64 {
                (0..rank).map(|q| f64::from(up[row * rank + q]) * f64::from(down[q * d + column])).sum()
            };
            let dense = |entry: &dyn Fn(usize, usize) -> f64| -> Vec<f64> {
                (0..k)
                    .flat_map(|row| (0..d).map(move |column| (row, column)))
                    .map(|(row, column)| entry(row, column))
                    .collect()
            };
            let adapted = match name {
                "a-lora" | "b-dora" => {
                    put("lora_A.weight", &[rank, d], &down);
                    put("lora_B.weight", &[k, rank], &up);
                    let is_dora = name == "b-dora";
                    let scale = if is_dora { alpha / (rank as f64).sqrt() } else { alpha / rank as f64 };
                    let changed = |row: usize, column: usize| w(row, column) + scale * product(row, column);
                    if is_dora {
                        let magnitudes: Vec<f32> = (0..k).map(|row| 0.5 + row as f32 / k as f32).collect();
                        put("lora_magnitude_vector", &[k], &magnitudes);
                        let norm = |row: usize| (0..d).map(|column| changed(row, column).powi(2)).sum::<f64>().sqrt();
                        dense(&|row, column| f64::from(magnitudes[row]) / norm(row) * changed(row, column))
                    } else {
                        dense(&changed)
                    }
                }
                "c-hira" => {
                    put("hira_A", &[rank, d], &down);
                    put("hira_B", &[k, rank], &up);
                    dense(&|row, column| w(row, column) * (1.0 + product(row, column)))
                }
                "d-ia3" if module.path.ends_with("down_proj") => {
                    put("ia3_l", &[1, d], &down[..d]);
                    dense(&|row, column| w(row, column) * f64::from(down[column]))
                }
                "d-ia3" => {
                    put("ia3_l", &[k, 1], &up[..k]);
                    dense(&|row, column| w(row, column) * f64::from(up[row]))
                }
                _ => {
                    // Stored the other way round: B is [d, r], A is [r, k].
                    let b: Vec<f32> = (0..d * rank).map(|at| down[at % rank * d + at / rank]).collect();
                    let a: Vec<f32> = (0..rank * k).map(|at| up[at % k * rank + at / k]).collect();
                    put("flora_B", &[d, rank], &b);
                    put("flora_A", &[rank, k], &a);
                    dense(&|row, column| w(row, column) * product(row, column) / rank as f64)
                }
            };
            module.adapted.insert(name, adapted);
        }
        self.modules = modules;
        let folder = self.path("adapters").join(name);
        std::fs::create_dir_all(&folder).expect("a writable folder");
        write_tensors(&folder.join("adapter_model.safetensors"), &tensors);
        std::fs::write(folder.join("adapter_config.json"), config.to_string()).expect("a writable folder");
    }

    /// Writes inputs of `rows` rows for every module.
    pub(crate) fn write_inputs(&mut self, name: &str, rows: usize) -> BTreeMap<String, Matrix> {
        let mut inputs = BTreeMap::new();
        let shapes: Vec<_> = self.modules.iter().map(|module| (module.path.clone(), module.d)).collect();
        for (path, columns) in shapes {
            let values = self.numbers(rows * columns);
            inputs.insert(path, Matrix { rows, columns, values });
        }
        write_matrices(&self.path(name), &inputs).expect("a writable folder");
        inputs
    }

    /// `run` on this model and these adapters, with `more` after it.
    pub(crate) fn run(&self, more: &[&str]) -> Vec<String> {
        let path = |name: &str| self.path(name).to_string_lossy().into_owned();
        let fixed =
            ["run", "--device", "host", "--model", &path("model"), "--adapters", &path("adapters")].map(str::to_owned);
        fixed.into_iter().chain(more.iter().map(|argument| (*argument).to_owned())).collect()
    }
}

fn write_tensors(path: &Path, tensors: &Tensors) {
    let bytes: BTreeMap<_, Vec<u8>> = tensors
        .iter()
        .map(|(name, (_, values))| (name, values.iter().flat_map(|value| value.to_le_bytes()).collect()))
        .collect();
    let views = tensors.iter().map(|(name, (shape, _))| {
        (name.clone(), TensorView::new(Dtype::F32, shape.clone(), &bytes[name]).expect("as long as its shape says"))
    });
    safetensors::serialize_to_file(views, None, path).expect("a writable folder");
}
