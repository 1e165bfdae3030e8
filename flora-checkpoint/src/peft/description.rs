//! What flora has to know of a kind of adapter to load it, as data: which tensors and options of a PEFT folder are which operands
//! of which layer. The built-in kinds are such descriptions, and a researcher's own kind is one more.
//!
//! A description is a TOML text; `docs/extending.md` shows one. Layers are equations, of which nothing is known here but their
//! names: whether a description fits its equations is seen where both meet.

use super::kind_error::{KindError, KindProblem};
use serde::Deserialize;
use std::collections::BTreeMap;

/// The longest text of a description, in bytes.
pub const DESCRIPTION_LIMIT: usize = 1 << 20;

/// One `peft_type`: how a folder that says so in its config is read.
#[derive(Clone, Debug, PartialEq, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct KindDescription {
    /// What the config calls the kind.
    pub peft_type: String,
    /// Where the config says the rank. Without it the rank is what the tensors have.
    pub rank: Option<RankDescription>,
    /// The layers that a module of such an adapter can be.
    pub layers: Vec<LayerDescription>,
    /// The other options that a config of the kind may have. Options that are not named anywhere are refused when they are set.
    #[serde(default)]
    pub options: BTreeMap<String, OptionRule>,
}

/// The options that say the rank.
#[derive(Clone, Debug, PartialEq, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct RankDescription {
    /// The option that holds the rank of all modules.
    pub option: String,
    /// The option that holds other ranks, by patterns of module paths.
    pub patterns: Option<String>,
    /// Whether a module may have the common rank although a pattern says another.
    #[serde(default)]
    pub patterns_may_be_ignored: bool,
}

/// A layer, and how its operands are found.
#[derive(Clone, Debug, PartialEq, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct LayerDescription {
    /// The name of the equation.
    pub name: String,
    /// What the kind is called in messages and tables; the layer's name where it isn't given.
    pub kind: Option<String>,
    /// The equation in flora's text form; without it, a layer of this name is registered in another way.
    pub equation: Option<String>,
    /// The values of options at which modules are of this layer.
    #[serde(default)]
    pub when: BTreeMap<String, Choice>,
    /// The option that lists the modules which are of this layer. Where the config doesn't have it, the shapes of the tensors say
    /// it. Of the layers that the options leave, all but one have such a list.
    pub modules: Option<String>,
    /// What becomes of the base layer's bias. It has to be said where the equation scales the output of the base weight.
    pub bias: Option<BiasRule>,
    /// The operands that are tensors.
    pub tensors: Vec<TensorDescription>,
    /// The operands that are computed from options.
    #[serde(default)]
    pub scalars: Vec<ScalarDescription>,
    /// The operands that functions make of tensors and numbers, once the module's size is known. Adapters of a layer that has some
    /// are neither trained nor written.
    #[serde(default)]
    pub derived: Vec<DerivedDescription>,
}

impl LayerDescription {
    /// What the kind is called.
    pub fn kind(&self) -> &str {
        self.kind.as_deref().unwrap_or(&self.name)
    }

    /// Whether a function reads what is called `name`.
    pub fn is_input(&self, name: &str) -> bool {
        self.derived.iter().any(|derived| derived.of.iter().any(|input| input == name))
    }
}

/// What becomes of the bias of a base layer whose output an adapter scales.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Deserialize)]
#[serde(rename_all = "snake_case")]
pub enum BiasRule {
    /// It is scaled too: l ∘ (x @ w0 + bias).
    Scaled,
    /// It is added as it is: l ∘ (x @ w0) + bias.
    Unscaled,
    /// Whatever is done to the output of the base weight is done to it, too, and no scale says what. Modules with a bias are
    /// refused.
    Transformed,
}

/// The value of an option that is a choice.
#[derive(Clone, Debug, PartialEq, Eq, PartialOrd, Ord, Deserialize)]
#[serde(untagged)]
pub enum Choice {
    /// True or false; a missing option is false.
    Flag(bool),
    /// One of some words; a missing option is an error.
    Word(String),
}

impl std::fmt::Display for Choice {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        match self {
            Choice::Flag(flag) => write!(f, "{flag}"),
            Choice::Word(word) => write!(f, "{word:?}"),
        }
    }
}

