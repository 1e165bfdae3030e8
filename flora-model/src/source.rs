//! Adapters from a folder of PEFT folders, and from folders that are named one by one: read, checked and folded when a request first
//! names them.
//!
//! The folders that the operator names are trusted, and so are the links in them. A name in a request isn't: it is one component
//! of a path, or one of the names that the operator gave.

use std::collections::BTreeMap;
use std::path::{Component, Path, PathBuf};
use std::sync::atomic::{AtomicU64, Ordering};
use std::sync::{Arc, PoisonError, RwLock, RwLockReadGuard};

use flora_adapters::adapted::numbers;
use flora_adapters::{AdaptedModel, BaseForm, Layers, MixedAdapters, RegisterError, StoreError};
use flora_checkpoint::peft::{AdapterFiles, FolderVersion};
use flora_checkpoint::{AdapterFolder, AdapterMixture, Model};
use flora_engine::{AdapterContent, AdapterFacts, AdapterFailure, AdapterSource, Composition, Read, Unread};
use flora_plan::layer::Element;

use crate::mixture::PreparedGates;

const CONFIG: &str = "adapter_config.json";

/// The adapters that there are, by name. What is in their folders may change at any time.
#[derive(Clone, Debug)]
pub struct AdapterDirectory {
    /// Its sub-folders are adapters, each of its folder's name.
    folder: Option<PathBuf>,
    /// Others, by name; those that were loaded are its clones' too.
    named: Arc<RwLock<BTreeMap<String, PathBuf>>>,
    model: Arc<Model>,
    layers: Layers,
    element: Element,
    /// The form of the base weights that adapters are folded with.
    base: BaseForm,
}

/// An adapter in host memory, folded for all of a model that it adapts.
#[derive(Clone, Debug)]
pub struct PreparedAdapter {
    /// Its name.
    pub name: String,
    /// What it makes of the model.
    pub adapted: AdaptedModel,
    /// Bytes that it takes when it is resident, on the device and beside it.
    pub bytes: u64,
    /// What it holds.
    pub content: AdapterContent,
    /// The tokens that invoke it, of an activated adapter.
    pub invocation: Option<Vec<u32>>,
    /// What weighs its parts for each token, of a mixture (X-LoRA).
    pub gates: Option<PreparedGates>,
}

/// Why there can't be adapters where they are said to be.
#[derive(Debug, thiserror::Error)]
#[non_exhaustive]
pub enum DirectoryError {
    /// Nothing, or no folder.
    #[error("{} is no folder of adapters: {reason}; give a folder that holds one folder for each adapter, as PEFT's save_pretrained writes them (adapter_config.json and adapter_model.safetensors)", path.display())]
    NotAFolder {
        /// What was given.
        path: PathBuf,
        /// What is wrong with it.
        reason: String,
    },
    /// An adapter's own folder.
    #[error("{} is an adapter itself; give the folder that it is in, or name it: --lora-modules NAME={}", path.display(), path.display())]
    IsAnAdapter {
        /// What was given.
        path: PathBuf,
    },
    /// A named adapter that isn't one.
    #[error("the adapter `{name}`: {} {reason}; give the folder that PEFT's save_pretrained wrote, with adapter_config.json and adapter_model.safetensors", path.display())]
    NotAnAdapter {
        /// Its name.
        name: String,
        /// Where it should be.
        path: PathBuf,
        /// What is wrong with that.
        reason: String,
    },
    /// Two adapters of one name.
    #[error("two adapters are called `{0}`; give one another name")]
    Twice(String),
}

/// Why the adapters stay as they are.
#[derive(Clone, Debug, PartialEq, Eq, thiserror::Error)]
#[non_exhaustive]
pub enum UpdateError {
    /// There is one of the name.
    #[error("there is an adapter `{0}` already")]
    Exists(String),
    /// None was put under the name.
    #[error("no adapter `{0}` was loaded")]
    Unknown(String),
    /// What is in the folder.
    #[error(transparent)]
    Unusable(#[from] AdapterFailure),
}

impl AdapterDirectory {
    /// The sub-folders of `folder`, or no adapters, for `model`, of the built-in kinds; `element` is the type in which the device
    /// keeps them.
    ///
    /// # Errors
    /// A built-in layer doesn't compile.
    pub fn new(folder: Option<&Path>, model: &Arc<Model>, element: Element) -> Result<Self, RegisterError> {
        Ok(Self::with_layers(folder, model, element, Layers::builtin()?))
    }

