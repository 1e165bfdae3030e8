//! A model's linear projections, whatever file they come from, under the module paths that Hugging Face and PEFT use, so that
//! an adapter finds its base weight by name; and beside them what a decoder is made of.

mod decoder;
mod folder;
mod foreign;
mod gguf;
mod parameter;
mod settings;

pub use decoder::{DecoderConfig, Gelu, GptBigCodeConfig, LlamaConfig, Rotary, RotaryFrequencies, RotaryScaling, Yarn};
pub use parameter::Parameter;

use crate::error::FileError;
use crate::gguf::Gguf;
use crate::tensor::{Encoding, StoredTensor, nearest, transpose};
use parameter::Place;
use settings::Settings;
use sha2::{Digest, Sha256};
use std::collections::BTreeMap;
use std::path::{Path, PathBuf};
use std::sync::Arc;
use thiserror::Error;

/// Why a model could not be opened or a weight not be read.
#[derive(Debug, Error)]
#[non_exhaustive]
pub enum ModelError {
    /// One of the model's files is unusable.
    #[error(transparent)]
    File(#[from] FileError),
    /// Neither a GGUF file, nor a safetensors file, nor a folder with `config.json` and safetensors files.
    #[error("{} is no model: {reason}; give a .gguf file, a .safetensors file, or a folder with config.json and *.safetensors", path.display())]
    NotAModel {
        /// What was opened.
        path: PathBuf,
        /// What is missing.
        reason: String,
    },
    /// Weights in a format of a framework's own.
    #[error(
        "{} holds weights in a format that isn't read: a pickle runs whatever its author put into it. Convert it where you trust it: \
         python -c \"from transformers import AutoModelForCausalLM; \
         AutoModelForCausalLM.from_pretrained('FOLDER', dtype='auto').save_pretrained('NEW_FOLDER')\", copy the tokenizer's files \
         beside what it writes, and give NEW_FOLDER", path.display()
    )]
    ForeignWeights {
        /// The file.
        path: PathBuf,
    },
    /// Nothing is at the path, and it looks like a repository's name.
    #[error(
        "there is no file or folder `{id}` here. If it is a repository on the Hugging Face hub: nothing is downloaded; \
         `hf download {id} --local-dir FOLDER` fetches it, then give FOLDER"
    )]
    Repository {
        /// `OWNER/NAME`
        id: String,
    },
    /// A GGUF architecture whose tensors have no known Hugging Face names.
    #[error("{}: the GGUF architecture `{found}` is not supported; supported: {}", path.display(), gguf::architectures())]
    UnsupportedArchitecture {
        /// The file.
        path: PathBuf,
        /// The architecture in the file.
        found: String,
    },
    /// A metadata or config entry that is missing or of the wrong type.
    #[error("{}: `{key}` {problem}", path.display())]
    Configuration {
        /// The file.
        path: PathBuf,
        /// The entry.
        key: String,
        /// What is wrong with it.
        problem: String,
    },
    /// A shard name that leads out of the model's folder.
    #[error("{}: the shard `{shard}` is not a plain file name in the model's folder; edit the index", path.display())]
    ShardEscapes {
        /// The index file.
        path: PathBuf,
        /// The shard as written there.
        shard: String,
    },
    /// One tensor in two files.
    #[error("{}: tensor `{tensor}` is also in {}; remove one of the files", second.display(), first.display())]
    RepeatedTensor {
        /// The tensor.
        tensor: String,
        /// One file.
        first: PathBuf,
        /// The other file.
        second: PathBuf,
    },
    /// No projection of that path.
    #[error("the model {model} has no projection `{projection}`{}", near.as_ref().map(|near| format!("; did you mean `{near}`?")).unwrap_or_default())]
    UnknownProjection {
        /// The model's name.
        model: String,
        /// What was asked for.
        projection: String,
        /// The most similar path there is.
        near: Option<String>,
    },
    /// No parameter of that path.
    #[error("the model {model} has no parameter `{parameter}`{}", near.as_ref().map(|near| format!("; did you mean `{near}`?")).unwrap_or_default())]
    UnknownParameter {
        /// The model's name.
        model: String,
        /// What was asked for.
        parameter: String,
        /// The most similar path there is.
        near: Option<String>,
    },
    /// A model that is read, but has no decoder that could be run.
    #[error(
        "the model {model} has the architecture `{architecture}`, of which no decoder is known; supported: {} in GGUF files, {} in \
         `architectures` of config.json",
        gguf::architectures(),
        decoder::architectures()
    )]
    UnsupportedDecoder {
        /// The model's name.
        model: String,
        /// Its architecture, empty where no config says one.
        architecture: String,
    },
}

/// An opened model. The weights stay on disk until they are asked for.
#[derive(Clone, Debug)]
pub struct Model {
    name: String,
    architecture: String,
    projections: Vec<Projection>,
    /// The tensors of no projection, by Hugging Face's names.
    parameters: BTreeMap<String, Place>,
    settings: Arc<Settings>,
}

