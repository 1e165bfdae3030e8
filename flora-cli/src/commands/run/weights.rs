//! The base weights of a run: a model's, or random ones of its shapes where it can't be had.

use std::path::Path;

use flora::prelude::*;
use flora_adapters::{BaseError, BaseForm};
use flora_checkpoint::{BaseWeight, Model, ModelError};

use super::samples::{self, Random};
use crate::commands::error::CommandError;
use crate::commands::{output, types};
use crate::models;

/// One projection to run.
#[derive(Clone, Debug)]
pub(super) struct Module {
    /// The module path.
    pub(super) path: String,
    /// Inputs.
    pub(super) d: usize,
    /// Outputs.
    pub(super) k: usize,
    /// Whether the layer has a bias.
    pub(super) has_bias: bool,
}

/// The weight of one projection.
pub(super) struct Base {
    /// How the file has it; "random" where there is none.
    pub(super) stored: &'static str,
    /// What goes to the device.
    pub(super) packed: PackedWeight,
    /// The numbers that it decodes to, for the oracle and for adapters that are made of them; forgotten with the projection.
    pub(super) decoded: BaseWeight,
}

/// Where base weights come from.
pub(super) enum Weights {
    /// A model's files.
    Stored(Model),
    /// A seed and SmolLM2's shapes.
    Seeded {
        /// The projections.
        modules: Vec<Module>,
        /// The seed.
        seed: u64,
    },
}

impl Weights {
    /// The model at `path`, else SmolLM2, else random weights of its shapes.
    pub(super) fn open(path: Option<&Path>, seeded: bool, seed: u64) -> Result<Self, CommandError> {
        let fetched;
        let path = match path {
            Some(path) => path,
            None if seeded => return Ok(Self::seeded(seed)),
            None => match flora_toolchain::smollm2() {
                Ok(path) => {
                    fetched = path;
                    &fetched
                }
                Err(error) => {
                    output::note(&format!(
                        "warning: {error}\nwarning: no model is here, so this run uses random weights of SmolLM2-135M's shapes"
                    ));
                    return Ok(Self::seeded(seed));
                }
            },
        };
        Ok(Self::Stored(Model::open(path)?))
    }

    fn seeded(seed: u64) -> Self {
        let shapes = models::builtin(models::SMOLLM2).into_iter();
        let modules = shapes.flat_map(|shapes| {
            (0..shapes.layers).flat_map(move |layer| {
                let module = move |shape: models::ProjectionShape| Module {
                    path: format!("{}.{layer}.{}", shapes.prefix, shape.name),
                    d: shape.d,
                    k: shape.k,
                    has_bias: false,
                };
                shapes.projections.clone().into_iter().map(module)
            })
        });
        Self::Seeded { modules: modules.collect(), seed }
    }

    /// The model's name.
    pub(super) fn name(&self) -> &str {
        match self {
            Self::Stored(model) => model.name(),
            Self::Seeded { .. } => models::SMOLLM2,
        }
    }

    /// `stored` or `seeded`.
    pub(super) fn kind(&self) -> &'static str {
        match self {
            Self::Stored(_) => "stored",
            Self::Seeded { .. } => "seeded",
        }
    }

    /// All projections, in the model's order.
    pub(super) fn modules(&self) -> Vec<Module> {
        match self {
            Self::Seeded { modules, .. } => modules.clone(),
            Self::Stored(model) => {
                let module = |projection: &flora_checkpoint::Projection| Module {
                    path: projection.path.clone(),
                    d: projection.d,
                    k: projection.k,
                    has_bias: projection.has_bias,
                };
                model.projections().iter().map(module).collect()
            }
        }
    }

    /// The weight of one projection, for `device` in the form that is asked for.
    pub(super) fn base(&self, path: &str, form: types::Base, device: &Device) -> Result<Base, CommandError> {
        match self {
            Self::Stored(model) => {
                let unusable = |source| CommandError::Base { model: self.name().to_owned(), source };
                let packed = BaseForm::from(form).pack(model, path, device).map_err(unusable)?;
                let LayerShape { d, k } = packed.shape();
                let bias = model.bias(path)?;
                let decoded = BaseWeight { d: d as usize, k: k as usize, values: packed.to_f32(), bias };
                Ok(Base { stored: model.projection(path)?.encoding.name(), packed, decoded })
            }
            Self::Seeded { modules, seed } => {
                let decoded = Self::random(modules, *seed, path)?;
                let shape = LayerShape { d: extent(decoded.d)?, k: extent(decoded.k)? };
                let unusable = |source| {
                    let source = BaseError::Pack { name: path.to_owned(), source };
                    CommandError::Base { model: self.name().to_owned(), source }
                };
                let format = match form {
                    types::Base::Stored | types::Base::F32 => WeightFormat::default(),
                    types::Base::Int8 => WeightFormat::Int8,
                };
                let packed = PackedWeight::from_f32(format, shape, &decoded.values).map_err(unusable)?;
                let decoded = BaseWeight { values: packed.to_f32(), ..decoded };
                Ok(Base { stored: "random", packed, decoded })
            }
        }
    }

    fn random(modules: &[Module], seed: u64, path: &str) -> Result<BaseWeight, ModelError> {
        let module = modules.iter().find(|module| module.path == path).ok_or_else(|| {
            let (model, projection) = (models::SMOLLM2.to_owned(), path.to_owned());
            ModelError::UnknownProjection { model, projection, near: None }
        })?;
        let (d, k) = (module.d, module.k);
        // A product of d such weights with inputs of variance 1 has variance 1.
        let half_width = (3.0 / d as f32).sqrt();
        let values = Random::new(seed, &["weight", path]).around(0.0, half_width, samples::product(d, k));
        Ok(BaseWeight { d, k, values, bias: None })
    }
}

fn extent(extent: usize) -> Result<u32, CommandError> {
    let limit = u64::from(u32::MAX);
    let too_many = |_| CommandError::TooMany { what: "the extents of a base weight", found: extent as u64, limit };
    u32::try_from(extent).map_err(too_many)
}