    /// The same of the kinds of `layers`.
    pub fn with_layers(folder: Option<&Path>, model: &Arc<Model>, element: Element, layers: Layers) -> Self {
        let (folder, named) = (folder.map(Path::to_owned), Arc::default());
        Self { folder, named, model: model.clone(), layers, element, base: BaseForm::default() }
    }

    /// The same over base weights in another form than the files': that of [`ServeOptions::base`](crate::ServeOptions::base).
    #[must_use]
    pub fn over(self, base: BaseForm) -> Self {
        Self { base, ..self }
    }

    /// The same with adapters beside those of the folder, each by the name and the folder that are given.
    ///
    /// # Errors
    /// A name that two have, or that isn't one.
    pub fn with_named(self, named: impl IntoIterator<Item = (String, PathBuf)>) -> Result<Self, DirectoryError> {
        for (name, path) in named {
            if self.path(&name).is_ok() {
                return Err(DirectoryError::Twice(name));
            }
            self.named.write().unwrap_or_else(PoisonError::into_inner).insert(name, path);
        }
        Ok(self)
    }

    /// Puts `folder` under a name, in place of another that has it only where it `replaces`. The adapter is read first, so that one that
    /// can't be used never takes the name.
    ///
    /// # Errors
    /// The name is taken, or the folder is no adapter of the model.
    pub fn load(&self, name: &str, folder: &Path, replaces: bool) -> Result<(), UpdateError> {
        if self.path(name).is_ok() && !replaces {
            return Err(UpdateError::Exists(name.to_owned()));
        }
        self.read(name, folder).map_err(|unread| UpdateError::Unusable(unread.failure))?;
        self.named.write().unwrap_or_else(PoisonError::into_inner).insert(name.to_owned(), folder.to_owned());
        Ok(())
    }

    /// Takes a name away that was given. Requests that have begun go on with what they began with.
    ///
    /// # Errors
    /// No folder was put under it; those in the folder of adapters stay.
    pub fn unload(&self, name: &str) -> Result<(), UpdateError> {
        let removed = self.named.write().unwrap_or_else(PoisonError::into_inner).remove(name);
        removed.map(drop).ok_or_else(|| UpdateError::Unknown(name.to_owned()))
    }

    /// Whether folders are what they are said to be: one of adapters, and adapters. What is wrong with an adapter fails its own
    /// requests; that there is nothing of the kind is a mistake of whoever starts this.
    ///
    /// # Errors
    /// What is wrong with a path, and what it should be.
    pub fn check(&self) -> Result<(), DirectoryError> {
        if let Some(path) = &self.folder {
            let not_a_folder = |reason: String| DirectoryError::NotAFolder { path: path.clone(), reason };
            let metadata = std::fs::metadata(path).map_err(|error| not_a_folder(error.to_string()))?;
            if !metadata.is_dir() {
                return Err(not_a_folder("it is a file".to_owned()));
            }
            if path.join(CONFIG).is_file() {
                return Err(DirectoryError::IsAnAdapter { path: path.clone() });
            }
            std::fs::read_dir(path).map_err(|error| not_a_folder(error.to_string()))?;
        }
        for (name, path) in &*self.named() {
            let fault = |reason: &str| {
                let (name, path, reason) = (name.clone(), path.clone(), reason.to_owned());
                Err(DirectoryError::NotAnAdapter { name, path, reason })
            };
            if !path.is_dir() {
                return fault(if path.exists() { "is no folder" } else { "isn't there" });
            }
            if !path.join(CONFIG).is_file() {
                return fault("has no adapter_config.json");
            }
        }
        Ok(())
    }

    /// The folder of the adapter `name`, where there is one.
    pub fn folder_of(&self, name: &str) -> Option<PathBuf> {
        self.path(name).ok()
    }

    /// The model that they are adapters of.
    pub(crate) fn model(&self) -> &Model {
        &self.model
    }

    fn named(&self) -> RwLockReadGuard<'_, BTreeMap<String, PathBuf>> {
        self.named.read().unwrap_or_else(PoisonError::into_inner)
    }

    /// The adapter's folder. A name that nobody gave is one component of a path, or there is no such adapter.
    fn path(&self, name: &str) -> Result<PathBuf, AdapterFailure> {
        let unknown = || AdapterFailure::Unknown(name.to_owned());
        if let Some(path) = self.named().get(name) {
            return Ok(path.clone());
        }
        let mut components = Path::new(name).components();
        let plain =
            matches!((components.next(), components.next()), (Some(Component::Normal(part)), None) if part == name);
        let path = self.folder.as_ref().filter(|_| plain).map(|folder| folder.join(name));
        path.filter(|path| path.join(CONFIG).is_file()).ok_or_else(unknown)
    }
}

