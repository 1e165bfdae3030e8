//! `adapter_config.json` as typed values.

use super::description::{Choice, Divisor, KindDescription, LayerDescription, RankDescription, ScalarDescription};
use super::options;
use super::targets::{Names, Pattern, PatternProblem, Targets};
use super::{AdapterError, AdapterKind, AdapterKinds, mixture};
use crate::json::Json;
use std::collections::BTreeMap;
use std::path::{Path, PathBuf};
use std::sync::Arc;

/// The largest rank; a larger one is a mistake, since it exceeds the width of any layer.
const RANK_LIMIT: u64 = 1 << 20;
/// The most patterns that one option may have.
const PATTERNS_LIMIT: usize = 10_000;

/// What a config says.
pub(super) struct Config {
    pub(super) path: PathBuf,
    pub(super) kind: AdapterKind,
    pub(super) targets: Targets,
    /// Where the kind says where the rank is.
    pub(super) rank: Option<RankSetting>,
    /// By option, the numbers that scalars are made of.
    pub(super) numbers: BTreeMap<String, Setting<f64>>,
    /// By option, the flags that make √r of r.
    pub(super) roots: BTreeMap<String, bool>,
    /// By option, the modules that are of a layer; `None`: the tensors' shapes say it.
    pub(super) lists: BTreeMap<String, Option<Names>>,
    /// Modules that are saved whole, by the ends of their paths.
    pub(super) modules_to_save: Vec<String>,
    /// Rows of embeddings that are saved.
    pub(super) token_indices: Option<TokenIndices>,
    /// `lora_bias`: the second factor has a bias.
    pub(super) adds_biases: bool,
    /// `alora_invocation_tokens`: the adapter acts from these tokens on.
    pub(super) invocation: Option<Vec<u32>>,
    /// `ensure_weight_tying`: what is done to the embedding is done to an output matrix that is tied to it.
    pub(super) keeps_ties: bool,
    /// The indices of the layers that a module can be of, in the description.
    layers: Vec<usize>,
}

/// `trainable_token_indices`.
pub(super) enum TokenIndices {
    /// Of the token embedding.
    OfEmbedding(Vec<u32>),
    /// By the end of the module's path.
    ByModule(Vec<(String, Vec<u32>)>),
}

/// A value of all modules, and others by pattern.
pub(super) struct Setting<T> {
    pub(super) common: T,
    pub(super) patterns: Patterns<T>,
}

/// The rank that the config says.
pub(super) struct RankSetting {
    pub(super) description: RankDescription,
    pub(super) ranks: Setting<usize>,
}

/// Values by pattern, in the order of the file: the first pattern that matches holds.
pub(super) struct Patterns<T>(Vec<(Pattern, T)>);

impl<T: Copy> Setting<T> {
    /// The value for `module`.
    pub(super) fn of(&self, module: &str) -> Result<T, PatternProblem> {
        Ok(self.patterns.find(module)?.unwrap_or(self.common))
    }
}

impl<T: Copy> Patterns<T> {
    pub(super) fn find(&self, module: &str) -> Result<Option<T>, PatternProblem> {
        for (pattern, value) in &self.0 {
            if pattern.matches(module)? {
                return Ok(Some(*value));
            }
        }
        Ok(None)
    }

    pub(super) fn len(&self) -> usize {
        self.0.len()
    }
}

