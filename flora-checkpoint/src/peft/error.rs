//! Why an adapter is refused.

use crate::error::FileError;
use crate::model::ModelError;
use std::path::PathBuf;
use thiserror::Error;

/// Why an adapter folder could not be read, used or written.
#[derive(Debug, Error)]
#[non_exhaustive]
pub enum AdapterError {
    /// One of the folder's files is unusable.
    #[error(transparent)]
    File(#[from] FileError),
    /// The model lacks an adapted module.
    #[error(transparent)]
    Model(#[from] ModelError),
    /// Not an adapter folder.
    #[error("{} is no adapter folder: {reason}", path.display())]
    NotAnAdapter {
        /// What was opened.
        path: PathBuf,
        /// What is missing.
        reason: String,
    },
    /// A folder whose files change faster than they are read.
    #[error("{} keeps changing while it is read; write a new folder and put it in its place by renaming", path.display())]
    Unsettled {
        /// The folder.
        path: PathBuf,
    },
    /// A `peft_type` that flora has no layer for.
    #[error("{}: `peft_type` {found} is not supported; supported: {known}", path.display())]
    UnknownPeftType {
        /// The config.
        path: PathBuf,
        /// The value there.
        found: String,
        /// The kinds that there are.
        known: String,
    },
    /// An option that PEFT knows, would change the result, and has no counterpart here.
    #[error("{}: the option `{key}` = {value} is not supported: {reason}", path.display())]
    UnsupportedOption {
        /// The config.
        path: PathBuf,
        /// The option.
        key: String,
        /// Its value, shortened.
        value: String,
        /// What it would do.
        reason: String,
    },
    /// An option that is not known to be harmless.
    #[error("{}: the option `{key}` = {value} is unknown and might change the result; remove it if it does not", path.display())]
    UnknownOption {
        /// The config.
        path: PathBuf,
        /// The option.
        key: String,
        /// Its value, shortened.
        value: String,
    },
    /// A supported option with an impossible value.
    #[error("{}: `{key}` is {value}; {expected}", path.display())]
    InvalidOption {
        /// The config.
        path: PathBuf,
        /// The option.
        key: String,
        /// Its value, shortened, or "missing".
        value: String,
        /// What it must be.
        expected: String,
    },
    /// An adapter of a mixture that isn't where it has to be.
    #[error(
        "{}: the adapter `{part}` isn't in {}, where the parts of X-LoRA are read from; put there the folder that PEFT's save_pretrained \
         wrote for it (the config says {told})",
        path.display(), folder.display()
    )]
    MissingPart {
        /// The config of the mixture.
        path: PathBuf,
        /// What the part is called.
        part: String,
        /// Where it should be.
        folder: PathBuf,
        /// Where the config says that it is.
        told: String,
    },
    /// An adapter that can't be a part of a mixture.
    #[error("{} can't be a part of X-LoRA: {reason}", folder.display())]
    UnfitPart {
        /// The part's folder.
        folder: PathBuf,
        /// Why.
        reason: String,
    },
    /// A tensor of a mixture's classifier that is not there.
    #[error(
        "{}: tensor `{tensor}` of the classifier is missing; PEFT 0.21's save_pretrained leaves out what has the name of an adapter in its \
         own (`.0.`): write the tensors of `model.base_model.internal_xlora_classifier` into the file, each under its name behind \
         `base_model.internal_xlora_classifier.`",
        path.display()
    )]
    MissingClassifier {
        /// The safetensors file.
        path: PathBuf,
        /// The tensor's name.
        tensor: String,
    },
    /// A tensor that a module needs is not there.
    #[error("{}: tensor `{tensor}` is missing, which {kind} needs for module `{module}`", path.display())]
    MissingTensor {
        /// The safetensors file.
        path: PathBuf,
        /// The tensor's name.
        tensor: String,
        /// The module.
        module: String,
        /// The kind of adapter.
        kind: String,
    },
    /// A tensor that is no part of the adapter.
    #[error("{}: tensor `{tensor}` {problem}", path.display())]
    ExtraTensor {
        /// The safetensors file.
        path: PathBuf,
        /// The tensor's name.
        tensor: String,
        /// Why it can't be used.
        problem: String,
    },
    /// The file holds tensors of a module that the config does not target; PEFT would ignore them.
    #[error("{}: module `{module}` has tensors but is not targeted by {}", path.display(), config.display())]
    UntargetedModule {
        /// The safetensors file.
        path: PathBuf,
        /// The config.
        config: PathBuf,
        /// The module.
        module: String,
    },
    /// A module of the model that the config targets has no tensors.
    #[error("{}: the config targets module `{module}`, but its tensors are missing; save the adapter again, or take the module out of the config", path.display())]
    ModuleWithoutTensors {
        /// The safetensors file.
        path: PathBuf,
        /// The module.
        module: String,
    },
    /// A weight or bias of the base model that would have to be another one for this adapter's rows.
    #[error(
        "{}: tensor `{tensor}` takes the place of the base model's, which differs; that is supported for the token embedding, the \
         output matrix and biases of projections that no activation follows: merge the adapter into a model of its own",
        path.display()
    )]
    UnsupportedReplacement {
        /// The safetensors file.
        path: PathBuf,
        /// The tensor, without PEFT's prefix.
        tensor: String,
    },
    /// A tensor's rank is not the config's.
    #[error("{}: tensor `{tensor}` has rank {found} where {expected} says {rank}", path.display())]
    Rank {
        /// The safetensors file.
        path: PathBuf,
        /// The tensor's name.
        tensor: String,
        /// The rank of the tensor.
        found: usize,
        /// The rank it must have.
        rank: usize,
        /// Who says so.
        expected: String,
    },
    /// An adapter in memory that can't be written.
    #[error("adapter `{name}`, module `{module}`: {problem}")]
    Unwritable {
        /// The adapter.
        name: String,
        /// The module.
        module: String,
        /// What is wrong with it.
        problem: String,
    },
    /// The place to write to is taken.
    #[error("{} exists already; remove it or choose another folder", path.display())]
    Exists {
        /// The folder.
        path: PathBuf,
    },
}