impl AdapterSource for AdapterDirectory {
    type Prepared = PreparedAdapter;

    fn names(&self) -> Vec<String> {
        let entries = self.folder.as_ref().and_then(|folder| std::fs::read_dir(folder).ok());
        let names = entries.into_iter().flatten().filter_map(|entry| entry.ok()?.file_name().into_string().ok());
        let mut names: Vec<_> = names.filter(|name| self.path(name).is_ok()).collect();
        names.extend(self.named().keys().cloned());
        names.sort_unstable();
        names.dedup();
        names
    }

    fn version(&self, name: &str) -> Result<u64, AdapterFailure> {
        let path = self.path(name)?;
        let own = FolderVersion::of(&path).map_err(|error| unusable(name, &error))?;
        Ok(own.digest_with(&FolderVersion::of_parts(&path)))
    }

    fn prepare(&self, name: &str) -> Result<Read<PreparedAdapter>, Unread> {
        self.read(name, &self.path(name)?)
    }

    fn compose(&self, composition: &Composition) -> Result<Read<PreparedAdapter>, Unread> {
        self.sum(composition)
    }

    fn facts(prepared: &PreparedAdapter) -> AdapterFacts {
        prepared.facts()
    }
}

/// A part of a composition.
struct Part {
    weight: f64,
    version: u64,
    content: u128,
    folder: AdapterFolder,
}

impl AdapterDirectory {
    /// Reads, checks and folds the adapter in `path`.
    fn read(&self, name: &str, path: &Path) -> Result<Read<PreparedAdapter>, Unread> {
        let files = AdapterFiles::read(path).map_err(|error| unusable(name, &error))?;
        let parts = FolderVersion::of_parts(path);
        let version = files.version().digest_with(&parts);
        if AdapterMixture::is(&files) {
            let own = files.version();
            return self.mix(name, files).map_err(|error| {
                // What can't be used needn't be read again, unless what was read isn't all of one moment.
                let is_settled =
                    FolderVersion::of(path).is_ok_and(|now| now == own) && FolderVersion::of_parts(path) == parts;
                Unread { version: is_settled.then_some(version), failure: unusable(name, &*error) }
            });
        }
        // Files that were read and can't be used needn't be read again.
        let failed = |error: &dyn std::error::Error| Unread { version: Some(version), failure: unusable(name, error) };
        let parsed = AdapterFolder::parse_activated(&files, self.layers.kinds());
        let (folder, invocation) = parsed.map_err(|error| failed(&error))?;
        let content = AdapterContent(files.content());
        drop(files);
        let adapted = self.layers.prepare_over(&folder, &self.model, self.base).map_err(|error| match &error {
            // The store's errors say the name again.
            StoreError::Adapter { source, .. } => failed(source),
            other => failed(other),
        })?;
        let AdaptedModel { bias_offsets, embedding, head, .. } = &adapted;
        if invocation.is_some() && !(bias_offsets.is_empty() && embedding.is_none() && head.is_none()) {
            return Err(failed(&ActivatedError));
        }
        let prepared = PreparedAdapter::new(name.to_owned(), adapted, self.element);
        Ok(Read { version, prepared: PreparedAdapter { content, invocation, ..prepared } })
    }
}

impl AdapterDirectory {
    /// Reads, checks and folds the parts of a mixture into one adapter, with the network that weighs them.
    fn mix(&self, name: &str, files: AdapterFiles) -> Result<Read<PreparedAdapter>, Box<dyn std::error::Error>> {
        let mixture = AdapterMixture::read(files, self.layers.kinds())?;
        let (version, content) = (mixture.version, AdapterContent(mixture.content));
        let expected = self.model.decoder()?.width();
        if let Some(found) = mixture.classifier.first().map(|layer| layer.inputs).filter(|found| *found != expected) {
            return Err(HiddenSizeError { found, expected }.into());
        }
        let MixedAdapters { adapted, ranks } = self.layers.mix(&mixture, &self.model, self.base)?;
        let gates = PreparedGates::new(mixture, ranks);
        let prepared = PreparedAdapter::new(name.to_owned(), adapted, self.element);
        let bytes = prepared.bytes + gates.bytes();
        Ok(Read { version, prepared: PreparedAdapter { content, bytes, gates: Some(gates), ..prepared } })
    }

