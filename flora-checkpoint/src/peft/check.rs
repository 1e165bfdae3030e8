//! Whether a description of a kind makes sense by itself.

use super::description::{
    Choice, ComponentFillings, Divisor, Extent, Filling, Initial, KindDescription, LayerDescription, OptionRule, READ,
    TensorDescription,
};
use super::kind_error::{KindError, KindProblem};
use super::options;
use std::collections::{BTreeMap, BTreeSet};

/// The most layers of a description, and the most combinations of options that it tells apart.
const LIMIT: usize = 64;
/// The longest name of a tensor after the module's path, in bytes.
const NAME_LIMIT: usize = 200;

impl KindDescription {
    /// Whether the description makes sense.
    pub(super) fn check(&self) -> Result<(), KindError> {
        self.check_names().map_err(|problem| self.problem(problem))?;
        for layer in &self.layers {
            check_layer(layer, self.rank.is_some()).map_err(|problem| self.problem(problem))?;
        }
        self.check_options().map_err(|problem| self.problem(problem))?;
        self.check_tensor_names().map_err(|problem| self.problem(problem))?;
        self.check_choices().map_err(|problem| self.problem(problem))
    }

    fn check_names(&self) -> Result<(), KindProblem> {
        name("a `peft_type`", &self.peft_type)?;
        if self.layers.is_empty() || self.layers.len() > LIMIT {
            return Err(KindProblem::Layers(self.layers.len()));
        }
        let mut names = BTreeSet::new();
        for layer in &self.layers {
            name("a layer", &layer.name)?;
            name("a kind", layer.kind())?;
            if !names.insert(&layer.name) {
                return Err(KindProblem::LayerTwice(layer.name.clone()));
            }
        }
        Ok(())
    }

    /// Every option has one meaning.
    fn check_options(&self) -> Result<(), KindProblem> {
        let mut meanings: BTreeMap<&str, &'static str> = BTreeMap::new();
        let mut add = |option, meaning| match meanings.insert(option, meaning) {
            Some(other) if other != meaning => {
                Err(KindProblem::OptionTwice { option: option.to_owned(), first: other, second: meaning })
            }
            _ => Ok(()),
        };
        for option in options::common() {
            add(option, "one that every config has")?;
        }
        if let Some(rank) = &self.rank {
            add(&rank.option, "the rank")?;
            rank.patterns.iter().try_for_each(|patterns| add(patterns, "ranks by pattern"))?;
        }
        for layer in &self.layers {
            layer.when.keys().try_for_each(|option| add(option, "a choice of the layer"))?;
            layer.modules.iter().try_for_each(|option| add(option, "a list of modules"))?;
            for scalar in &layer.scalars {
                add(&scalar.option, "a number")?;
                scalar.patterns.iter().try_for_each(|patterns| add(patterns, "numbers by pattern"))?;
                scalar.root.iter().try_for_each(|root| add(root, "a flag for √r"))?;
            }
        }
        for (option, rule) in &self.options {
            add(option, "an option with a rule")?;
            if *rule == OptionRule::Read && !READ.contains(&option.as_str()) {
                return Err(KindProblem::NotRead(option.clone()));
            }
        }
        Ok(())
    }

    /// The end of a tensor's name says which one it is, whatever the module is called.
    fn check_tensor_names(&self) -> Result<(), KindProblem> {
        let names = || self.layers.iter().flat_map(|layer| &layer.tensors).flat_map(|tensor| &tensor.names);
        for layer in &self.layers {
            for (index, tensor) in layer.tensors.iter().enumerate() {
                if tensor.names.is_empty() {
                    return Err(KindProblem::TensorName { layer: layer.name.clone(), name: String::new() });
                }
                let later = layer.tensors[index + 1..].iter().flat_map(|tensor| &tensor.names);
                for name in &tensor.names {
                    let layer = || layer.name.clone();
                    if name.is_empty() || name.len() > NAME_LIMIT || name.starts_with('.') || name.ends_with('.') {
                        return Err(KindProblem::TensorName { layer: layer(), name: name.clone() });
                    }
                    let ends =
                        |other: &&String| name.strip_suffix(other.as_str()).is_some_and(|rest| rest.ends_with('.'));
                    if let Some(other) = later.clone().find(|later| *later == name).or_else(|| names().find(ends)) {
                        let (name, other) = (name.clone(), other.clone());
                        return Err(KindProblem::AmbiguousName { layer: layer(), name, other });
                    }
                }
            }
        }
        Ok(())
    }