/// One linear layer of a model: y `[tokens, k]` = x `[tokens, d]` @ w0 `[d, k]` + bias `[k]`.
#[derive(Clone, Debug)]
pub struct Projection {
    /// The module path in Hugging Face's model, such as `model.layers.0.self_attn.q_proj`.
    pub path: String,
    /// Inputs.
    pub d: usize,
    /// Outputs.
    pub k: usize,
    /// How the weight is stored.
    pub encoding: Encoding,
    /// Whether the layer has a bias.
    pub has_bias: bool,
    source: Source,
}

/// Where the weight of a projection lies.
#[derive(Clone, Debug)]
struct Source {
    weight: Place,
    bias: Option<Place>,
    layout: Layout,
}

/// What the rows of a stored weight are.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum Layout {
    /// `[k, d]`, as `nn.Linear` stores it.
    OutputsByInputs,
    /// `[d, k]`, as GPT-2's `Conv1D` stores it.
    InputsByOutputs,
    /// `[k, d]` with the rows of every head interleaved for RoPE; see [`gguf`].
    RotaryInterleaved {
        /// Heads that the k rows divide into.
        heads: usize,
    },
}

/// A base weight in the form the algebra writes it.
#[derive(Clone, Debug, PartialEq)]
pub struct BaseWeight {
    /// Inputs.
    pub d: usize,
    /// Outputs.
    pub k: usize,
    /// W0, `[d, k]` row-major, all finite.
    pub values: Vec<f32>,
    /// `[k]`, all finite.
    pub bias: Option<Vec<f32>>,
}

/// A base weight as it is stored, quantised blocks untouched, its rows in Hugging Face's order.
#[derive(Clone, Debug)]
pub struct StoredWeight {
    /// `[k, d]`, or `[d, k]` where `rows_are_inputs`.
    pub tensor: StoredTensor,
    /// Whether the tensor is `[d, k]` (`Conv1D`), never so for quantised encodings.
    pub rows_are_inputs: bool,
}

impl Model {
    /// Opens a GGUF file, a safetensors file, or a folder with `config.json` and safetensors files (sharded or not).
    ///
    /// A safetensors file uses a `config.json` beside it, if there is one. Files are mapped: they must not be truncated while
    /// the model is in use.
    pub fn open(path: &Path) -> Result<Model, ModelError> {
        let not_a_model = |reason: &str| ModelError::NotAModel { path: path.to_owned(), reason: reason.to_string() };
        let metadata = match (std::fs::metadata(path), foreign::repository(path)) {
            (Ok(metadata), _) => metadata,
            (Err(error), Some(id)) if error.kind() == std::io::ErrorKind::NotFound => {
                return Err(ModelError::Repository { id: id.to_owned() });
            }
            (Err(source), _) => return Err(FileError::io(path, "open", source).into()),
        };
        if metadata.is_dir() {
            return folder::open(path);
        }
        if path.file_name().is_some_and(|name| foreign::is_weights(&name.to_string_lossy())) {
            return Err(ModelError::ForeignWeights { path: path.to_owned() });
        }
        match path.extension().and_then(|extension| extension.to_str()) {
            Some("gguf") => gguf::open(Gguf::open(path)?),
            Some("safetensors") => folder::open_file(path),
            _ => Err(not_a_model("its name ends neither in .gguf nor in .safetensors")),
        }
    }

    /// The model's own name, else the file's or folder's.
    pub fn name(&self) -> &str {
        &self.name
    }

    /// The architecture as the file names it, such as `llama` or `GPTBigCodeForCausalLM`.
    pub fn architecture(&self) -> &str {
        &self.architecture
    }

    /// The linear layers between the embeddings, in the order of the model: by layer number, then by path.
    pub fn projections(&self) -> &[Projection] {
        &self.projections
    }

    /// The projection at `path`.
    pub fn projection(&self, path: &str) -> Result<&Projection, ModelError> {
        self.projections.iter().find(|projection| projection.path == path).ok_or_else(|| {
            ModelError::UnknownProjection {
                model: self.name.clone(),
                projection: path.to_string(),
                near: nearest(path, self.projections.iter().map(|projection| &projection.path)),
            }
        })
    }

    /// The paths of what is no projection's, sorted: embeddings, norms, the output matrix.
    pub fn parameters(&self) -> impl Iterator<Item = &str> {
        self.parameters.keys().map(String::as_str)
    }

    /// The tensor at `path`, such as `model.embed_tokens.weight`: the name that Hugging Face's model gives it.
    ///
    /// # Errors
    /// There is none, or its element type can't be read.
    pub fn parameter(&self, path: &str) -> Result<Parameter, ModelError> {
        self.parameters.get(path).map_or_else(|| Err(self.unknown_parameter(path)), Parameter::new)
    }

    fn unknown_parameter(&self, path: &str) -> ModelError {
        ModelError::UnknownParameter {
            model: self.name.clone(),
            parameter: path.to_string(),
            near: nearest(path, self.parameters.keys()),
        }
    }

