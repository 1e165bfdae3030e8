//! Where the description of a kind meets its equations: every operand of an equation has one source of its shape, and nothing is
//! left to a guess. The built-in kinds come in by the same door as a researcher's.

use std::collections::BTreeMap;
use std::path::{Path, PathBuf};

use flora_checkpoint::peft::description::{DESCRIPTION_LIMIT, Extent, LayerDescription};
use flora_checkpoint::{AdapterKinds, KindDescription, KindError};
use flora_ir::{Activation, Dimension, ParseError, Shape, VerifiedLayer, builtin, parse, verify};
use flora_plan::pipeline::{CompileError, CompiledLayer, compile_verified};

use crate::derive;
use crate::layers::Layers;

/// Why a kind of adapter can't be registered.
#[derive(Debug, thiserror::Error)]
#[non_exhaustive]
pub enum RegisterError {
    /// The file of the description can't be read.
    #[error("cannot read {}: {source}", path.display())]
    File {
        /// The file.
        path: PathBuf,
        /// The system's reason.
        source: std::io::Error,
    },
    /// The description in a file can't be used.
    #[error("{}: {source}", path.display())]
    InFile {
        /// The file.
        path: PathBuf,
        /// Why.
        source: Box<RegisterError>,
    },
    /// The description itself is wrong.
    #[error(transparent)]
    Kind(#[from] KindError),
    /// A layer without an equation.
    #[error("the layer `{layer}` has no equation: give it in the description, or register the layer with it")]
    NoEquation {
        /// The layer.
        layer: String,
    },
    /// An equation that no layer of the description is called by, or two of one name.
    #[error("the equation `{layer}` belongs to no layer of `{peft_type}`, or to one that has an equation already")]
    ExtraEquation {
        /// The equation's name.
        layer: String,
        /// The kind.
        peft_type: String,
    },
    /// An equation in the text form that doesn't parse.
    #[error("the equation of the layer `{layer}` can't be read: {source}")]
    Text {
        /// The layer.
        layer: String,
        /// The first mistake.
        source: ParseError,
    },
    /// An equation of another name than its layer.
    #[error("the equation of the layer `{layer}` is called `{name}`; give both one name")]
    Name {
        /// The layer.
        layer: String,
        /// What the equation is called.
        name: String,
    },
    /// An equation that doesn't compile.
    #[error("the equation of the layer `{layer}` doesn't compile: {source}")]
    Equation {
        /// The layer.
        layer: String,
        /// Why.
        source: Box<CompileError>,
    },
    /// A tensor or scalar for an operand that the equation doesn't have.
    #[error("the layer `{layer}` has no adapter operand `{operand}`; its operands are: {known}")]
    UnknownOperand {
        /// The layer.
        layer: String,
        /// The operand.
        operand: String,
        /// Those that it has.
        known: String,
    },
    /// An operand without a tensor or scalar.
    #[error("nothing in the description says where the operand `{operand}` of the layer `{layer}` comes from")]
    NoSource {
        /// The layer.
        layer: String,
        /// The operand.
        operand: String,
    },
    /// An operand whose shape isn't the described one.
    #[error(
        "the operand `{operand}` of the layer `{layer}` is {declared} in the equation and {described} in the description"
    )]
    Shape {
        /// The layer.
        layer: String,
        /// The operand.
        operand: String,
        /// Its shape in the equation.
        declared: String,
        /// Its shape from the description, D and K those of the base weight, R the rank.
        described: String,
    },
    /// A bias, residual or activation, which an adapter can't bring along.
    #[error(
        "the layer `{layer}` has {what}, which belongs to the model and not to an adapter; leave it out of the equation"
    )]
    Epilogue {
        /// The layer.
        layer: String,
        /// What it has.
        what: &'static str,
    },
    /// A function that there isn't.
    #[error("the operand `{operand}` of the layer `{layer}` is derived by `{function}`, which isn't one of {known}")]
    UnknownFunction {
        /// The layer.
        layer: String,
        /// The operand.
        operand: String,
        /// The function.
        function: String,
        /// Those that there are.
        known: String,
    },
    /// An equation that scales the base layer's output, of which nobody says what becomes of the bias.
    #[error(
        "the layer `{layer}` scales the output of the base weight, so the description has to say what becomes of a bias: \
         `bias = \"scaled\"` or `bias = \"unscaled\"`"
    )]
    BiasUnsaid {
        /// The layer.
        layer: String,
    },
}

