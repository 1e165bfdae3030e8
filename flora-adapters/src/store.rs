//! Adapters from disk, ready for the projections that they adapt: each module's tensors meet the compiled layer of their kind,
//! and are folded for one base weight at a time.

use std::collections::{BTreeMap, BTreeSet};
use std::path::{Path, PathBuf};
use std::sync::Arc;

use flora_checkpoint::{AdapterError, AdapterFolder, AdapterKind, BaseWeight, Model, TensorProblem};
use flora_ir::Bindings;
use flora_ir::algebra::{ComposeError, FoldError, FoldedAdapter};
use flora_plan::pipeline::CompiledLayer;
use rayon::prelude::*;

use crate::derive::DeriveError;
use crate::layers::{FoldTarget, Layers, Prepared, base_value};
use crate::weights::BaseError;

/// The adapters that batches may name, each whole in host memory (f32).
#[derive(Clone, Debug)]
pub struct AdapterStore {
    adapters: BTreeMap<String, AdapterFolder>,
    /// Those that can't be used, and why.
    failed: BTreeMap<String, Arc<StoreError>>,
    layers: Layers,
}

/// An adapter of one projection, folded for its base weight.
#[derive(Clone, Debug)]
pub struct LoadedAdapter<'a> {
    /// The layer of its kind, whose `written` equation the oracle evaluates.
    pub layer: &'a CompiledLayer,
    /// The adapter's own tensors by the names of the layer's operands.
    pub operands: Bindings,
    /// What [`Projection::load`](flora_runtime::Projection::load) takes.
    pub folded: FoldedAdapter,
}

/// Why adapters can't be served.
#[derive(Debug, thiserror::Error)]
#[non_exhaustive]
pub enum StoreError {
    /// The folder of folders can't be listed.
    #[error("cannot list {}: {source}", path.display())]
    List {
        /// The folder.
        path: PathBuf,
        /// The system's reason.
        source: std::io::Error,
    },
    /// No sub-folder is an adapter.
    #[error("{} has no sub-folder with an adapter_config.json; give the folder that holds one folder per adapter", path.display())]
    Empty {
        /// The folder.
        path: PathBuf,
    },
    /// One adapter can't be read, or doesn't fit the model.
    #[error("the adapter `{name}` can't be used: {source}")]
    Adapter {
        /// The adapter.
        name: String,
        /// Why.
        source: Box<AdapterError>,
    },
    /// Two adapters of one name.
    #[error("two adapters are called `{0}`; rename the folder of one")]
    Duplicate(String),
    /// A name that no adapter has.
    #[error("no adapter is called `{name}`; there are: {known}")]
    Unknown {
        /// What was asked for.
        name: String,
        /// What there is, shortened.
        known: String,
    },
    /// A layer that no registered kind has.
    #[error("the adapter `{adapter}` wants the layer `{layer}` for `{module}`, which isn't registered")]
    UnknownLayer {
        /// The adapter.
        adapter: String,
        /// The module.
        module: String,
        /// The layer.
        layer: String,
    },
    /// A kind that scales the whole output of a layer, as IA3 does, on one with a bias: l ∘ (x @ w0 + bias). A bias is one vector
    /// for all rows of a batch here.
    #[error(
        "the adapter `{adapter}` ({kind}) scales the output of `{module}`, which has a bias, and would scale the bias too; \
         that isn't supported: scale the input of `{module}` instead (IA3's feedforward_modules), or leave the module out"
    )]
    ScaledBias {
        /// The adapter.
        adapter: String,
        /// Its kind.
        kind: String,
        /// The module.
        module: String,
    },
    /// An adapter of the token embedding that makes a token's row of other tokens' rows as well.
    #[error(
        "the adapter `{adapter}` ({kind}) transforms the inputs of `{module}`, the token embedding, which would make a token's row of \
         many; leave that module out of the adapter"
    )]
    MixedTokens {
        /// The adapter.
        adapter: String,
        /// Its kind.
        kind: String,
        /// The embedding's path.
        module: String,
    },
    /// A kind that adds a vector of the adapter's own, where nothing adds one.
    #[error("the adapter `{adapter}` ({kind}) adds a bias of its own to `{module}`, which isn't supported here")]
    OwnBias {
        /// The adapter.
        adapter: String,
        /// Its kind.
        kind: String,
        /// The module.
        module: String,
    },
    /// An operand that a function of its kind can't make.
    #[error("the adapter `{adapter}` can't be used for `{module}`: its `{operand}` can't be derived: {source}")]
    Derive {
        /// The adapter.
        adapter: String,
        /// The module.
        module: String,
        /// The operand.
        operand: String,
        /// Why.
        source: Box<DeriveError>,
    },
    /// The model's own weight, which an adapter is folded with, can't be read.
    #[error("the adapter `{adapter}` is folded with a base weight that can't be read: {source}")]
    Base {
        /// The adapter.
        adapter: String,
        /// Why.
        source: Box<BaseError>,
    },
    /// An embedding or output matrix that an adapter is folded with can't be read.
    #[error("the adapter `{adapter}` is folded with the weight of `{module}`, which {problem}")]
    End {
        /// The adapter.
        adapter: String,
        /// The module.
        module: String,
        /// What is wrong with it.
        problem: TensorProblem,
    },
    /// Tied factors of a kind that has more than factors.
    #[error(
        "the adapter `{adapter}` ties the factors of the output matrix to those of `{module}` (`ensure_weight_tying`), which is \
         supported of plain LoRA alone"
    )]
    TiedFactors {
        /// The adapter.
        adapter: String,
        /// The module.
        module: String,
    },
    /// An adapter that is more than changes of projections, in a sum of adapters.
    #[error(
        "the adapter `{adapter}` can't be a part of a sum: it replaces the {what}, and only changes are weighted; leave it out of the sum"
    )]
    Replaces {
        /// The adapter.
        adapter: String,
        /// What it replaces.
        what: &'static str,
    },
    /// A part of a mixture that changes more than projections of blocks.
    #[error(
        "the adapter `{adapter}` changes {what}, and a part of X-LoRA changes the projections of the blocks alone; train it without"
    )]
    Mixed {
        /// The adapter.
        adapter: String,
        /// What it changes.
        what: &'static str,
    },
    /// An adapter whose change of a module isn't weighted.
    #[error("the adapter `{adapter}` ({kind}) can't be a part of a sum at `{module}`: {source}")]
    Compose {
        /// The adapter.
        adapter: String,
        /// Its kind.
        kind: String,
        /// The module.
        module: String,
        /// Why.
        source: ComposeError,
    },
    /// Adapters whose sum can't be computed.
    #[error("the sum of the adapters can't be folded for `{module}`: {source}")]
    Sum {
        /// The module.
        module: String,
        /// Why.
        source: ComposeError,
    },
    /// Tensors that don't fold.
    #[error("the adapter `{adapter}` can't be folded for `{module}`: {source}")]
    Fold {
        /// The adapter.
        adapter: String,
        /// The module.
        module: String,
        /// Why.
        source: Box<FoldError>,
    },
}