impl Config {
    pub(super) fn read(path: &Path, json: &Json, kinds: &AdapterKinds) -> Result<Config, AdapterError> {
        let Json::Object(members) = json else {
            return Err(Fields { path, json }.invalid("the file", "it must be an object".to_string()));
        };
        let fields = Fields { path, json };
        let description = fields.description(kinds)?;
        options::check(path, description, members)?;
        let layers = fields.layers(description)?;
        let selected = || layers.iter().filter_map(|index| description.layers.get(*index));
        // Of the layers that a config leaves, all are of one kind.
        let kind_name = selected().next().map_or(description.peft_type.as_str(), LayerDescription::kind);
        // The factors are stored the same way whichever way the base weight is: the option only has to make sense.
        fields.flag("fan_in_fan_out")?;
        let targets = fields.targets()?;
        let rank = description.rank.as_ref().map(|rank| fields.ranks(rank)).transpose()?;
        let (mut numbers, mut roots, mut lists) = (BTreeMap::new(), BTreeMap::new(), BTreeMap::new());
        for layer in selected() {
            for scalar in &layer.scalars {
                let common = match (json.get(&scalar.option), scalar.default) {
                    (None | Some(Json::Null), Some(default)) => default,
                    (value, _) => fields.number(&scalar.option, value)?,
                };
                let patterns = match &scalar.patterns {
                    Some(option) => fields.patterns(option, Fields::number)?,
                    None => Patterns(Vec::new()),
                };
                numbers.insert(scalar.option.clone(), Setting { common, patterns });
                if let Some(root) = &scalar.root {
                    roots.insert(root.clone(), fields.flag(root)?);
                }
            }
            if let Some(option) = &layer.modules {
                lists.insert(option.clone(), fields.names(option)?);
            }
        }
        let kind = AdapterKind::new(description, kind_name);
        Ok(Config {
            path: path.to_owned(),
            kind,
            targets,
            rank,
            numbers,
            roots,
            lists,
            layers,
            modules_to_save: fields.listed("modules_to_save")?,
            token_indices: fields.token_indices("trainable_token_indices")?,
            adds_biases: fields.flag("lora_bias")?,
            invocation: fields.invocation("alora_invocation_tokens")?,
            keeps_ties: fields.flag("ensure_weight_tying")?,
        })
    }

    /// The rows of `module` that `trainable_token_indices` lists.
    pub(super) fn token_rows(&self, module: &str) -> Result<Vec<u32>, AdapterError> {
        let rows = match &self.token_indices {
            Some(TokenIndices::OfEmbedding(rows)) => Some(rows),
            Some(TokenIndices::ByModule(modules)) => {
                modules.iter().find(|(end, _)| module.ends_with(end.as_str())).map(|(_, rows)| rows)
            }
            None => None,
        };
        let key = "trainable_token_indices";
        rows.cloned().ok_or_else(|| {
            self.invalid(key, "given".to_string(), format!("it says no rows of `{module}`, which has some in the file"))
        })
    }

    /// The layers that a module can be of.
    pub(super) fn layers(&self) -> impl Iterator<Item = &LayerDescription> {
        self.layers.iter().filter_map(|index| self.kind.description().layers.get(*index))
    }

    /// Whether the tensor called `name` may be stored as integers.
    pub(super) fn has_integers(&self, name: &str) -> bool {
        let described = self.layers().flat_map(|layer| &layer.tensors).filter(|tensor| tensor.integers);
        described.flat_map(|tensor| &tensor.names).any(|end| name.ends_with(end.as_str()))
    }

    /// A number of the config for `module`, over r or √r where the kind says so.
    pub(super) fn scalar(&self, scalar: &ScalarDescription, module: &str, rank: usize) -> Result<f32, AdapterError> {
        let missing = || self.invalid(&scalar.option, "missing".to_string(), "it must be a number".to_string());
        let setting = self.numbers.get(&scalar.option).ok_or_else(missing)?;
        let number = setting.of(module).map_err(self.pattern_error())?;
        let is_root = scalar.root.as_ref().and_then(|root| self.roots.get(root)).copied().unwrap_or(false);
        let divisor = match (scalar.over, is_root) {
            (None, _) => 1.0,
            (Some(Divisor::Rank), false) => rank as f64,
            (Some(Divisor::Rank), true) | (Some(Divisor::RootRank), _) => (rank as f64).sqrt(),
        };
        let value = (number / divisor) as f32;
        if scalar.positive && number <= 0.0 {
            return Err(self.invalid(&scalar.option, number.to_string(), "it must be above 0".to_owned()));
        }
        if !value.is_finite() {
            let expected = format!("the scale of module `{module}` exceeds the range of f32");
            return Err(self.invalid(&scalar.option, number.to_string(), expected));
        }
        Ok(value)
    }