impl Layers {
    /// The layers of the built-in kinds, compiled.
    ///
    /// # Errors
    /// A built-in equation has no normal form, or doesn't fit its description.
    pub fn builtin() -> Result<Self, RegisterError> {
        let linear = builtin::builtin("linear");
        let linear = linear.ok_or_else(|| RegisterError::NoEquation { layer: "linear".to_owned() })?;
        let mut layers = Self {
            base: compiled(linear.clone(), "linear")?,
            compiled: BTreeMap::new(),
            kinds: AdapterKinds::default(),
        };
        for description in AdapterKinds::builtin().descriptions() {
            let equations = description.layers.iter().filter_map(|layer| builtin::builtin(&layer.name)).cloned();
            layers.register(equations, KindDescription::clone(description))?;
        }
        Ok(layers)
    }

    /// Adds a kind of adapter: folders of its `peft_type` are read, folded, run and served like those of the built-in kinds.
    ///
    /// `equations` are those of its layers that the description doesn't hold as text, such as layers written with
    /// `#[flora::layer]`, by their names.
    ///
    /// # Errors
    /// Whatever is wrong with the description or an equation, or doesn't fit between them; then nothing is added.
    pub fn register(
        &mut self,
        equations: impl IntoIterator<Item = VerifiedLayer>,
        description: KindDescription,
    ) -> Result<(), RegisterError> {
        let mut written = BTreeMap::new();
        for equation in equations {
            let name = equation.layer().name.clone();
            let described = description.layers.iter().find(|layer| layer.name == name);
            let is_wanted = described.is_some_and(|layer| layer.equation.is_none());
            if !is_wanted || written.insert(name.clone(), equation).is_some() {
                return Err(RegisterError::ExtraEquation { layer: name, peft_type: description.peft_type });
            }
        }
        let mut kinds = self.kinds.clone();
        let mut added = Vec::new();
        for described in &description.layers {
            let equation = match &described.equation {
                Some(text) => read(text, &described.name)?,
                None => written
                    .remove(&described.name)
                    .ok_or_else(|| RegisterError::NoEquation { layer: described.name.clone() })?,
            };
            let layer = compiled(equation, &described.name)?;
            check(&layer, described)?;
            added.push((described.name.clone(), layer));
        }
        kinds.register(description)?;
        self.kinds = kinds;
        self.compiled.extend(added);
        Ok(())
    }

    /// Adds the kind that a file describes, equations included.
    ///
    /// # Errors
    /// The file can't be read, or [`register`](Self::register) refuses what it says.
    pub fn register_file(&mut self, path: &Path) -> Result<(), RegisterError> {
        let failed = |source| RegisterError::File { path: path.to_owned(), source };
        let length = std::fs::metadata(path).map_err(failed)?.len();
        let in_file = |source| RegisterError::InFile { path: path.to_owned(), source: Box::new(source) };
        if length > DESCRIPTION_LIMIT as u64 {
            let length = usize::try_from(length).unwrap_or(usize::MAX);
            return Err(in_file(KindError::TooLong { length }.into()));
        }
        let text = std::fs::read_to_string(path).map_err(failed)?;
        let description = KindDescription::parse(&text).map_err(|error| in_file(error.into()))?;
        self.register([], description).map_err(in_file)
    }

    /// The kinds that folders are read as.
    pub fn kinds(&self) -> &AdapterKinds {
        &self.kinds
    }
}

/// The equation in the text form.
fn read(text: &str, layer: &str) -> Result<VerifiedLayer, RegisterError> {
    let name = || layer.to_owned();
    let parsed = parse(text).map_err(|source| RegisterError::Text { layer: name(), source })?;
    if parsed.name != layer {
        return Err(RegisterError::Name { layer: name(), name: parsed.name });
    }
    verify(parsed).map_err(|mistakes| RegisterError::Equation {
        layer: name(),
        source: Box::new(CompileError::Mistakes(mistakes)),
    })
}

fn compiled(equation: VerifiedLayer, layer: &str) -> Result<CompiledLayer, RegisterError> {
    compile_verified(equation)
        .map_err(|error| RegisterError::Equation { layer: layer.to_owned(), source: Box::new(error.into()) })
}