    /// Whatever the options are, it is clear of which layer a module is, and all modules are of one kind.
    fn check_choices(&self) -> Result<(), KindProblem> {
        let mut combinations: Vec<BTreeMap<&str, Choice>> = vec![BTreeMap::new()];
        for (option, values) in self.choices() {
            let is_flag = |value: &&Choice| matches!(value, Choice::Flag(_));
            let values: Vec<Choice> = match values.iter().filter(|value| is_flag(value)).count() {
                0 => values.into_iter().cloned().collect(),
                flags if flags == values.len() => vec![Choice::Flag(false), Choice::Flag(true)],
                _ => return Err(KindProblem::MixedChoice(option.to_owned())),
            };
            if combinations.len().saturating_mul(values.len()) > LIMIT {
                return Err(KindProblem::Choices);
            }
            let mut longer = Vec::with_capacity(combinations.len() * values.len());
            for (known, value) in combinations.iter().flat_map(|known| values.iter().map(move |value| (known, value))) {
                let mut known = known.clone();
                known.insert(option, value.clone());
                longer.push(known);
            }
            combinations = longer;
        }
        for combination in &combinations {
            let left: Vec<_> = self.layers_when(|option| combination.get(option)).collect();
            let lists: BTreeSet<_> = left.iter().filter_map(|layer| layer.modules.as_deref()).collect();
            let kinds: BTreeSet<_> = left.iter().map(|layer| layer.kind()).collect();
            if left.is_empty() || lists.len() + 1 != left.len() || kinds.len() != 1 {
                let options = combination.iter().map(|(option, value)| format!("`{option}` is {value}"));
                let options = options.collect::<Vec<_>>().join(" and ");
                let layers = left.iter().map(|layer| format!("`{}`", layer.name)).collect::<Vec<_>>().join(", ");
                return Err(KindProblem::Selection {
                    options: if options.is_empty() { "a config is read".to_owned() } else { options },
                    layers: if layers.is_empty() { "no layers".to_owned() } else { format!("the layers {layers}") },
                });
            }
        }
        Ok(())
    }
}

/// Why an operand of this shape can't start so.
fn misfilled(initial: Initial, shape: &[Extent]) -> Option<&'static str> {
    let has_rank = shape.contains(&Extent::Rank);
    let fillings = match initial {
        Initial::All(filling) => [filling; 2],
        Initial::ByComponent(_) if !has_rank => return Some("starts by component of the rank, but has no extent R"),
        Initial::ByComponent(ComponentFillings { first, others }) => [first, others],
    };
    match () {
        () if fillings.contains(&Filling::Rank) && !has_rank => Some("starts from the rank, but has no extent R"),
        () if fillings.contains(&Filling::ColumnNorms) && shape != [Extent::Outputs] => {
            Some("starts from the norms of the base weight's columns, but isn't [K]")
        }
        () => None,
    }
}

fn name(what: &'static str, name: &str) -> Result<(), KindProblem> {
    let is_plain = |character: char| character.is_ascii_alphanumeric() || character == '_';
    match !name.is_empty() && name.len() <= 64 && name.chars().all(is_plain) {
        true => Ok(()),
        false => Err(KindProblem::Name { what, name: name.chars().take(80).collect() }),
    }
}

/// Every function reads what there is.
fn check_derived(layer: &LayerDescription) -> Result<(), KindProblem> {
    for (index, derived) in layer.derived.iter().enumerate() {
        let is_known = |input: &&String| {
            layer.tensors.iter().any(|tensor| tensor.operand == **input)
                || layer.scalars.iter().any(|scalar| scalar.operand == **input)
                || layer.derived[..index].iter().any(|earlier| earlier.operand == **input)
        };
        if let Some(input) = derived.of.iter().find(|input| !is_known(input)) {
            let (layer, operand, input) = (layer.name.clone(), derived.operand.clone(), input.clone());
            return Err(KindProblem::NoInput { layer, operand, input });
        }
        if derived.shape.len() > 2 || derived.shape.contains(&Extent::Any) {
            return Err(KindProblem::Shape { layer: layer.name.clone(), operand: derived.operand.clone() });
        }
    }
    Ok(())
}

