//! The adapter whose whole weights are kept beside the base model's: whether an adapter can be that one, and what it takes.

use flora_checkpoint::ModelError;
use flora_engine::{AdapterFailure, AdapterSource};
use flora_ir::algebra::FoldedAdapter;
use flora_plan::layer::{Element, LayerShape, WeightFormat};

use crate::build::OUTPUT;
use crate::source::{AdapterDirectory, PreparedAdapter};

/// Why an adapter's weights can't be kept.
#[derive(Debug, thiserror::Error)]
#[non_exhaustive]
pub enum MergeError {
    /// There is no such adapter.
    #[error("there is no adapter `{name}` to merge; there are: {known}")]
    Unknown {
        /// What was asked for.
        name: String,
        /// What there is.
        known: String,
    },
    /// It can't be read, or doesn't fit the model.
    #[error(transparent)]
    Unusable(AdapterFailure),
    /// It has no weight of its own, but one for every token.
    #[error(
        "the adapter `{0}` weighs its parts for each token (X-LoRA), and a merged weight is the same for all; serve it unmerged, or merge another"
    )]
    Gated(String),
    /// It scales no projection and adds no low-rank sum to one.
    #[error(
        "the adapter `{0}` has no scales and no low-rank sum of a projection, which a merged weight would hold: what else it does (sparse matrices, biases, embeddings) is done as without one; serve it unmerged, or merge another"
    )]
    NothingToMerge(String),
    /// The model's files don't say how large a projection is.
    #[error(transparent)]
    Model(#[from] ModelError),
}

impl PreparedAdapter {
    /// Whether its weights can be kept.
    ///
    /// # Errors
    /// An adapter with gates, or one of no projection.
    pub fn check_mergeable(&self) -> Result<(), MergeError> {
        if self.gates.is_some() {
            return Err(MergeError::Gated(self.name.clone()));
        }
        match self.merged_paths().next() {
            Some(_) => Ok(()),
            None => Err(MergeError::NothingToMerge(self.name.clone())),
        }
    }

    /// The projections of the model that have a weight of the adapter's own: of those that it does something else to, such a weight would
    /// be the base's. An output matrix that it brings along isn't the model's.
    pub(crate) fn merged_paths(&self) -> impl Iterator<Item = &String> {
        let own = self.adapted.head.as_ref().filter(|head| head.weight.is_some()).map(|head| head.path.as_str());
        let holds = |adapter: &FoldedAdapter| {
            let layout = adapter.layout();
            layout.low_rank > 0 || !layout.is_plain()
        };
        let modules = self.adapted.modules.iter().filter(move |(_, adapter)| holds(adapter)).map(|(path, _)| path);
        modules.filter(move |path| Some(path.as_str()) != own)
    }
}

impl AdapterDirectory {
    /// Bytes that the weights of the adapter `name` take where they are kept ([`ServeOptions::merged`](crate::ServeOptions::merged)),
    /// with activations of this type: a weight for each projection that it adapts. Reads the adapter.
    ///
    /// # Errors
    /// An adapter that there isn't, that can't be used, or whose weights can't be kept.
    pub fn merged_bytes(&self, name: &str, activations: Element) -> Result<u64, MergeError> {
        let prepared = self.prepare(name).map_err(|unread| match unread.failure {
            AdapterFailure::Unknown(name) => MergeError::Unknown { name, known: self.known() },
            unusable => MergeError::Unusable(unusable),
        })?;
        prepared.prepared.check_mergeable()?;
        let mut bytes = 0u64;
        for path in prepared.prepared.merged_paths() {
            let shape = self.shape_of(path)?;
            bytes = bytes.saturating_add(WeightFormat::Float(activations).bytes(shape));
        }
        Ok(bytes)
    }

    /// Some of the names that there are.
    fn known(&self) -> String {
        const SHOWN: usize = 8;
        let mut names = self.names();
        let more = if names.len() > SHOWN { format!(", and {} more", names.len() - SHOWN) } else { String::new() };
        names.truncate(SHOWN);
        if names.is_empty() { "none".to_owned() } else { names.join(", ") + &more }
    }

    /// Extents of a projection, or of the output matrix.
    fn shape_of(&self, path: &str) -> Result<LayerShape, ModelError> {
        let model = self.model();
        let (d, k) = if path == OUTPUT {
            let decoder = model.decoder()?;
            (decoder.width(), decoder.vocabulary())
        } else {
            let projection = model.projection(path)?;
            (projection.d, projection.k)
        };
        let extent = |extent: usize| u32::try_from(extent).unwrap_or(u32::MAX);
        Ok(LayerShape { d: extent(d), k: extent(k) })
    }
}
