//! The adapter of a job: what the user would write, in f32, and its two ways to the model. Parameters are folded into vectors before
//! a step, and the gradients of those vectors come back through [`Unfolding`].

use std::collections::BTreeMap;
use std::path::Path;
use std::sync::Arc;

use flora_adapters::Layers;
use flora_adapters::layers::bindings;
use flora_checkpoint::peft::description::{Initial, LayerDescription, TensorDescription};
use flora_checkpoint::{
    AdapterError, AdapterFolder, AdapterKind, AdapterModule, AdapterRequest, AdapterSettings, Operand,
};
use flora_ir::algebra::{FoldError, FoldedAdapter, NormalForm};
use flora_ir::gradient::{FoldedGradient, Unfolding};
use flora_ir::{Bindings, EvaluateError, Value};
use rayon::prelude::*;

use crate::initial::{Place, Start, reads_base};
use crate::trainee::{TargetLayer, Trainee};

/// Why an adapter can't be made for a model.
#[derive(Debug, thiserror::Error)]
#[non_exhaustive]
pub enum MakeError {
    /// What is asked for makes no sense.
    #[error(transparent)]
    Settings(#[from] AdapterError),
    /// No layer of the model is meant.
    #[error("no layer of the model is adapted; its layers are such as `{example}`")]
    Nothing {
        /// A layer's path.
        example: String,
    },
    /// A layer that isn't compiled.
    #[error("the layer `{layer}` has no equation here; register it with its kind")]
    NoEquation {
        /// The layer.
        layer: String,
    },
    /// A kind that doesn't say what training starts from.
    #[error(
        "the description of the layer `{layer}` doesn't say what the operand `{operand}` starts from: give it an `init`"
    )]
    NoStart {
        /// The layer.
        layer: String,
        /// The operand.
        operand: String,
    },
    /// A kind without a start of its authors' own.
    #[error("the layer `{layer}` has no start of its authors' own; use the default one{}", other.as_ref().map(|other| format!(", or the layer `{other}`")).unwrap_or_default())]
    NoReference {
        /// The layer.
        layer: String,
        /// Another layer of the kind that has one.
        other: Option<String>,
    },
    /// A layer of sparse matrices.
    #[error(
        "adapters of the layer `{layer}` multiply rows by sparse matrices, through which no gradients are computed; train another kind"
    )]
    Sparse {
        /// The layer.
        layer: String,
    },
    /// A layer that would scale a bias.
    #[error(
        "`{layer}` scales the output of `{path}`, which has a bias, and would scale the bias too; that isn't trained: scale its input \
         instead (IA3's `feedforward_modules`), or leave the module out"
    )]
    ScaledBias {
        /// The layer.
        layer: String,
        /// The module.
        path: String,
    },
    /// A module of an adapter that there is, which the model doesn't have in its shape.
    #[error("the adapter to begin with adapts `{path}`, which the model doesn't have, or not in that shape")]
    Unfit {
        /// The module.
        path: String,
    },
    /// The model's weight can't be read.
    #[error("the base weight of `{path}` can't be read: {problem}")]
    Base {
        /// The module.
        path: String,
        /// Why.
        problem: String,
    },
}

/// A job's adapter.
#[derive(Clone, Debug)]
pub struct Adapter {
    kind: AdapterKind,
    modules: Vec<TrainedModule>,
}

/// The adapter of one layer of the model.
#[derive(Clone, Debug)]
struct TrainedModule {
    /// Its index in [`Trainee::layers`].
    layer: usize,
    path: String,
    /// All operands, numbers that come from options among them.
    module: AdapterModule,
    /// The operands that are trained, in the order of the description.
    trained: Vec<String>,
    linear: Arc<NormalForm>,
    unfolding: Arc<Unfolding>,
    /// What the equation calls the base weight, and that, where folding reads it.
    base: Option<(String, Arc<Value>)>,
}

/// One tensor that is trained.
#[derive(Clone, Copy, Debug)]
pub struct Parameter<'a> {
    /// The module's path.
    pub path: &'a str,
    /// The operand of its layer.
    pub operand: &'a str,
    /// Shape and numbers.
    pub values: &'a Operand,
}

impl Adapter {
    /// An adapter for the layers of `trainee`, at its start. `place` is where `request` is written, for errors.
    ///
    /// # Errors
    /// See [`MakeError`].
    pub fn new<T: Trainee>(
        place: &Path,
        request: &AdapterRequest,
        start: Start,
        seed: u64,
        layers: &Layers,
        trainee: &T,
    ) -> Result<Self, MakeError> {
        let settings = AdapterSettings::new(place, request, layers.kinds())?;
        settings.check_targets(trainee.layers().iter().map(|layer| layer.path.as_str()))?;
        let mut forms = Forms { layers, known: BTreeMap::new() };
        let mut modules = Vec::new();
        for (index, target) in trainee.layers().iter().enumerate() {
            let Some(module) = settings.module(&target.path)? else { continue };
            let form = forms.of(&module.layer.name, target)?;
            let starts = starts(module.layer, start, settings.kind())?;
            let site = Site::of(trainee, index, target, form)?;
            let reads_base = starts.iter().any(|(_, initial)| reads_base(*initial));
            let base = if reads_base { Some(base_weight(trainee, index, target)?) } else { None };
            let (d, k) = (target.shape.d as usize, target.shape.k as usize);
            let at = Place { path: &target.path, d, k, rank: module.rank, base: base.as_deref() };
            let mut operands = BTreeMap::new();
            for (described, initial) in &starts {
                operands.insert(described.operand.clone(), at.filled(described, *initial, seed));
            }
            for (operand, number) in &module.scalars {
                operands.insert(operand.clone(), Operand { shape: Vec::new(), values: vec![*number] });
            }
            let own = AdapterModule { layer: module.layer.name.clone(), rank: module.rank, operands };
            modules.push(site.with(own, module.layer));
        }
        Self::of_modules(settings.kind().clone(), modules, trainee)
    }

