//! What ends a command. The crates below say what is wrong and where; here is only what the command line itself finds.

use std::path::PathBuf;
use std::sync::Arc;

use flora_adapters::{BaseError, RegisterError, StoreError};
use flora_checkpoint::{AdapterError, FileError, ModelError};
use flora_oracle::OracleError;
use flora_plan::cost::CoefficientsError;
use flora_plan::schedule::ScheduleError;
use flora_plan::weight::WeightError;
use flora_runtime::{BatchError, DeviceError, ProjectionError};
use miette::Diagnostic;

use super::bench::PeerError;
use super::report::InputError;

/// An error with its mend, where the message doesn't say it already.
#[derive(Debug, thiserror::Error, Diagnostic)]
pub(crate) enum CommandError {
    /// What a crate below found; its message has the mend.
    #[error(transparent)]
    Below(Box<dyn std::error::Error + Send + Sync>),

    /// Asked for a subcommand that needs a feature which is off.
    #[cfg(not(all(feature = "emit", feature = "serve")))]
    #[error("this flora was built without `{command}`")]
    #[diagnostic(help("build it with --features {feature}"))]
    NotBuilt { command: &'static str, feature: &'static str },

    /// Mistakes in a layer's source, already shown in it.
    #[error("{path} is not a layer flora can compile\n{rendered}", path = path.display())]
    Layer { path: PathBuf, rendered: String },
    #[error("no layer `{name}`: it is neither built in nor a file")]
    #[diagnostic(help(
        "built in are {known}; a file holds a layer in the text form, as `flora explain lora` shows it"
    ))]
    UnknownLayer { name: String, known: String },
    #[cfg(feature = "emit")]
    #[error("the layer `{layer}` can't be lowered by `{lowering}`")]
    #[diagnostic(help("{help}"))]
    WrongLowering { layer: String, lowering: String, help: String },
    #[error("no model `{name}`: it is neither built in nor a file or folder")]
    #[diagnostic(help("built in by shape are {known}; or give a .gguf file, a .safetensors file or a model's folder"))]
    UnknownModel { name: String, known: String },
    #[error("no projection of {model} is called {targets}")]
    #[diagnostic(help("it has {known}"))]
    NoTarget { model: String, targets: String, known: String },
    #[error("{what} are too many: {found}, at most {limit}")]
    #[diagnostic(help("ask for less at a time"))]
    TooMany { what: &'static str, found: u64, limit: u64 },
    #[cfg(feature = "emit")]
    #[error("`{option}` is for CUDA targets, not for {target}")]
    #[diagnostic(help("use --target cuda:sm_80, cuda:sm_90 or cuda:sm_100"))]
    NotCuda { option: &'static str, target: String },
    #[cfg(feature = "emit")]
    #[error("{format} keeps blocks of {block} inputs and the layer has {d}")]
    #[diagnostic(help("choose a --d that {block} divides, or --weight int8"))]
    PartialBlock { format: flora::prelude::WeightFormat, block: u32, d: u32 },
    #[cfg(feature = "emit")]
    #[error("the machine code has defects, {defects} in {kernels} of {launches} kernels")]
    #[diagnostic(help("they are in the answer, below each kernel's source, or as its `defects` in JSON"))]
    Defects { defects: usize, kernels: usize, launches: usize },
    #[cfg(feature = "emit")]
    #[error("the CUDA compilers are not in the cache folder")]
    #[diagnostic(help("--fetch fetches them (139 MB, once)"))]
    NoCudaCompilers,
    #[error("no folder for flora's settings: neither FLORA_CONFIG nor the platform names one")]
    #[diagnostic(help("set FLORA_CONFIG to a folder that can be written"))]
    NoConfigFolder,
    #[error("can't {action} {path}: {source}", path = path.display())]
    Io { action: &'static str, path: PathBuf, source: std::io::Error },
    #[error("{path} is no batch: {reason}", path = path.display())]
    #[diagnostic(help(
        "a batch is [{{\"adapter\": \"name\" or null, \"rows\": 3}}, ...], its segments in the order of the rows"
    ))]
    NotABatch { path: PathBuf, reason: String },
    #[error("{path} has no input for `{module}`, which is adapted", path = path.display())]
    #[diagnostic(help("add the [rows, {d}] tensor `{module}`, or leave the module out with --targets"))]
    MissingInput { path: PathBuf, module: String, d: usize },
    #[error("the input of `{module}` in {path} is [{rows}, {columns}], but must be [{expected_rows}, {d}]", path = path.display())]
    #[diagnostic(help("the batch's segments add up to {expected_rows} rows, and the projection has {d} inputs"))]
    WrongInput { path: PathBuf, module: String, rows: usize, columns: usize, expected_rows: usize, d: usize },
    #[error("{path} has an input for `{module}`, which {model} doesn't have", path = path.display())]
    #[diagnostic(help("name the tensors by the model's module paths"))]
    UnknownInput { path: PathBuf, module: String, model: String },
    #[error("the adapters adapt `{module}`, which {model} doesn't have")]
    #[diagnostic(help("use adapters of this model, or choose modules that it has with --targets"))]
    UnknownModule { module: String, model: String },
    #[error(transparent)]
    NoAdapter(Arc<StoreError>),
    #[error("the requests of {adapters} weren't run: {error}")]
    #[diagnostic(help("the others were, and are in the answer"))]
    FailedRequests { adapters: String, error: Arc<StoreError> },
    #[error("{model}: {source}")]
    #[diagnostic(help("--base f32 dequantises a weight that can't be kept as it is stored"))]
    Base { model: String, source: BaseError },
    #[cfg(feature = "serve")]
    #[error("random weights of {model}'s shapes can't be written: {reason}")]
    #[diagnostic(help(
        "TMPDIR names the folder for temporary files; starcoder-1b needs 2.3 GB there, 3b 6 GB, 15b 31 GB"
    ))]
    Seeded { model: &'static str, reason: String },
    #[cfg(feature = "serve")]
    #[error(
        "an adapter is called `{0}`, as the base model is, so that a request for one could not be told from the other's"
    )]
    #[diagnostic(help("rename the adapter's folder, or give the base model another name with --served-name"))]
    AdapterNamedAsModel(String),
    #[cfg(feature = "serve")]
    #[error("no learning rate is known to suit the type `{0}`")]
    #[diagnostic(help("give one with --learning-rate; built-in types take from 1e-3 to 8e-3"))]
    NoLearningRate(String),
    #[cfg(feature = "serve")]
    #[error("the job `{job}` failed: {reason}")]
    #[diagnostic(help("what it had saved before is as it was; the other jobs are done"))]
    NotTrained { job: String, reason: String },
    #[cfg(feature = "serve")]
    #[error("there is no folder {}", .0.display())]
    #[diagnostic(help("benches/quality/corpus.py makes a corpus; benches/README.md says how"))]
    NoCorpus(PathBuf),
    #[cfg(feature = "serve")]
    #[error("{} has {found} files, and an interval over fewer than 8 says nothing", path.display())]
    #[diagnostic(help("hold out more files"))]
    FewFiles { path: PathBuf, found: usize },
    #[cfg(feature = "serve")]
    #[error("no learning rate of `{variant}` gave a finite loss in {language}")]
    #[diagnostic(help("give it lower ones in the plan, and another --state"))]
    NoRate { variant: String, language: String },
    #[cfg(feature = "serve")]
    #[error("{} is the score of another job, or no score", .0.display())]
    #[diagnostic(help("a folder of --state belongs to one plan, corpus and model; give another one"))]
    OtherScore(PathBuf),
    #[cfg(feature = "serve")]
    #[error("the adapter `{adapter}` ({kind}) can't be converted: {reason}")]
    #[diagnostic(help("give a LoRA adapter of linear layers, without DoRA and without replaced weights"))]
    NotConvertible { adapter: String, kind: String, reason: &'static str },
    #[cfg(feature = "serve")]
    #[error("`{path}` can't be fitted: {reason}")]
    #[diagnostic(help(
        "a layer that isn't adapted by the LoRA adapter isn't fitted; --rank and --tokens change the problem"
    ))]
    NotFitted { path: String, reason: String },
    #[cfg(feature = "serve")]
    #[error("the text is one sequence, and some is fitted on and some kept apart")]
    #[diagnostic(help("give more text, or a shorter --sequence-length"))]
    LittleText,
    #[cfg(feature = "serve")]
    #[error("can't listen: {0}")]
    #[diagnostic(help("choose another --port (0 takes any that is free) or --host"))]
    Listen(std::io::Error),
    #[error("can't write the output: {0}")]
    Output(std::io::Error),
    #[error("{wrong} of {layers} layers differ from the f64 oracle by more than rounding; the worst is `{worst}`")]
    #[diagnostic(help("this is a defect of flora or of the device; compare with --device host"))]
    Deviates { wrong: usize, layers: usize, worst: String },
}