fn check_layer(layer: &LayerDescription, says_rank: bool) -> Result<(), KindProblem> {
    let layer_name = || layer.name.clone();
    let mut operands = BTreeSet::new();
    let sources = layer.tensors.iter().map(|tensor| &tensor.operand).chain(layer.scalars.iter().map(|s| &s.operand));
    for operand in sources.chain(layer.derived.iter().map(|derived| &derived.operand)) {
        name("an operand", operand)?;
        if !operands.insert(operand) {
            return Err(KindProblem::OperandTwice { layer: layer_name(), operand: operand.clone() });
        }
    }
    check_derived(layer)?;
    let is_always = |tensor: &&TensorDescription| tensor.default.is_none() && !tensor.optional && !tensor.shared;
    let always = || layer.tensors.iter().filter(is_always);
    if always().next().is_none() && layer.derived.is_empty() {
        return Err(KindProblem::NoTensor(layer_name()));
    }
    let shown: BTreeSet<Extent> = always().flat_map(|tensor| tensor.stored.iter().copied()).collect();
    for tensor in &layer.tensors {
        let operand = || tensor.operand.clone();
        let shape = tensor.shape();
        let is_wide = (shape.len() > 2 || shape.contains(&Extent::Any)) && !layer.is_input(&tensor.operand)
            || shape.contains(&Extent::Components);
        if is_wide || tensor.stored.len() > 4 || tensor.transposed && shape.len() != 2 {
            return Err(KindProblem::Shape { layer: layer_name(), operand: operand() });
        }
        if !layer.derived.is_empty() && (tensor.init.is_some() || tensor.reference.is_some()) {
            let problem = "starts a training, but adapters of a layer with derived operands aren't trained";
            return Err(KindProblem::Number { layer: layer_name(), operand: operand(), problem });
        }
        for initial in tensor.init.iter().chain(&tensor.reference) {
            if let Some(problem) = misfilled(*initial, &shape) {
                return Err(KindProblem::Number { layer: layer_name(), operand: operand(), problem });
            }
        }
        let unknown = |extent: &&Extent| !matches!(extent, Extent::Fixed(_)) && !shown.contains(extent);
        if let Some(extent) = shape.iter().find(unknown).filter(|_| tensor.default.is_some()) {
            return Err(KindProblem::UnknownExtent { layer: layer_name(), operand: operand(), extent: *extent });
        }
        let problem = match tensor.default {
            _ if tensor.optional && !layer.is_input(&tensor.operand) => "may be missing, but no function reads it",
            _ if tensor.shared && !layer.is_input(&tensor.operand) => "is of all modules, but no function reads it",
            _ if tensor.shared && (shape.contains(&Extent::Inputs) || shape.contains(&Extent::Outputs)) => {
                "is of all modules, but has the inputs or outputs of one; write * for that extent"
            }
            Some(_) if tensor.optional || tensor.shared => {
                "has a default, which neither an optional nor a shared tensor has"
            }
            Some(default) if !default.is_finite() => "has a default that isn't finite",
            Some(_) if shape.len() > 1 => "has a default, which only a number or a vector can have",
            _ => continue,
        };
        return Err(KindProblem::Number { layer: layer_name(), operand: operand(), problem });
    }
    for scalar in &layer.scalars {
        let problem = match (scalar.default, &scalar.root, scalar.over) {
            (Some(default), ..) if !default.is_finite() => Some("has a default that isn't finite"),
            (_, Some(_), None | Some(Divisor::RootRank)) => Some("has a flag for √r, but isn't over the rank"),
            _ => None,
        };
        if let Some(problem) = problem {
            return Err(KindProblem::Number { layer: layer_name(), operand: scalar.operand.clone(), problem });
        }
        if scalar.over.is_some() && !shown.contains(&Extent::Rank) && !says_rank {
            return Err(KindProblem::NoRank(layer_name()));
        }
    }
    Ok(())
}