    /// An adapter that there is already, to be trained further.
    ///
    /// # Errors
    /// It doesn't fit the layers of `trainee`.
    pub fn of_folder<T: Trainee>(folder: &AdapterFolder, layers: &Layers, trainee: &T) -> Result<Self, MakeError> {
        let mut forms = Forms { layers, known: BTreeMap::new() };
        let mut modules = Vec::new();
        for (path, module) in &folder.modules {
            let found = trainee.layers().iter().enumerate().find(|(_, target)| target.path == *path);
            let (index, target) = found.ok_or_else(|| MakeError::Unfit { path: path.clone() })?;
            let no_equation = || MakeError::NoEquation { layer: module.layer.clone() };
            let described = folder.kind.layer(&module.layer).ok_or_else(no_equation)?;
            let site = Site::of(trainee, index, target, forms.of(&module.layer, target)?)?;
            let own = site.with(module.clone(), described);
            let fits = own.fold().and_then(|folded| folded.check(target.shape.d as usize, target.shape.k as usize));
            fits.map_err(|_| MakeError::Unfit { path: path.clone() })?;
            modules.push(own);
        }
        modules.sort_by_key(|own| own.layer);
        Self::of_modules(folder.kind.clone(), modules, trainee)
    }

    fn of_modules<T: Trainee>(kind: AdapterKind, modules: Vec<TrainedModule>, trainee: &T) -> Result<Self, MakeError> {
        match modules.is_empty() {
            false => Ok(Self { kind, modules }),
            true => {
                let example = trainee.layers().first().map(|layer| layer.path.clone()).unwrap_or_default();
                Err(MakeError::Nothing { example })
            }
        }
    }

    /// Its kind.
    pub fn kind(&self) -> &AdapterKind {
        &self.kind
    }

    /// What is trained, in a fixed order.
    pub fn parameters(&self) -> impl Iterator<Item = Parameter<'_>> {
        self.modules.iter().flat_map(|own| {
            own.trained.iter().filter_map(|operand| {
                let values = own.module.operands.get(operand)?;
                Some(Parameter { path: &own.path, operand, values })
            })
        })
    }

    /// The numbers of [`Self::parameters`].
    pub(crate) fn values_mut(&mut self) -> impl Iterator<Item = &mut Vec<f32>> {
        self.modules.iter_mut().flat_map(|own| {
            let (trained, operands) = (&own.trained, &mut own.module.operands);
            let mut by_name: BTreeMap<&String, &mut Operand> = operands.iter_mut().collect();
            trained
                .iter()
                .filter_map(move |operand| by_name.remove(operand).map(|operand| &mut operand.values))
                .collect::<Vec<_>>()
        })
    }

    /// Changes every number that is trained, in the order of [`Self::parameters`].
    pub fn change(&mut self, mut change: impl FnMut(&mut f32)) {
        self.values_mut().flatten().for_each(&mut change);
    }

    /// How many numbers are trained.
    pub fn size(&self) -> usize {
        self.parameters().map(|parameter| parameter.values.values.len()).sum()
    }

    /// What [`Trainee::place`] takes.
    ///
    /// # Errors
    /// A value beyond f32, such as a quotient by a norm of 0.
    pub fn fold(&self) -> Result<Vec<(usize, FoldedAdapter)>, FoldError> {
        self.modules.par_iter().map(|own| Ok((own.layer, own.fold()?))).collect()
    }

    /// The gradients of [`Self::parameters`], in their order, of those of what [`Self::fold`] gave.
    ///
    /// # Errors
    /// Gradients of another layout than the folded adapter's.
    pub fn unfold(&self, gradients: &[FoldedGradient]) -> Result<Vec<Vec<f64>>, FoldError> {
        if gradients.len() != self.modules.len() {
            let (found, expected) = (vec![gradients.len()], vec![self.modules.len()]);
            return Err(FoldError::WrongShape { what: "the gradients of an adapter's layers", found, expected });
        }
        let unfolded = |(own, gradient): (&TrainedModule, &FoldedGradient)| {
            let gradients = own.unfolding.unfold(&own.bindings()?, gradient)?;
            let of = |operand: &String| {
                let found = gradients.get(operand).map(|value| value.data().to_vec());
                let missing = || EvaluateError::Unbound { operand: operand.clone() };
                Ok::<_, FoldError>(found.ok_or_else(missing)?)
            };
            own.trained.iter().map(of).collect::<Result<Vec<_>, _>>()
        };
        let modules: Vec<_> = self.modules.par_iter().zip(gradients).map(unfolded).collect::<Result<_, _>>()?;
        Ok(modules.into_iter().flatten().collect())
    }

    /// The adapter as a folder of the given name, ready to be written.
    pub fn folder(&self, name: &str) -> AdapterFolder {
        let modules = self.modules.iter().map(|own| (own.path.clone(), own.module.clone())).collect();
        AdapterFolder::new(name, self.kind.clone(), modules)
    }
}