    /// Reads, checks and folds the parts of a composition into one adapter.
    fn sum(&self, composition: &Composition) -> Result<Read<PreparedAdapter>, Unread> {
        let name = composition.to_string();
        let mut parts = Vec::with_capacity(composition.parts().len());
        for (own, weight) in composition.parts() {
            let failed = |error: &dyn std::error::Error| unusable(own, error);
            let path = self.path(own)?;
            let files = AdapterFiles::read(&path).map_err(|error| failed(&error))?;
            if AdapterMixture::is(&files) {
                return Err(failed(&MixedPartError).into());
            }
            let parsed = AdapterFolder::parse_activated(&files, self.layers.kinds());
            let (mut folder, invocation) = parsed.map_err(|error| failed(&error))?;
            if invocation.is_some() {
                return Err(failed(&ActivatedPartError).into());
            }
            own.clone_into(&mut folder.name);
            let version = files.version().digest_with(&FolderVersion::of_parts(&path));
            parts.push(Part { weight, version, content: files.content(), folder });
        }
        let mut versions = parts.iter().map(|part| part.version);
        let version = composition.version(|_| versions.next().ok_or_else(|| AdapterFailure::Unknown(name.clone())))?;
        let content =
            AdapterContent(AdapterFiles::content_of_sum(parts.iter().map(|part| (part.weight, part.content))));
        let weighted: Vec<_> = parts.iter().map(|part| (part.weight, &part.folder)).collect();
        let adapted = self
            .layers
            .compose(&weighted, &self.model, self.base)
            .map_err(|error| Unread { version: Some(version), failure: unusable(&name, &error) })?;
        let prepared = PreparedAdapter::new(name, adapted, self.element);
        Ok(Read { version, prepared: PreparedAdapter { content, ..prepared } })
    }
}

/// A part of a sum that doesn't act everywhere.
#[derive(Debug, thiserror::Error)]
#[error("it is activated by `alora_invocation_tokens`, and a part of a sum acts on every token; ask for it by itself")]
struct ActivatedPartError;

/// A part of a sum whose own parts have no weights of the request's.
#[derive(Debug, thiserror::Error)]
#[error(
    "it is X-LoRA, whose parts a network weighs for each token, and a part of a sum has one weight; ask for it by itself"
)]
struct MixedPartError;

/// A classifier of another model's hidden states.
#[derive(Debug, thiserror::Error)]
#[error(
    "its classifier reads hidden states of {found} numbers (`hidden_size`), and the model's have {expected}; it is another model's"
)]
struct HiddenSizeError {
    found: usize,
    expected: usize,
}

/// What an activated adapter may not have: PEFT would have it act on all tokens.
#[derive(Debug, thiserror::Error)]
#[error(
    "it is activated by `alora_invocation_tokens` and changes biases, the embedding or the output matrix beside projections; train it without these"
)]
struct ActivatedError;

fn unusable(name: &str, reason: &dyn std::error::Error) -> AdapterFailure {
    AdapterFailure::Unusable { name: name.to_owned(), reason: reason.to_string() }
}

impl PreparedAdapter {
    /// `element` is the type in which the device keeps it. It acts on all tokens, and is told from all others that there are: clones
    /// have the same content, and nothing else has.
    pub fn new(name: String, adapted: AdaptedModel, element: Element) -> Self {
        static NEXT: AtomicU64 = AtomicU64::new(0);
        let vectors = adapted.modules.values().map(numbers).sum::<usize>() as u64 * element.bytes();
        let sparse = adapted.modules.values().map(|folded| folded.sparse.bytes() as u64).sum::<u64>();
        let offsets = adapted.bias_offsets.values().map(Vec::len).sum::<usize>() as u64 * 4;
        let embedding = adapted.embedding.as_ref().map_or(0, |embedding| embedding.bytes());
        let head = adapted.head.as_ref().map_or(0, |head| {
            let weight = head.weight.as_ref().map_or(0, |weight| weight.bytes().len());
            (weight + head.rows.as_ref().map_or(0, |rows| 4 * rows.values.len())) as u64
        });
        let content = AdapterContent(NEXT.fetch_add(1, Ordering::Relaxed).into());
        Self {
            name,
            adapted,
            bytes: vectors + sparse + offsets + embedding + head,
            content,
            invocation: None,
            gates: None,
        }
    }

    /// What the engine has to know of it.
    pub fn facts(&self) -> AdapterFacts {
        let gated = self.gates.is_some();
        AdapterFacts { bytes: self.bytes, content: self.content, invocation: self.invocation.clone(), gated }
    }

    /// The paths of all modules that it adapts.
    pub(crate) fn paths(&self) -> impl Iterator<Item = &str> {
        let AdaptedModel { modules, bias_offsets, embedding, head } = &self.adapted;
        let ends = embedding.iter().map(|embedding| &embedding.path).chain(head.iter().map(|head| &head.path));
        modules.keys().chain(bias_offsets.keys()).chain(ends).map(String::as_str)
    }
}