impl CommandError {
    /// `error: …`, and `help: …` where there is more to say.
    pub(crate) fn to_text(&self) -> String {
        match self.help() {
            Some(help) => format!("error: {self}\nhelp: {help}"),
            None => format!("error: {self}"),
        }
    }
}

/// `?` on the errors of the crates below.
macro_rules! below {
    ($($error:ty),* $(,)?) => {
        $(impl From<$error> for CommandError {
            fn from(error: $error) -> Self {
                Self::Below(error.into())
            }
        })*
    };
}

below!(
    AdapterError,
    BatchError,
    CoefficientsError,
    DeviceError,
    FileError,
    InputError,
    ModelError,
    OracleError,
    PeerError,
    ProjectionError,
    RegisterError,
    ScheduleError,
    StoreError,
    WeightError,
    BaseError,
    flora_toolchain::CompileError,
    serde_json::Error,
    flora_toolchain::FetchError,
);

#[cfg(feature = "emit")]
below!(flora_codegen::target::EmitError, flora_codegen::target::UnknownTarget);

#[cfg(feature = "serve")]
below!(
    super::bench::PlanError,
    flora_engine::OptionsError,
    flora_engine::RequestError,
    flora_model::DirectoryError,
    flora_model::MergeError,
    flora_model::ServeError,
    flora_server::InvalidApiKey,
    flora_server::InvalidOrigin,
    flora_server::ServerError,
    flora_tokenizer::ChatError,
    flora_tokenizer::EncodeError,
    flora_tokenizer::TokenizerError,
    flora_ir::algebra::FoldError,
    flora_train::AddError,
    flora_train::DataError,
    flora_train::JobsFileError,
    flora_train::MakeError,
    flora_train::OptionError,
    flora_model::TrainError,
);
