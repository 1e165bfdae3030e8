//! Files on disk to host tensors: models (GGUF, safetensors), adapters (PEFT folders), and plain tensor files.
//!
//! Nothing here knows of devices or kernels. Every length, offset and product that a file claims is checked before it is
//! used: a damaged or hostile file gives a typed error that names the file, the tensor and the mend.

mod atomic;
mod error;
pub mod gguf;
mod json;
pub mod model;
pub mod peft;
mod safetensors_file;
pub mod tensor;
pub mod tensors;

pub use atomic::write_file;
pub use error::FileError;
pub use model::{
    BaseWeight, DecoderConfig, Gelu, GptBigCodeConfig, LlamaConfig, Model, ModelError, Parameter, Projection,
    StoredWeight,
};
pub use peft::{
    AdapterError, AdapterFiles, AdapterFolder, AdapterKind, AdapterKinds, AdapterMixture, AdapterModule,
    AdapterRequest, AdapterSettings, ClassifierLayer, DecoderEnds, FolderVersion, GateRule, KindDescription, KindError,
    KindProblem, ModuleSettings, Operand, Replaced, ReplacedRows, ReplacedWeight, Replacements,
};
pub use safetensors_file::SafetensorsProblem;
pub use tensor::{Encoding, SharedBytes, StoredTensor, TensorProblem};
pub use tensors::{Matrix, TensorFile, read_matrices, write_matrices};