impl AdapterStore {
    /// Reads every sub-folder of `folder` that has an `adapter_config.json`, as one of the kinds of `layers`. One that can't be read
    /// is among [`failed`](Self::failed).
    ///
    /// # Errors
    /// No such sub-folder; what is wrong with the first one where none can be read.
    pub fn open(folder: &Path, layers: Layers) -> Result<Self, StoreError> {
        let failed = |source| StoreError::List { path: folder.to_owned(), source };
        let mut paths = Vec::new();
        for entry in std::fs::read_dir(folder).map_err(failed)? {
            let path = entry.map_err(failed)?.path();
            if path.join("adapter_config.json").symlink_metadata().is_ok() {
                paths.push(path);
            }
        }
        if paths.is_empty() {
            return Err(StoreError::Empty { path: folder.to_owned() });
        }
        paths.sort();
        let open = |path: &PathBuf| {
            let name = path.file_name().unwrap_or(path.as_os_str()).to_string_lossy().into_owned();
            AdapterFolder::open(path, layers.kinds())
                .map_err(|source| (name.clone(), StoreError::Adapter { name, source: source.into() }))
        };
        let (mut folders, mut failed) = (Vec::new(), Vec::new());
        for opened in paths.par_iter().map(open).collect::<Vec<_>>() {
            match opened {
                Ok(folder) => folders.push(folder),
                Err(error) => failed.push(error),
            }
        }
        if folders.is_empty() && !failed.is_empty() {
            return Err(failed.swap_remove(0).1);
        }
        let mut store = Self::from_folders(folders, layers)?;
        store.failed = failed.into_iter().map(|(name, error)| (name, Arc::new(error))).collect();
        Ok(store)
    }

    /// A store of adapters that are in memory, folded by `layers`.
    ///
    /// # Errors
    /// Two of one name.
    pub fn from_folders(folders: Vec<AdapterFolder>, layers: Layers) -> Result<Self, StoreError> {
        let mut adapters = BTreeMap::new();
        for folder in folders {
            if let Some(first) = adapters.insert(folder.name.clone(), folder) {
                return Err(StoreError::Duplicate(first.name));
            }
        }
        Ok(Self { adapters, failed: BTreeMap::new(), layers })
    }

