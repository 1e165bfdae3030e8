//! X-LoRA: several LoRA adapters, and a small network that weighs them for each token, by the base model's last hidden state of it.
//!
//! The folder has PEFT's config and the network; the adapters are in its sub-folders `0`, `1` and so on, each as PEFT writes it. That is
//! how PEFT has them on the hub, and what it calls them: it runs none of another name. The paths in the config are those of the machine
//! that trained it, and aren't followed.

use super::config::Fields;
use super::files::ATTEMPTS;
use super::options::HARMLESS;
use super::{AdapterError, AdapterFiles, AdapterFolder, AdapterKinds, CONFIG, FolderVersion, TENSORS};
use crate::error::FileError;
use crate::json::Json;
use crate::safetensors_file;
use crate::tensor::{TensorProblem, TensorTable};
use std::collections::BTreeSet;
use std::path::Path;

/// The most adapters of one mixture.
pub const MOST_MIXED: usize = 64;

pub(super) const PEFT_TYPE: &str = "XLORA";
/// What the network's tensors are called, before the number of the layer.
const PREFIX: &str = "base_model.internal_xlora_classifier.layers.";
/// The deepest network that is read; PEFT's default is 1.
const MOST_LAYERS: usize = 64;
/// The layer of the kinds of a part.
const PART: &str = "lora";

/// The options that are read.
const READ: [&str; 12] = [
    "peft_type",
    "adapters",
    "hidden_size",
    "enable_softmax",
    "enable_softmax_topk",
    "softmax_temperature",
    "layerwise_scalings",
    "top_k_lora",
    "xlora_depth",
    "xlora_size",
    "xlora_dropout_p",
    "global_scaling_weight",
];

/// Several adapters that a network weighs for each token.
#[derive(Clone, Debug)]
pub struct AdapterMixture {
    /// The adapters: LoRA alone.
    pub parts: Vec<AdapterFolder>,
    /// What all of them are multiplied by.
    pub weight: f64,
    /// The network; what is below 0 becomes 0 behind each layer but the last. It reads a hidden state `[d]` and gives logits
    /// `[sets, parts]`.
    pub classifier: Vec<ClassifierLayer>,
    /// Whether each module that some part adapts has a set of its own, in the order in which the model has them; otherwise there is one.
    pub layerwise: bool,
    /// How logits become gates.
    pub rule: GateRule,
    /// What tells its files from any others that may take their place.
    pub version: u64,
    /// A digest of all that it holds.
    pub content: u128,
}

/// A linear layer of the network: y = x @ weightᵀ + bias.
#[derive(Clone, Debug, PartialEq)]
pub struct ClassifierLayer {
    /// d
    pub inputs: usize,
    /// k
    pub outputs: usize,
    /// `[k, d]`, finite.
    pub weight: Vec<f32>,
    /// `[k]`, finite.
    pub bias: Vec<f32>,
}

/// How the logits of a set, one for each part, become gates.
#[derive(Clone, Copy, Debug, PartialEq)]
pub struct GateRule {
    /// They are divided by this and become shares that add up to 1 (softmax). `None`: they are gates as they are.
    pub temperature: Option<f64>,
    /// So many of the largest are kept, the others are 0.
    pub top: Option<usize>,
    /// Those that aren't 0 then become shares in turn.
    pub shares_of_top: bool,
}

impl AdapterMixture {
    /// Whether files are a mixture's.
    pub fn is(files: &AdapterFiles) -> bool {
        let config = Json::parse(&files.folder.join(CONFIG), files.config.as_slice());
        config.is_ok_and(|config| config.get("peft_type").and_then(Json::as_str) == Some(PEFT_TYPE))
    }

    /// Reads the parts that belong to a mixture's own files, and checks all of it.
    ///
    /// # Errors
    /// An option that can't be honoured, a part that isn't there or isn't LoRA, a tensor that isn't there, isn't finite or of another
    /// shape; folders that keep changing.
    pub fn read(files: AdapterFiles, kinds: &AdapterKinds) -> Result<Self, AdapterError> {
        let folder = files.folder.clone();
        let mut files = files;
        for _ in 0..ATTEMPTS {
            let path = folder.join(CONFIG);
            let json = Json::parse(&path, files.config.as_slice())?;
            let settings = Settings::read(&path, &json)?;
            let parts = settings.parts(&path, &json)?;
            let own_version = files.version();
            let versions: Vec<_> = parts.iter().map(AdapterFiles::version).collect();
            // All of one moment: nothing has changed since the first of them was read.
            let there = FolderVersion::of_parts(&folder);
            if FolderVersion::of(&folder)? == own_version && there.starts_with(&versions) {
                let (version, content) = (own_version.digest_with(&there), files.content_with(&parts));
                let folders = parts.iter().map(|files| part(files, kinds)).collect::<Result<Vec<_>, _>>()?;
                let classifier = settings.classifier(&files, &folders)?;
                let Settings { weight, layerwise, rule, .. } = settings;
                return Ok(Self { parts: folders, weight, classifier, layerwise, rule, version, content });
            }
            files = AdapterFiles::read(&folder)?;
        }
        Err(AdapterError::Unsettled { path: folder })
    }