    /// How many patterns are tried on each module.
    pub(super) fn patterns(&self) -> usize {
        let ranks = self.rank.as_ref().map_or(0, |rank| rank.ranks.patterns.len());
        ranks + self.numbers.values().map(|number| number.patterns.len()).sum::<usize>()
    }

    /// The error that a pattern of this config can't be used.
    pub(super) fn pattern_error(&self) -> impl Fn(PatternProblem) -> AdapterError + '_ {
        |problem| problem.in_file(&self.path)
    }

    pub(super) fn invalid(&self, key: &str, value: String, expected: String) -> AdapterError {
        AdapterError::InvalidOption { path: self.path.clone(), key: key.to_string(), value, expected }
    }
}

/// A token's number.
fn token(item: &Json) -> Option<u32> {
    match item {
        Json::Number(number) => u32::try_from(number.as_u64()?).ok(),
        _ => None,
    }
}

/// Reads single options.
pub(super) struct Fields<'a> {
    pub(super) path: &'a Path,
    pub(super) json: &'a Json,
}

impl Fields<'_> {
    fn description<'k>(&self, kinds: &'k AdapterKinds) -> Result<&'k Arc<KindDescription>, AdapterError> {
        let unknown = |found: String| {
            let known = kinds.peft_types().collect::<Vec<_>>().join(", ");
            AdapterError::UnknownPeftType { path: self.path.to_owned(), found, known }
        };
        match self.json.get("peft_type") {
            Some(value @ Json::String(name)) if name == mixture::PEFT_TYPE => Err(AdapterError::UnsupportedOption {
                path: self.path.to_owned(),
                key: "peft_type".to_owned(),
                value: value.to_string(),
                reason: "a network weighs its adapters for each token, which is served by itself and nothing else; name one of them"
                    .to_owned(),
            }),
            Some(Json::String(name)) => kinds.described(name).ok_or_else(|| unknown(format!("`{name}`"))),
            Some(other) => Err(unknown(other.to_string())),
            None => Err(unknown("is missing, which".to_string())),
        }
    }

    /// The indices of the layers that the options leave.
    fn layers(&self, description: &KindDescription) -> Result<Vec<usize>, AdapterError> {
        let mut values = BTreeMap::new();
        for (option, choices) in description.choices() {
            let value = if choices.iter().any(|choice| matches!(choice, Choice::Flag(_))) {
                Choice::Flag(self.flag(option)?)
            } else {
                let value = self.json.get(option).unwrap_or(&Json::Null);
                let chosen = choices.iter().find(|choice| options::is_choice(value, choice));
                let known = || choices.iter().map(|choice| choice.to_string()).collect::<Vec<_>>().join(" or ");
                let expected = || self.invalid(option, format!("it must be {}", known()));
                (*chosen.ok_or_else(expected)?).clone()
            };
            values.insert(option, value);
        }
        let left: Vec<&LayerDescription> = description.layers_when(|option| values.get(option)).collect();
        let is_left = |layer: &LayerDescription| left.iter().any(|other| std::ptr::eq(*other, layer));
        let indices = description.layers.iter().enumerate().filter(|(_, layer)| is_left(layer));
        Ok(indices.map(|(index, _)| index).collect())
    }

    fn ranks(&self, rank: &RankDescription) -> Result<RankSetting, AdapterError> {
        let common = self.rank(&rank.option, self.json.get(&rank.option))?;
        let patterns = match &rank.patterns {
            Some(option) => self.patterns(option, Fields::rank)?,
            None => Patterns(Vec::new()),
        };
        Ok(RankSetting { description: rank.clone(), ranks: Setting { common, patterns } })
    }

    pub(super) fn invalid(&self, key: &str, expected: String) -> AdapterError {
        let value = self.json.get(key).map_or_else(|| "missing".to_string(), Json::to_string);
        AdapterError::InvalidOption { path: self.path.to_owned(), key: key.to_string(), value, expected }
    }

    /// True or false; false when null or missing.
    fn flag(&self, key: &str) -> Result<bool, AdapterError> {
        match self.json.get(key) {
            None | Some(Json::Null) => Ok(false),
            Some(Json::Bool(value)) => Ok(*value),
            Some(_) => Err(self.invalid(key, "it must be true or false".to_string())),
        }
    }

    fn rank(&self, key: &str, value: Option<&Json>) -> Result<usize, AdapterError> {
        let number = match value {
            Some(Json::Number(number)) => number.as_u64(),
            _ => None,
        };
        match number {
            Some(rank @ 1..=RANK_LIMIT) => Ok(rank as usize),
            _ => Err(self.invalid(key, format!("a rank must be a whole number from 1 to {RANK_LIMIT}"))),
        }
    }

    fn number(&self, key: &str, value: Option<&Json>) -> Result<f64, AdapterError> {
        let number = match value {
            Some(Json::Number(number)) => number.as_f64(),
            _ => None,
        };
        let finite = number.filter(|number| number.is_finite());
        finite.ok_or_else(|| self.invalid(key, "a scale must be a finite number".to_string()))
    }

    fn patterns<T>(
        &self,
        key: &str,
        value: impl Fn(&Self, &str, Option<&Json>) -> Result<T, AdapterError>,
    ) -> Result<Patterns<T>, AdapterError> {
        let members = match self.json.get(key) {
            None | Some(Json::Null) => return Ok(Patterns(Vec::new())),
            Some(Json::Object(members)) => members,
            Some(_) => return Err(self.invalid(key, "it must be an object of patterns".to_string())),
        };
        if members.len() > PATTERNS_LIMIT {
            return Err(self.invalid(key, format!("at most {PATTERNS_LIMIT} patterns are accepted")));
        }
        let mut patterns = Vec::with_capacity(members.len());
        for (source, number) in members {
            let pattern = Pattern::after_any_dot(key, source).map_err(|problem| problem.in_file(self.path))?;
            patterns.push((pattern, value(self, key, Some(number))?));
        }
        Ok(Patterns(patterns))
    }

    /// A list of names, one pattern, or nothing.
    fn names(&self, key: &str) -> Result<Option<Names>, AdapterError> {
        match self.json.get(key) {
            None | Some(Json::Null) => Ok(None),
            Some(Json::String(source)) => Pattern::full(key, source)
                .map(|pattern| Some(Names::Pattern(pattern)))
                .map_err(|p| p.in_file(self.path)),
            Some(Json::Array(items)) => {
                let names = items.iter().map(|item| item.as_str().map(str::to_string)).collect::<Option<_>>();
                let expected = || "it must be a list of names or one pattern".to_string();
                names.map(|names| Some(Names::List(names))).ok_or_else(|| self.invalid(key, expected()))
            }
            Some(_) => Err(self.invalid(key, "it must be a list of names or one pattern".to_string())),
        }
    }

    /// Names; none where the option is null or missing.
    fn listed(&self, key: &str) -> Result<Vec<String>, AdapterError> {
        match self.json.get(key) {
            Some(value) if value.is_falsy() => Ok(Vec::new()),
            None => Ok(Vec::new()),
            Some(Json::Array(items)) => {
                let names = items.iter().map(|item| item.as_str().filter(|name| !name.is_empty()).map(str::to_string));
                names.collect::<Option<_>>().ok_or_else(|| self.invalid(key, "it must be a list of names".to_string()))
            }
            Some(_) => Err(self.invalid(key, "it must be a list of names".to_string())),
        }
    }

    /// Tokens; none where the option is null, empty or missing.
    fn invocation(&self, key: &str) -> Result<Option<Vec<u32>>, AdapterError> {
        let tokens = match self.json.get(key) {
            Some(Json::Array(items)) if !items.is_empty() => items.iter().map(token).collect::<Option<Vec<u32>>>(),
            None => return Ok(None),
            Some(value) if value.is_falsy() => return Ok(None),
            Some(_) => None,
        };
        let tokens = tokens.ok_or_else(|| self.invalid(key, "it must be a list of token numbers".to_string()))?;
        if self.flag("use_dora")? {
            return Err(self.invalid(key, "activated LoRA and DoRA exclude each other".to_string()));
        }
        Ok(Some(tokens))
    }

    fn token_indices(&self, key: &str) -> Result<Option<TokenIndices>, AdapterError> {
        let rows = |value: &Json| -> Option<Vec<u32>> {
            let Json::Array(items) = value else { return None };
            let rows = items.iter().map(token).collect::<Option<Vec<u32>>>()?;
            let mut once = rows.clone();
            once.sort_unstable();
            once.dedup();
            (once.len() == rows.len()).then_some(rows)
        };
        let indices = match self.json.get(key) {
            None | Some(Json::Null) => return Ok(None),
            Some(Json::Object(members)) => {
                let modules = members.iter().map(|(end, value)| Some((end.clone(), rows(value)?)));
                modules.collect::<Option<_>>().map(TokenIndices::ByModule)
            }
            Some(value) => rows(value).map(TokenIndices::OfEmbedding),
        };
        let expected = || "it must be token numbers, each once, or such a list for each module".to_string();
        indices.map(Some).ok_or_else(|| self.invalid(key, expected()))
    }

    fn targets(&self) -> Result<Targets, AdapterError> {
        let all_linear = self.json.get("target_modules").and_then(Json::as_str) == Some("all-linear");
        let included = if all_linear { None } else { self.names("target_modules")? };
        // An empty list or pattern excludes nothing.
        let excludes = self.json.get("exclude_modules").is_some_and(|value| !value.is_falsy());
        let excluded = if excludes { self.names("exclude_modules")? } else { None };
        let layer = |value: &Json| match value {
            Json::Number(number) => number.as_u64(),
            _ => None,
        };
        let layers = match self.json.get("layers_to_transform") {
            None | Some(Json::Null) => Ok(None),
            Some(Json::Array(items)) if items.is_empty() => Ok(None),
            Some(Json::Array(items)) => items.iter().map(layer).collect::<Option<Vec<u64>>>().map(Some).ok_or(()),
            Some(single) => layer(single).map(|layer| Some(vec![layer])).ok_or(()),
        }
        .map_err(|()| self.invalid("layers_to_transform", "it must be layer numbers".to_string()))?;
        let key = "layers_pattern";
        let lists: Vec<&str> = match self.json.get(key) {
            None | Some(Json::Null) => Vec::new(),
            Some(Json::String(list)) if list.is_empty() => Vec::new(),
            Some(Json::String(list)) => vec![list],
            Some(Json::Array(items)) => {
                let names = items.iter().map(Json::as_str).collect::<Option<_>>();
                names.ok_or_else(|| self.invalid(key, "it must be names of module lists".to_string()))?
            }
            Some(_) => return Err(self.invalid(key, "it must be names of module lists".to_string())),
        };
        if lists.len() > 100 {
            return Err(self.invalid(key, "at most 100 names are accepted".to_string()));
        }
        // Without a name any list counts: one component, then the number.
        let lists = if lists.is_empty() { vec!["[^.]*"] } else { lists };
        let layer_patterns = lists.iter().map(|list| Pattern::layer_number(key, list)).collect::<Result<_, _>>();
        let layer_patterns = layer_patterns.map_err(|problem| problem.in_file(self.path))?;
        Ok(Targets { included, excluded, layers, layer_patterns })
    }
}