    /// The adapters that can't be used, and why, by name.
    pub fn failed(&self) -> &BTreeMap<String, Arc<StoreError>> {
        &self.failed
    }

    /// The names of the adapters that can be used, sorted.
    pub fn names(&self) -> impl Iterator<Item = &str> {
        self.adapters.keys().map(String::as_str)
    }

    /// How many adapters of each kind there are.
    pub fn kinds(&self) -> BTreeMap<AdapterKind, usize> {
        let mut kinds = BTreeMap::new();
        for adapter in self.adapters.values() {
            *kinds.entry(adapter.kind.clone()).or_insert(0) += 1;
        }
        kinds
    }

    /// The module paths that some adapter adapts.
    pub fn modules(&self) -> BTreeSet<&str> {
        self.adapters.values().flat_map(|adapter| adapter.modules.keys()).map(String::as_str).collect()
    }

    /// The store without the adapters that `names` doesn't list.
    ///
    /// # Errors
    /// A name that no adapter has.
    pub fn restricted_to<'n>(mut self, names: impl IntoIterator<Item = &'n str>) -> Result<Self, StoreError> {
        let mut kept = BTreeMap::new();
        for name in names {
            if kept.contains_key(name) {
                continue;
            }
            let Some((name, adapter)) = self.adapters.remove_entry(name) else {
                self.adapters.append(&mut kept);
                return Err(StoreError::Unknown { name: name.to_owned(), known: shortened(self.names()) });
            };
            kept.insert(name, adapter);
        }
        Ok(Self { adapters: kept, failed: self.failed, layers: self.layers })
    }

    /// Checks that every adapter fits `model`: modules, shapes, and that what its config targets is there.
    ///
    /// # Errors
    /// The first adapter, by name, that doesn't.
    pub fn check_against(&self, model: &Model) -> Result<(), StoreError> {
        self.adapters.values().try_for_each(|adapter| self.layers.check_against(adapter, model))
    }

    /// The store without the adapters that don't fit `model`, which are among [`failed`](Self::failed) now.
    #[must_use]
    pub fn fitting(mut self, model: &Model) -> Self {
        for (name, adapter) in std::mem::take(&mut self.adapters) {
            match self.layers.check_against(&adapter, model) {
                Ok(()) => drop(self.adapters.insert(name, adapter)),
                Err(error) => drop(self.failed.insert(name, Arc::new(error))),
            }
        }
        self
    }

    /// The layer of base rows: x @ w0.
    pub fn base_layer(&self) -> &CompiledLayer {
        self.layers.base()
    }

    /// Every adapter for the projection at `module`, folded in parallel; `None` for one that leaves it alone.
    ///
    /// # Errors
    /// The first adapter, by name, that doesn't fit `base`.
    pub fn fold(
        &self,
        module: &str,
        base: &BaseWeight,
    ) -> Result<BTreeMap<&str, Option<LoadedAdapter<'_>>>, StoreError> {
        // In f64 it takes twice the weight's memory, so that it is made only where some adapter reads it.
        let adapted =
            |adapter: &AdapterFolder| adapter.modules.get(module).is_some_and(|own| self.layers.read_base(own));
        let base_weight = self.adapters.values().any(adapted).then(|| base_value(base));
        let outcomes: Vec<_> = self
            .adapters
            .par_iter()
            .map(|(name, adapter)| {
                let Some(adapted) = adapter.modules.get(module) else { return Ok((name.as_str(), None)) };
                // A bias is one vector for all rows of a batch.
                if base.bias.is_some() && self.layers.scales_bias(adapted) {
                    return Err(self.layers.scaled_bias(name, module, adapted));
                }
                let target = FoldTarget { adapter: name, path: module, d: base.d, k: base.k, weight: 1.0 };
                let prepared = self.layers.fold(&target, adapter, adapted, || match &base_weight {
                    Some(base_weight) => base_weight.clone().map_err(|error| target.failed(error.into())),
                    None => base_value(base).map_err(|error| target.failed(error.into())),
                })?;
                let Prepared { layer, operands, folded, offset } = prepared;
                match offset {
                    Some(_) => Err(self.layers.own_bias(&target, adapted)),
                    None => Ok((name.as_str(), Some(LoadedAdapter { layer, operands, folded }))),
                }
            })
            .collect();
        outcomes.into_iter().collect()
    }
}

/// The first few of `names`.
fn shortened<'a>(names: impl Iterator<Item = &'a str>) -> String {
    const SHOWN: usize = 8;
    let names: Vec<_> = names.collect();
    let more = names.len().saturating_sub(SHOWN);
    let shown = names.get(..SHOWN).unwrap_or(&names).join(", ");
    match (names.len(), more) {
        (0, _) => "none".to_owned(),
        (_, 0) => shown,
        _ => format!("{shown}, and {more} more"),
    }
}