    /// The modules that some part adapts, sorted.
    pub fn modules(&self) -> BTreeSet<&str> {
        modules(&self.parts)
    }
}

fn modules(parts: &[AdapterFolder]) -> BTreeSet<&str> {
    parts.iter().flat_map(|part| part.modules.keys()).map(String::as_str).collect()
}

/// A part, which has to be LoRA that acts on every token.
fn part(files: &AdapterFiles, kinds: &AdapterKinds) -> Result<AdapterFolder, AdapterError> {
    let folder = AdapterFolder::parse(files, kinds)?;
    match folder.modules.iter().find(|(_, module)| module.layer != PART) {
        None => Ok(folder),
        Some((path, module)) => {
            let reason =
                format!("it has `{}` for `{path}`, and a part has LoRA alone; leave this adapter out", module.layer);
            Err(AdapterError::UnfitPart { folder: files.folder.clone(), reason })
        }
    }
}

/// What a config says.
struct Settings {
    parts: usize,
    hidden_size: usize,
    layerwise: bool,
    /// Outputs of the layers before the last.
    inner: Vec<usize>,
    /// Modules from one linear layer to the next, in PEFT's numbering.
    step: usize,
    rule: GateRule,
    weight: f64,
}

impl Settings {
    fn read(path: &Path, json: &Json) -> Result<Self, AdapterError> {
        let fields = Fields { path, json };
        let Json::Object(members) = json else {
            return Err(fields.invalid("the file", "it must be an object".to_owned()));
        };
        for (key, value) in members {
            // Nothing is trained here.
            let is_known = READ.contains(&&key[..]) || HARMLESS.contains(&&key[..]) || key == "use_trainable_adapters";
            if !is_known && key != "scaling_pass_value" && !value.is_falsy() {
                let (path, key, value) = (path.to_owned(), key.clone(), value.to_string());
                return Err(AdapterError::UnknownOption { path, key, value });
            }
        }
        if let Some(value) = json.get("scaling_pass_value").filter(|value| !value.is_falsy()) {
            let (path, key, value) = (path.to_owned(), "scaling_pass_value".to_owned(), value.to_string());
            let reason = "the network would read hidden states of a model that the adapters change; train it with 0, PEFT's default";
            return Err(AdapterError::UnsupportedOption { path, key, value, reason: reason.to_owned() });
        }
        let Some(Json::Object(adapters)) = json.get("adapters") else {
            return Err(fields.invalid("adapters", "it must be an object of adapters".to_owned()));
        };
        let parts = adapters.len();
        if !(1..=MOST_MIXED).contains(&parts) {
            return Err(
                fields.invalid("adapters", format!("there must be from 1 to {MOST_MIXED}, and there are {parts}"))
            );
        }
        // In any order: files have them by the alphabet.
        let is_number = |name: &str| name.parse().is_ok_and(|at: usize| at < parts && at.to_string() == name);
        if let Some((name, _)) = adapters.iter().find(|(name, _)| !is_number(name)) {
            let expected =
                format!("its adapters are called 0, 1 and so on, and one is called `{name}`: PEFT runs no others");
            return Err(fields.invalid("adapters", expected));
        }
        let size = |key: &str, default: usize| fields.whole(key, default, 1 << 20);
        let depth = fields.whole("xlora_depth", 1, MOST_LAYERS)?;
        let width = size("xlora_size", 2048)?;
        let top = match json.get("top_k_lora") {
            None | Some(Json::Null) => None,
            Some(_) => Some(fields.whole("top_k_lora", 1, parts)?),
        };
        let softmax = fields.flag_or("enable_softmax", true)?;
        let temperature = fields.number_or("softmax_temperature", 1.0)?;
        if temperature <= 0.0 {
            return Err(fields.invalid("softmax_temperature", "it must be above 0".to_owned()));
        }
        let rule = GateRule {
            temperature: softmax.then_some(temperature),
            top,
            shares_of_top: fields.flag_or("enable_softmax_topk", false)?,
        };
        // A dropout stands behind each activation where it isn't 0.
        let step = if fields.number_or("xlora_dropout_p", 0.2)? > 0.0 { 3 } else { 2 };
        Ok(Self {
            parts,
            hidden_size: size("hidden_size", 4096)?,
            layerwise: fields.flag_or("layerwise_scalings", false)?,
            inner: vec![width; depth - 1],
            step,
            rule,
            weight: fields.number_or("global_scaling_weight", 1.0)?,
        })
    }