/// An operand that is stored.
#[derive(Clone, Debug, PartialEq, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct TensorDescription {
    /// The operand of the equation.
    pub operand: String,
    /// What follows the module's path and a dot in the tensor's name. The first name is the one that is written; files of other
    /// versions may have another.
    pub names: Vec<String>,
    /// The shape in the file. The operand has the same one without extents of 1, or its transpose.
    pub stored: Vec<Extent>,
    /// Whether the file has the tensor once, for all modules: its name follows `base_model.` then.
    #[serde(default)]
    pub shared: bool,
    /// Whether a module may be without it. Then functions alone read it.
    #[serde(default)]
    pub optional: bool,
    /// Whether it may be stored as integers, such as indices, up to 2²⁴.
    #[serde(default)]
    pub integers: bool,
    /// Whether the operand is the transpose of what is stored.
    #[serde(default)]
    pub transposed: bool,
    /// What the operand is filled with where the file doesn't have the tensor. Without it, the tensor has to be there.
    pub default: Option<f32>,
    /// What training starts from. Without it, adapters of the kind can't be trained.
    pub init: Option<Initial>,
    /// What it starts from in the code of the kind's authors, where that is another start.
    pub reference: Option<Initial>,
}

/// What an operand is filled with before training.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Deserialize)]
#[serde(untagged)]
pub enum Initial {
    /// Alike in all of its places.
    All(Filling),
    /// By component of the rank.
    ByComponent(ComponentFillings),
}

/// The fillings of a factor's components.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct ComponentFillings {
    /// Of the first component.
    pub first: Filling,
    /// Of all others.
    pub others: Filling,
}

/// Where the numbers of an operand come from before training.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Deserialize)]
#[serde(rename_all = "snake_case")]
pub enum Filling {
    /// 0
    Zeros,
    /// 1
    Ones,
    /// r: a mean over the rank of which the other components are 0 is then 1.
    Rank,
    /// Normal numbers of mean 0 and deviation 1.
    Normal,
    /// Uniform between ±1/√n, n the last extent of the stored tensor: PyTorch's start of a linear layer, and PEFT's of a first factor.
    KaimingUniform,
    /// The norm of each of the base weight's columns, `[k]`.
    ColumnNorms,
}

impl TensorDescription {
    /// The operand's shape.
    pub fn shape(&self) -> Vec<Extent> {
        let mut shape: Vec<Extent> = self.stored.iter().copied().filter(|extent| *extent != Extent::Fixed(1)).collect();
        if self.transposed {
            shape.reverse();
        }
        shape
    }
}

/// An operand that a function makes.
#[derive(Clone, Debug, PartialEq, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct DerivedDescription {
    /// The operand of the equation, or what a later function reads.
    pub operand: String,
    /// Its shape.
    pub shape: Vec<Extent>,
    /// The function, one of the table in `flora-adapters/src/derive.rs`.
    pub function: String,
    /// What the function reads: tensors, numbers and operands that were derived before.
    #[serde(default)]
    pub of: Vec<String>,
}

/// One extent of a stored tensor.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord, Deserialize)]
#[serde(try_from = "ExtentText")]
pub enum Extent {
    /// `D`: the inputs of the module.
    Inputs,
    /// `K`: its outputs.
    Outputs,
    /// `R`: the rank.
    Rank,
    /// `Q`: the components of a low-rank pair, as many as functions make.
    Components,
    /// `*`: any number, of a tensor that functions alone read.
    Any,
    /// A number.
    Fixed(usize),
}

#[derive(Deserialize)]
#[serde(untagged)]
enum ExtentText {
    Number(usize),
    Symbol(String),
}

impl TryFrom<ExtentText> for Extent {
    type Error = String;

    fn try_from(text: ExtentText) -> Result<Self, String> {
        match text {
            ExtentText::Number(0) => Err("an extent is at least 1".to_owned()),
            ExtentText::Number(number) => Ok(Extent::Fixed(number)),
            ExtentText::Symbol(symbol) => match symbol.as_str() {
                "D" => Ok(Extent::Inputs),
                "K" => Ok(Extent::Outputs),
                "R" => Ok(Extent::Rank),
                "Q" => Ok(Extent::Components),
                "*" => Ok(Extent::Any),
                _ => Err(format!(
                    "an extent is D (inputs), K (outputs), R (rank), Q (components), * (any) or a number, not {symbol:?}"
                )),
            },
        }
    }
}