#[cfg(test)]
mod tests {
    use flora_checkpoint::{AdapterModule, Operand};

    use super::*;

    fn module(layer: &str, rank: usize, operands: &[(&str, &[usize], &[f32])]) -> AdapterModule {
        let operand = |shape: &[usize], values: &[f32]| Operand { shape: shape.to_vec(), values: values.to_vec() };
        let operands =
            operands.iter().map(|(name, shape, values)| ((*name).to_owned(), operand(shape, values))).collect();
        AdapterModule { layer: layer.to_owned(), rank, operands }
    }

    fn layers() -> Layers {
        Layers::builtin().expect("the built-in kinds")
    }

    fn folder(name: &str, path: &str, module: AdapterModule) -> AdapterFolder {
        let kind = layers().kinds().kind_of_layer(&module.layer).expect("a built-in layer");
        AdapterFolder::new(name, kind, BTreeMap::from([(path.to_owned(), module)]))
    }

    fn stored(folders: Vec<AdapterFolder>) -> Result<AdapterStore, StoreError> {
        AdapterStore::from_folders(folders, layers())
    }

    fn dora(magnitudes: &[f32]) -> AdapterModule {
        let zeros: (&[usize], &[f32]) = (&[2, 1], &[0.0, 0.0]);
        module(
            "dora",
            1,
            &[("b", zeros.0, zeros.1), ("a", &[1, 2], &[1.0, 1.0]), ("s", &[], &[1.0]), ("m", &[2], magnitudes)],
        )
    }

    fn base(bias: Option<Vec<f32>>) -> BaseWeight {
        BaseWeight { d: 2, k: 2, values: vec![3.0, 0.0, 4.0, 2.0], bias }
    }

    #[test]
    fn dora_is_folded_with_the_norm_of_the_base_weight() {
        let store = stored(vec![folder("a", "q", dora(&[10.0, 6.0]))]).expect("one adapter");
        let loaded = store.fold("q", &base(None)).expect("it fits");
        let folded = &loaded["a"].as_ref().expect("it adapts q").folded;
        // The columns (3, 4) and (0, 2) have the norms 5 and 2.
        assert_eq!(folded.virtual_rows[0].out_scale, Some(vec![2.0, 3.0]));
        assert!(store.fold("v", &base(None)).expect("nothing to fit")["a"].is_none());
    }

    #[test]
    fn what_does_not_fit_is_named() {
        let wide = dora(&[1.0, 1.0, 1.0]);
        let store = stored(vec![folder("wide", "q", wide)]).expect("one adapter");
        let message = store.fold("q", &base(None)).expect_err("3 magnitudes for 2 outputs").to_string();
        assert!(message.contains("`wide`") && message.contains("`q`"), "{message}");

        let scale = || module("ia3", 0, &[("l", &[2], &[1.0, 2.0])]);
        let store = stored(vec![folder("i", "q", scale())]).expect("one adapter");
        assert!(store.fold("q", &base(None)).is_ok());
        let biased = store.fold("q", &base(Some(vec![1.0, 1.0])));
        assert!(matches!(biased, Err(StoreError::ScaledBias { .. })));

        let twice = [scale(), scale()].map(|module| folder("i", "q", module));
        assert!(matches!(stored(twice.into()), Err(StoreError::Duplicate(_))));
        assert!(matches!(store.restricted_to(["i", "j"]), Err(StoreError::Unknown { .. })));
    }

    #[test]
    fn a_folder_that_fails_is_named() {
        let parent = tempfile::tempdir().expect("a temporary folder");
        assert!(matches!(AdapterStore::open(parent.path(), layers()), Err(StoreError::Empty { .. })));
        let scale = module("ia3", 0, &[("l", &[2], &[1.0, 2.0])]);
        folder("good", "q", scale).write(parent.path()).expect("a writable folder");
        assert_eq!(
            AdapterStore::open(parent.path(), layers()).expect("one adapter").kinds().into_values().collect::<Vec<_>>(),
            [1]
        );
        std::fs::create_dir(parent.path().join("broken")).expect("a new folder");
        std::fs::write(parent.path().join("broken/adapter_config.json"), "{").expect("a new file");
        let store = AdapterStore::open(parent.path(), layers()).expect("one that is whole");
        assert_eq!(store.names().collect::<Vec<_>>(), ["good"]);
        let message = store.failed()["broken"].to_string();
        assert!(message.contains("`broken`"), "{message}");
        std::fs::remove_dir_all(parent.path().join("good")).expect("a folder");
        let message = AdapterStore::open(parent.path(), layers()).expect_err("none that is whole").to_string();
        assert!(message.contains("`broken`"), "{message}");
    }
}