    /// W0 `[d, k]` and bias of the projection at `path`, dequantised; NaN and infinities are errors.
    pub fn weight(&self, path: &str) -> Result<BaseWeight, ModelError> {
        let projection = self.projection(path)?;
        let (d, k) = (projection.d, projection.k);
        let stored = self.stored(path)?;
        let weight = &projection.source.weight;
        let values = stored.tensor.to_finite_f32().map_err(|problem| weight.error(problem))?;
        let values = if stored.rows_are_inputs { values } else { transpose(&values, k, d) };
        Ok(BaseWeight { d, k, values, bias: self.bias(path)? })
    }

    /// The bias `[k]` of the projection at `path`, dequantised, if it has one; NaN and infinities are errors.
    pub fn bias(&self, path: &str) -> Result<Option<Vec<f32>>, ModelError> {
        let projection = self.projection(path)?;
        let Some(place) = &projection.source.bias else { return Ok(None) };
        let bias = projection.source.layout.in_order(place.tensor()?, projection.k);
        Ok(Some(bias.to_finite_f32().map_err(|problem| place.error(problem))?))
    }

    /// The weight of the projection at `path` in its own encoding. Costs nothing, except that interleaved rows are copied.
    pub fn stored(&self, path: &str) -> Result<StoredWeight, ModelError> {
        let projection = self.projection(path)?;
        let tensor = projection.source.weight.tensor()?;
        Ok(StoredWeight {
            tensor: projection.source.layout.in_order(tensor, projection.k),
            rows_are_inputs: projection.source.layout == Layout::InputsByOutputs,
        })
    }

    /// What tells the numbers of this model from any other's: a digest of its tensors as they are stored, with their names. Reads all of
    /// them.
    ///
    /// # Errors
    /// An element type that can't be read.
    pub fn digest(&self) -> Result<String, ModelError> {
        let mut hasher = Sha256::new();
        let mut add = |path: &str, tensor: &StoredTensor| {
            hasher.update(path);
            hasher.update(tensor.encoding().name());
            tensor.shape().iter().for_each(|extent| hasher.update((*extent as u64).to_le_bytes()));
            hasher.update(tensor.bytes());
        };
        for Projection { path, source, .. } in &self.projections {
            add(path, source.weight.tensor()?);
            if let Some(bias) = &source.bias {
                add(path, bias.tensor()?);
            }
        }
        for path in self.parameters.keys() {
            add(path, self.parameter(path)?.stored());
        }
        Ok(hasher.finalize().iter().take(16).map(|byte| format!("{byte:02x}")).collect())
    }

    /// [`StoredTensor::release`] for the weight of the projection at `path`.
    ///
    /// # Errors
    /// There is none.
    pub fn release(&self, path: &str) -> Result<(), ModelError> {
        self.projection(path)?.source.weight.tensor()?.release();
        Ok(())
    }
}

impl Layout {
    /// `tensor`, whose outermost extent is k unless it is `[d, k]`, with the rows in Hugging Face's order.
    fn in_order(self, tensor: &StoredTensor, k: usize) -> StoredTensor {
        match self {
            Layout::OutputsByInputs | Layout::InputsByOutputs => tensor.clone(),
            Layout::RotaryInterleaved { heads } => tensor.with_rows_from(|row| gguf::interleaved_row(row, k / heads)),
        }
    }
}

impl Projection {
    /// Checks the shapes of a weight and its bias.
    fn new(path: String, source: Source) -> Result<Projection, ModelError> {
        let place = &source.weight;
        let weight = place.tensor()?;
        let (rows, columns) = weight.matrix_shape().map_err(|problem| place.error(problem))?;
        let (k, d) = if source.layout == Layout::InputsByOutputs { (columns, rows) } else { (rows, columns) };
        if d == 0 || k == 0 {
            return Err(place.error(weight.wrong_shape("a matrix with elements".to_string())).into());
        }
        if let Layout::RotaryInterleaved { heads } = source.layout
            && (heads == 0 || !k.is_multiple_of(heads * 2))
        {
            return Err(place.error(weight.wrong_shape(format!("{heads} heads of an even number of rows"))).into());
        }
        if let Some(place) = &source.bias {
            let bias = place.tensor()?;
            if bias.shape() != [k] {
                let problem = bias.wrong_shape(format!("[{k}], the outputs of `{}`,", source.weight.name));
                return Err(place.error(problem).into());
            }
        }
        Ok(Projection { path, d, k, encoding: weight.encoding(), has_bias: source.bias.is_some(), source })
    }
}

/// A model of what its files hold, the projections put into the order of [`Model::projections`].
fn assemble(mut model: Model, path: &Path) -> Result<Model, ModelError> {
    if model.projections.is_empty() {
        let reason = "it has no linear layer (a matrix named `*.weight` that is no embedding)".to_string();
        return Err(ModelError::NotAModel { path: path.to_owned(), reason });
    }
    model.projections.sort_by(|left, right| by_number(&left.path).cmp(by_number(&right.path)));
    Ok(model)
}

/// The components of a module path, numbers compared as numbers: layer 2 before layer 10.
fn by_number(path: &str) -> impl Iterator<Item = (Option<u64>, &str)> {
    path.split('.').map(|component| (component.parse().ok(), component))
}

fn stem(path: &Path) -> String {
    path.file_stem().map_or_else(|| "model".to_string(), |stem| stem.to_string_lossy().into_owned())
}