impl std::fmt::Display for Extent {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        match self {
            Extent::Inputs => f.write_str("D"),
            Extent::Outputs => f.write_str("K"),
            Extent::Rank => f.write_str("R"),
            Extent::Components => f.write_str("Q"),
            Extent::Any => f.write_str("*"),
            Extent::Fixed(number) => write!(f, "{number}"),
        }
    }
}

/// An operand that is one number, computed from options.
#[derive(Clone, Debug, PartialEq, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct ScalarDescription {
    /// The operand of the equation.
    pub operand: String,
    /// The option that holds a number for all modules.
    pub option: String,
    /// The option that holds other numbers, by patterns of module paths.
    pub patterns: Option<String>,
    /// What the number is divided by; nothing where it isn't given.
    pub over: Option<Divisor>,
    /// A flag of the config that, when it is set, makes √r of r.
    pub root: Option<String>,
    /// Whether the number has to be above 0.
    #[serde(default)]
    pub positive: bool,
    /// The number where the config doesn't have the option. Without it, the option has to be there.
    pub default: Option<f64>,
}

/// What the number of an option is divided by.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Deserialize)]
#[serde(rename_all = "snake_case")]
pub enum Divisor {
    /// r
    Rank,
    /// √r
    RootRank,
}

/// What to do about an option.
#[derive(Clone, Debug, PartialEq, Eq, Deserialize)]
#[serde(rename_all = "snake_case")]
pub enum OptionRule {
    /// It concerns training, bookkeeping or where files come from: the result is the same.
    Harmless,
    /// PEFT's option of this name, with its meaning there: `layers_to_transform`, `layers_pattern`, `lora_bias`,
    /// `ensure_weight_tying`, `trainable_token_indices`, `alora_invocation_tokens`. No other option is read by rule.
    Read,
    /// Refused unless null, false or empty, or one of the given values.
    Refused(Refusal),
    /// Refused unless it is one of the given values; missing, too.
    Required(Refusal),
}

/// Why an option is refused, and when it isn't.
#[derive(Clone, Debug, PartialEq, Eq, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct Refusal {
    /// What the option would do.
    pub because: String,
    /// Values at which it does nothing.
    #[serde(default)]
    pub unless: Vec<Choice>,
}

/// The options that [`OptionRule::Read`] is for.
pub(super) const READ: [&str; 6] = [
    "layers_to_transform",
    "layers_pattern",
    "lora_bias",
    "ensure_weight_tying",
    "trainable_token_indices",
    "alora_invocation_tokens",
];

impl KindDescription {
    /// The description that `text` writes in TOML.
    ///
    /// # Errors
    /// A mistake in the text, or statements that contradict each other.
    pub fn parse(text: &str) -> Result<Self, KindError> {
        if text.len() > DESCRIPTION_LIMIT {
            return Err(KindError::TooLong { length: text.len() });
        }
        let description: Self = toml::from_str(text).map_err(|error| KindError::Text(error.to_string()))?;
        description.check()?;
        Ok(description)
    }

    pub(super) fn problem(&self, problem: KindProblem) -> KindError {
        KindError::Inconsistent { peft_type: self.peft_type.clone(), problem }
    }

    /// The options on whose values the layer of all modules depends, with the values that are told apart.
    pub(super) fn choices(&self) -> BTreeMap<&str, Vec<&Choice>> {
        let mut choices: BTreeMap<&str, Vec<&Choice>> = BTreeMap::new();
        for (option, choice) in self.layers.iter().flat_map(|layer| &layer.when) {
            let values = choices.entry(option).or_default();
            if !values.contains(&choice) {
                values.push(choice);
            }
        }
        choices
    }

    /// The layers that modules can be of when options have the values that `value` gives.
    pub(super) fn layers_when<'a>(
        &'a self,
        value: impl Fn(&str) -> Option<&'a Choice>,
    ) -> impl Iterator<Item = &'a LayerDescription> {
        let holds =
            move |layer: &&LayerDescription| layer.when.iter().all(|(option, choice)| value(option) == Some(choice));
        self.layers.iter().filter(holds)
    }
}