    /// The files of the parts.
    fn parts(&self, path: &Path, json: &Json) -> Result<Vec<AdapterFiles>, AdapterError> {
        let own = path.parent().unwrap_or(path);
        let read = |number: usize| {
            let (part, folder) = (number.to_string(), own.join(number.to_string()));
            if !folder.join(CONFIG).is_file() {
                let told = json.get("adapters").and_then(|adapters| adapters.get(&part));
                let told = told.map_or_else(|| "nothing".to_owned(), Json::to_string);
                return Err(AdapterError::MissingPart { path: path.to_owned(), part, folder, told });
            }
            AdapterFiles::read(&folder)
        };
        (0..self.parts).map(read).collect()
    }

    fn classifier(&self, files: &AdapterFiles, parts: &[AdapterFolder]) -> Result<Vec<ClassifierLayer>, AdapterError> {
        let path = files.folder.join(TENSORS);
        let tensors = safetensors_file::parse(&path, files.tensors.clone())?;
        let sets = if self.layerwise { modules(parts).len() } else { 1 };
        let mut inputs = self.hidden_size;
        let mut layers = Vec::with_capacity(self.inner.len() + 1);
        let mut known = BTreeSet::new();
        for (at, outputs) in self.inner.iter().copied().chain([self.parts * sets]).enumerate() {
            let name = |what: &str| format!("{PREFIX}{}.{what}", at * self.step);
            let of = if at == self.inner.len() && self.layerwise {
                format!(", {} for each of {sets} adapted modules", self.parts)
            } else {
                String::new()
            };
            let weight = values(&tensors, &name("weight"), &[outputs, inputs], &of)?;
            let bias = values(&tensors, &name("bias"), &[outputs], &of)?;
            known.extend([name("weight"), name("bias")]);
            layers.push(ClassifierLayer { inputs, outputs, weight, bias });
            inputs = outputs;
        }
        match tensors.entries().keys().find(|name| !known.contains(*name)) {
            None => Ok(layers),
            Some(tensor) => {
                let problem = format!(
                    "is no part of a classifier of {} layers (`xlora_depth`, `xlora_dropout_p`); the adapters are in folders of their own",
                    layers.len()
                );
                Err(AdapterError::ExtraTensor { path, tensor: tensor.clone(), problem })
            }
        }
    }
}

fn values(tensors: &TensorTable, name: &str, shape: &[usize], of: &str) -> Result<Vec<f32>, AdapterError> {
    let tensor = tensors.get(name).map_err(|error| match error {
        FileError::Tensor { path, tensor, problem: TensorProblem::Missing { .. } } => {
            AdapterError::MissingClassifier { path, tensor }
        }
        other => other.into(),
    })?;
    if tensor.shape() != shape {
        let expected = format!("{shape:?} (outputs, inputs{of})");
        return Err(tensors.error(name, TensorProblem::WrongShape { found: tensor.shape().to_vec(), expected }).into());
    }
    Ok(tensor.to_finite_f32().map_err(|problem| tensors.error(name, problem))?)
}

impl Fields<'_> {
    /// A whole number from 1 to a limit.
    fn whole(&self, key: &str, default: usize, most: usize) -> Result<usize, AdapterError> {
        let number = match self.json.get(key) {
            None => return Ok(default),
            Some(Json::Number(number)) => number.as_u64(),
            Some(_) => None,
        };
        let number =
            number.and_then(|number| usize::try_from(number).ok()).filter(|number| (1..=most).contains(number));
        number.ok_or_else(|| self.invalid(key, format!("it must be a whole number from 1 to {most}")))
    }

    fn flag_or(&self, key: &str, default: bool) -> Result<bool, AdapterError> {
        match self.json.get(key) {
            None => Ok(default),
            Some(Json::Bool(value)) => Ok(*value),
            Some(_) => Err(self.invalid(key, "it must be true or false".to_owned())),
        }
    }

    fn number_or(&self, key: &str, default: f64) -> Result<f64, AdapterError> {
        let number = match self.json.get(key) {
            None => return Ok(default),
            Some(Json::Number(number)) => number.as_f64().filter(|number| number.is_finite()),
            Some(_) => None,
        };
        number.ok_or_else(|| self.invalid(key, "it must be a finite number".to_owned()))
    }
}
