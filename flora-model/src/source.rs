//! Adapters from a folder of PEFT folders, read, checked and folded when a request first names them.

use std::collections::BTreeMap;
use std::hash::{Hash, Hasher};
use std::path::{Component, Path, PathBuf};
use std::sync::Arc;

use flora_adapters::{Layers, RegisterError, StoreError};
use flora_checkpoint::{AdapterFolder, Model};
use flora_engine::{AdapterFailure, AdapterSource};
use flora_ir::algebra::FoldedAdapter;
use flora_plan::layer::Element;
use rustc_hash::FxHasher;

const CONFIG: &str = "adapter_config.json";
const TENSORS: &str = "adapter_model.safetensors";

/// The sub-folders of one folder, by name. What is in it may change at any time.
#[derive(Debug)]
pub struct AdapterDirectory {
    folder: Option<PathBuf>,
    model: Arc<Model>,
    layers: Layers,
    element: Element,
}

/// An adapter in host memory, folded for every projection that it adapts.
#[derive(Clone, Debug)]
pub struct PreparedAdapter {
    /// Its name.
    pub name: String,
    /// By module path.
    pub modules: BTreeMap<String, FoldedAdapter>,
    /// Bytes on the device.
    pub bytes: u64,
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
        Self { folder: folder.map(Path::to_owned), model: model.clone(), layers, element }
    }

    /// The adapter's folder. A name is one component of a path, or there is no such adapter.
    fn path(&self, name: &str) -> Result<PathBuf, AdapterFailure> {
        let mut components = Path::new(name).components();
        let plain =
            matches!((components.next(), components.next()), (Some(Component::Normal(part)), None) if part == name);
        let path = self.folder.as_ref().filter(|_| plain).map(|folder| folder.join(name));
        path.filter(|path| path.join(CONFIG).is_file()).ok_or_else(|| AdapterFailure::Unknown(name.to_owned()))
    }
}

impl AdapterSource for AdapterDirectory {
    type Prepared = PreparedAdapter;

    fn names(&self) -> Vec<String> {
        let Some(Ok(entries)) = self.folder.as_ref().map(std::fs::read_dir) else { return Vec::new() };
        let names = entries.filter_map(|entry| entry.ok()?.file_name().into_string().ok());
        let mut names: Vec<_> = names.filter(|name| self.path(name).is_ok()).collect();
        names.sort_unstable();
        names
    }

    fn version(&self, name: &str) -> Result<u64, AdapterFailure> {
        let path = self.path(name)?;
        let mut hasher = FxHasher::default();
        for file in [CONFIG, TENSORS] {
            // A file that can't be looked at is as good as none: reading it says why.
            let metadata = std::fs::metadata(path.join(file)).ok();
            let modified = metadata.as_ref().and_then(|metadata| metadata.modified().ok());
            (metadata.map(|metadata| metadata.len()), modified).hash(&mut hasher);
        }
        Ok(hasher.finish())
    }

    fn prepare(&self, name: &str) -> Result<PreparedAdapter, AdapterFailure> {
        let path = self.path(name)?;
        let unusable = |reason: String| AdapterFailure::Unusable { name: name.to_owned(), reason };
        let folder = AdapterFolder::open(&path, self.layers.kinds()).map_err(|error| unusable(error.to_string()))?;
        // The store's errors say the name again.
        let modules = self.layers.prepare(&folder, &self.model).map_err(|error| match error {
            StoreError::Adapter { source, .. } => unusable(source.to_string()),
            other => unusable(other.to_string()),
        })?;
        Ok(PreparedAdapter::new(name.to_owned(), modules, self.element))
    }

    fn bytes(prepared: &PreparedAdapter) -> u64 {
        prepared.bytes
    }
}

impl PreparedAdapter {
    /// `element` is the type in which the device keeps it.
    pub fn new(name: String, modules: BTreeMap<String, FoldedAdapter>, element: Element) -> Self {
        let numbers = |folded: &FoldedAdapter| {
            let scales = folded.virtual_rows.iter().flat_map(|row| [&row.in_scale, &row.out_scale]);
            let scales: usize = scales.flatten().map(Vec::len).sum();
            scales + folded.low_rank.iter().map(|pair| pair.shrink.len() + pair.expand.len()).sum::<usize>()
        };
        let bytes = modules.values().map(numbers).sum::<usize>() as u64 * element.bytes();
        Self { name, modules, bytes }
    }
}