/// Whether the described sources are those of the equation's operands, in their shapes.
fn check(layer: &CompiledLayer, described: &LayerDescription) -> Result<(), RegisterError> {
    let name = || described.name.clone();
    let written = layer.written.layer();
    let adapters = || written.operands.iter().map(|(_, operand)| operand).filter(|own| own.role.is_adapters());
    let epilogue = layer.epilogue();
    let foreign = [
        (epilogue.bias, "a bias"),
        (epilogue.residual, "a residual"),
        (epilogue.activation != Activation::Identity, "an activation"),
    ];
    if let Some((_, what)) = foreign.into_iter().find(|(has, _)| *has) {
        return Err(RegisterError::Epilogue { layer: name(), what });
    }
    let base = &written.operands[layer.written.base_weight()].ty.shape;
    let mut extents = Extents { base, rank: None, components: None };
    for derived in &described.derived {
        if derive::function(&derived.function).is_none() {
            return Err(RegisterError::UnknownFunction {
                layer: name(),
                operand: derived.operand.clone(),
                function: derived.function.clone(),
                known: derive::names().collect::<Vec<_>>().join(", "),
            });
        }
    }
    let tensors = described.tensors.iter().map(|tensor| (&tensor.operand, tensor.shape()));
    let scalars = described.scalars.iter().map(|scalar| (&scalar.operand, Vec::new()));
    let derived = described.derived.iter().map(|derived| (&derived.operand, derived.shape.clone()));
    // What functions alone read is no operand.
    let is_operand = |name: &str| adapters().any(|own| own.name == name) || !described.is_input(name);
    let sources = tensors.chain(scalars).chain(derived).filter(|(name, _)| is_operand(name));
    let sources: Vec<(&String, Vec<Extent>)> = sources.collect();
    for (operand, shape) in &sources {
        let Some(declared) = adapters().find(|own| own.name == **operand) else {
            let known = adapters().map(|own| format!("`{}`", own.name)).collect::<Vec<_>>().join(", ");
            return Err(RegisterError::UnknownOperand { layer: name(), operand: (*operand).clone(), known });
        };
        if !extents.are(&declared.ty.shape, shape) {
            let shape = shape.iter().map(Extent::to_string).collect::<Vec<_>>().join(", ");
            return Err(RegisterError::Shape {
                layer: name(),
                operand: (*operand).clone(),
                declared: declared.ty.shape.to_string(),
                described: format!("[{shape}]"),
            });
        }
    }
    if let Some(operand) = adapters().find(|own| sources.iter().all(|(operand, _)| **operand != own.name)) {
        return Err(RegisterError::NoSource { layer: name(), operand: operand.name.clone() });
    }
    match described.bias {
        None if layer.linear.scales_base_output() => Err(RegisterError::BiasUnsaid { layer: name() }),
        _ => Ok(()),
    }
}

/// What the extents of a description are called in an equation.
struct Extents<'a> {
    /// `[D, K]`
    base: &'a Shape,
    /// R, once some operand had it.
    rank: Option<&'a Dimension>,
    /// Q, likewise.
    components: Option<&'a Dimension>,
}

impl<'a> Extents<'a> {
    fn are(&mut self, declared: &'a Shape, described: &[Extent]) -> bool {
        match (declared, described) {
            (Shape::Scalar, []) => true,
            (Shape::Vector(n), [extent]) => self.is(n, *extent),
            (Shape::Matrix(m, n), [first, second]) => self.is(m, *first) && self.is(n, *second),
            _ => false,
        }
    }

    fn is(&mut self, declared: &'a Dimension, described: Extent) -> bool {
        let Shape::Matrix(inputs, outputs) = self.base else { return false };
        match described {
            Extent::Inputs => declared == inputs,
            Extent::Outputs => declared == outputs,
            Extent::Fixed(number) => *declared == Dimension::Fixed(number as u64),
            Extent::Any => false,
            Extent::Rank | Extent::Components => {
                let known = if described == Extent::Rank { &mut self.rank } else { &mut self.components };
                let is_symbol = matches!(declared, Dimension::Symbol(_)) && declared != inputs && declared != outputs;
                is_symbol && *known.get_or_insert(declared) == declared
            }
        }
    }
}
