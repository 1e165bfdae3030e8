//! Why a description of a kind is refused.

use super::description::{DESCRIPTION_LIMIT, Extent};
use thiserror::Error;

/// Why a kind can't be described or registered.
#[derive(Clone, Debug, PartialEq, Eq, Error)]
#[non_exhaustive]
pub enum KindError {
    /// Not TOML, or not the fields of a description.
    #[error("the description of a kind can't be read: {0}")]
    Text(String),
    /// A text too long to be a description.
    #[error("the description of a kind has {length} bytes; at most {DESCRIPTION_LIMIT} are accepted")]
    TooLong {
        /// Its length in bytes.
        length: usize,
    },
    /// Statements that contradict each other.
    #[error("the description of `{peft_type}` contradicts itself: {problem}")]
    Inconsistent {
        /// The kind.
        peft_type: String,
        /// How.
        problem: KindProblem,
    },
    /// A name that another kind has.
    #[error("the {what} `{name}` is taken by another kind; choose another name")]
    Taken {
        /// What the name is of: a `peft_type`, a kind or a layer.
        what: &'static str,
        /// The name.
        name: String,
    },
}

/// What contradicts itself in a description.
#[derive(Clone, Debug, PartialEq, Eq, Error)]
#[non_exhaustive]
pub enum KindProblem {
    /// A name that is empty, too long or has other characters.
    #[error("{name:?} can't be the name of {what}: use 1 to 64 letters, digits and underscores")]
    Name {
        /// What it should name.
        what: &'static str,
        /// The name.
        name: String,
    },
    /// No layers, or very many.
    #[error("it has {0} layers; 1 to 64 are accepted")]
    Layers(usize),
    /// Two layers of one name.
    #[error("two layers are called `{0}`")]
    LayerTwice(String),
    /// Two sources of one operand.
    #[error("the layer `{layer}` has two sources for the operand `{operand}`")]
    OperandTwice {
        /// The layer.
        layer: String,
        /// The operand.
        operand: String,
    },
    /// A layer whose tensors may all be missing.
    #[error("the layer `{0}` has no tensor that has to be there")]
    NoTensor(String),
    /// A tensor's name that can't be told from another's.
    #[error("the tensor name `{name}` of the layer `{layer}` can't be told from `{other}`")]
    AmbiguousName {
        /// The layer.
        layer: String,
        /// The name.
        name: String,
        /// The other name.
        other: String,
    },
    /// A tensor without a name, or with one that can't end a path.
    #[error(
        "{name:?} can't be a tensor name of the layer `{layer}`: it has 1 to 200 characters and no dot at its ends"
    )]
    TensorName {
        /// The layer.
        layer: String,
        /// The name.
        name: String,
    },
    /// A stored shape of more than a matrix.
    #[error(
        "the operand `{operand}` of the layer `{layer}` has more than two extents other than 1, or is transposed without two"
    )]
    Shape {
        /// The layer.
        layer: String,
        /// The operand.
        operand: String,
    },
    /// A default for a tensor whose extents no other tensor shows.
    #[error(
        "the operand `{operand}` of the layer `{layer}` has a default, but no tensor that is always there has its extent {extent}"
    )]
    UnknownExtent {
        /// The layer.
        layer: String,
        /// The operand.
        operand: String,
        /// The extent.
        extent: Extent,
    },
    /// A function of something that there isn't.
    #[error(
        "the operand `{operand}` of the layer `{layer}` is derived of `{input}`, which no tensor, number or earlier operand is"
    )]
    NoInput {
        /// The layer.
        layer: String,
        /// The operand.
        operand: String,
        /// What its function should read.
        input: String,
    },
    /// A number that can't be made.
    #[error("the operand `{operand}` of the layer `{layer}` {problem}")]
    Number {
        /// The layer.
        layer: String,
        /// The operand.
        operand: String,
        /// What is wrong.
        problem: &'static str,
    },
    /// A rank where the layer has none.
    #[error("the layer `{0}` divides by the rank, but no tensor has the extent R")]
    NoRank(String),
    /// An option with two meanings.
    #[error("the option `{option}` is both {first} and {second}")]
    OptionTwice {
        /// The option.
        option: String,
        /// One meaning.
        first: &'static str,
        /// The other.
        second: &'static str,
    },
    /// An option that flora would have to read in a way that it doesn't know.
    #[error("the option `{0}` is said to be read, but flora doesn't know what it means")]
    NotRead(String),
    /// Flags and words as values of one option.
    #[error("the option `{0}` is true or false in one layer and a word in another")]
    MixedChoice(String),
    /// Very many combinations of choices.
    #[error("its layers tell more than 64 combinations of options apart")]
    Choices,
    /// Values of options at which there is no layer, or several.
    #[error(
        "{layers} are left when {options}; give one of them without `modules`, all others with it, and all one `kind`"
    )]
    Selection {
        /// The options and their values.
        options: String,
        /// The layers.
        layers: String,
    },
}