/// The equations of layers, each once.
struct Forms<'a> {
    layers: &'a Layers,
    known: BTreeMap<String, Form>,
}

/// An equation and its two ways.
#[derive(Clone)]
struct Form {
    linear: Arc<NormalForm>,
    unfolding: Arc<Unfolding>,
}

impl Forms<'_> {
    /// That of the layer `name`, for `target`.
    fn of(&mut self, name: &str, target: &TargetLayer) -> Result<Form, MakeError> {
        if target.has_bias && self.layers.layer_scales_bias(name) {
            return Err(MakeError::ScaledBias { layer: name.to_owned(), path: target.path.clone() });
        }
        if let Some(known) = self.known.get(name) {
            return Ok(known.clone());
        }
        let no_equation = || MakeError::NoEquation { layer: name.to_owned() };
        let linear = &self.layers.compiled(name).ok_or_else(no_equation)?.linear;
        if linear.is_sparse() {
            return Err(MakeError::Sparse { layer: name.to_owned() });
        }
        let form = Form { linear: Arc::new(linear.clone()), unfolding: Arc::new(linear.unfolding()) };
        self.known.insert(name.to_owned(), form.clone());
        Ok(form)
    }
}

/// A layer of the model with the equation of what adapts it.
struct Site {
    layer: usize,
    path: String,
    form: Form,
    base: Option<(String, Arc<Value>)>,
}

impl Site {
    fn of<T: Trainee>(trainee: &T, layer: usize, target: &TargetLayer, form: Form) -> Result<Self, MakeError> {
        let linear = &form.linear;
        let base = if linear.reads_base_weight() {
            let weight = base_weight(trainee, layer, target)?.into_iter().map(f64::from).collect();
            let value = Value::matrix(target.shape.d as usize, target.shape.k as usize, weight);
            let failed =
                |error: EvaluateError| MakeError::Base { path: target.path.clone(), problem: error.to_string() };
            let name = linear.layer.layer().operands[linear.base_weight].name.clone();
            Some((name, Arc::new(value.map_err(failed)?)))
        } else {
            None
        };
        Ok(Self { layer, path: target.path.clone(), form, base })
    }

    fn with(self, module: AdapterModule, described: &LayerDescription) -> TrainedModule {
        let Self { layer, path, form: Form { linear, unfolding }, base } = self;
        let trained = described.tensors.iter().map(|tensor| tensor.operand.clone()).collect();
        TrainedModule { layer, path, module, trained, linear, unfolding, base }
    }
}

impl TrainedModule {
    /// What folding reads.
    fn bindings(&self) -> Result<Bindings, EvaluateError> {
        let mut operands = bindings(&self.module.operands)?;
        if let Some((name, base)) = &self.base {
            operands.insert(name.clone(), Value::clone(base));
        }
        Ok(operands)
    }

    fn fold(&self) -> Result<FoldedAdapter, FoldError> {
        self.linear.fold(&self.bindings()?)
    }
}

/// The tensors of a layer of `kind` with what they start from.
fn starts<'a>(
    layer: &'a LayerDescription,
    start: Start,
    kind: &AdapterKind,
) -> Result<Vec<(&'a TensorDescription, Initial)>, MakeError> {
    let has_reference = |layer: &&LayerDescription| layer.tensors.iter().all(|tensor| tensor.reference.is_some());
    let of = |described: &'a TensorDescription| {
        let initial = match start {
            Start::Default => described
                .init
                .ok_or_else(|| MakeError::NoStart { layer: layer.name.clone(), operand: described.operand.clone() })?,
            Start::Reference => described.reference.ok_or_else(|| MakeError::NoReference {
                layer: layer.name.clone(),
                other: kind.description().layers.iter().find(has_reference).map(|other| other.name.clone()),
            })?,
        };
        Ok((described, initial))
    };
    layer.tensors.iter().map(of).collect()
}

fn base_weight<T: Trainee>(trainee: &T, index: usize, target: &TargetLayer) -> Result<Vec<f32>, MakeError> {
    let failed = |problem: String| MakeError::Base { path: target.path.clone(), problem };
    let weight = trainee.base_weight(index).map_err(|error| failed(error.to_string()))?;
    let expected = target.shape.d as usize * target.shape.k as usize;
    match weight.len() == expected {
        true => Ok(weight),
        false => Err(failed(format!("it has {} numbers and not {expected}", weight.len()))),
    }
}
