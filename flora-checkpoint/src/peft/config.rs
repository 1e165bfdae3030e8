//! `adapter_config.json` as typed values.

use super::options;
use super::targets::{Names, Pattern, PatternProblem, Targets};
use super::{AdapterError, AdapterKind};
use crate::json::Json;
use std::path::{Path, PathBuf};

/// The largest rank; a larger one is a mistake, since it exceeds the width of any layer.
const RANK_LIMIT: u64 = 1 << 20;
/// The most patterns that one option may have.
const PATTERNS_LIMIT: usize = 10_000;

/// What a config says.
pub(super) struct Config {
    pub(super) path: PathBuf,
    pub(super) kind: AdapterKind,
    pub(super) targets: Targets,
    /// r, where the kind has a rank.
    pub(super) rank: usize,
    pub(super) ranks: Patterns<usize>,
    pub(super) alpha: f64,
    pub(super) alphas: Patterns<f64>,
    /// Scale by α/√r in place of α/r.
    pub(super) rank_stabilised: bool,
    /// Which modules IA3 scales at the input; `None`: PEFT's choice by architecture, seen from the tensors' shapes.
    pub(super) feedforward: Option<Names>,
    /// FLORA: the mean over the rank in place of the sum.
    pub(super) mean: bool,
}

/// Values by pattern, in the order of the file: the first pattern that matches holds.
pub(super) struct Patterns<T>(Vec<(Pattern, T)>);

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
    pub(super) fn read(path: &Path, json: &Json) -> Result<Config, AdapterError> {
        let Json::Object(members) = json else {
            return Err(Fields { path, json }.invalid("the file", "it must be an object".to_string()));
        };
        let fields = Fields { path, json };
        let peft_type = match json.get("peft_type") {
            Some(Json::String(name)) => name,
            Some(other) => {
                return Err(AdapterError::UnknownPeftType { path: path.to_owned(), found: other.to_string() });
            }
            None => {
                return Err(AdapterError::UnknownPeftType { path: path.to_owned(), found: "is missing, which".into() });
            }
        };
        options::check(path, peft_type, members)?;
        let kind = match peft_type.as_str() {
            "LORA" if fields.flag("use_dora")? => AdapterKind::Dora,
            "LORA" => AdapterKind::Lora,
            "IA3" => AdapterKind::Ia3,
            "HIRA" => AdapterKind::Hira,
            _ => AdapterKind::Flora,
        };
        // The factors are stored the same way whichever way the base weight is: the option only has to make sense.
        fields.flag("fan_in_fan_out")?;
        let is_lora = matches!(kind, AdapterKind::Lora | AdapterKind::Dora);
        Ok(Config {
            path: path.to_owned(),
            kind,
            targets: fields.targets()?,
            rank: if kind == AdapterKind::Ia3 { 0 } else { fields.rank("r", json.get("r"))? },
            ranks: fields.patterns("rank_pattern", Fields::rank)?,
            alpha: if is_lora { fields.number("lora_alpha", json.get("lora_alpha"))? } else { 1.0 },
            alphas: fields.patterns("alpha_pattern", Fields::number)?,
            rank_stabilised: fields.flag("use_rslora")?,
            feedforward: fields.names("feedforward_modules")?,
            mean: kind == AdapterKind::Flora && fields.reduces_by_mean()?,
        })
    }

    /// The error that a pattern of this config can't be used.
    pub(super) fn pattern_error(&self) -> impl Fn(PatternProblem) -> AdapterError + '_ {
        |problem| problem.in_file(&self.path)
    }

    pub(super) fn invalid(&self, key: &str, value: String, expected: String) -> AdapterError {
        AdapterError::InvalidOption { path: self.path.clone(), key: key.to_string(), value, expected }
    }
}

/// Reads single options.
struct Fields<'a> {
    path: &'a Path,
    json: &'a Json,
}

impl Fields<'_> {
    fn invalid(&self, key: &str, expected: String) -> AdapterError {
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

    fn rank(&self, key: &'static str, value: Option<&Json>) -> Result<usize, AdapterError> {
        let number = match value {
            Some(Json::Number(number)) => number.as_u64(),
            _ => None,
        };
        match number {
            Some(rank @ 1..=RANK_LIMIT) => Ok(rank as usize),
            _ => Err(self.invalid(key, format!("a rank must be a whole number from 1 to {RANK_LIMIT}"))),
        }
    }

    fn number(&self, key: &'static str, value: Option<&Json>) -> Result<f64, AdapterError> {
        let number = match value {
            Some(Json::Number(number)) => number.as_f64(),
            _ => None,
        };
        let finite = number.filter(|number| number.is_finite());
        finite.ok_or_else(|| self.invalid(key, "a scale must be a finite number".to_string()))
    }

    fn patterns<T>(
        &self,
        key: &'static str,
        value: impl Fn(&Self, &'static str, Option<&Json>) -> Result<T, AdapterError>,
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
    fn names(&self, key: &'static str) -> Result<Option<Names>, AdapterError> {
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

    fn reduces_by_mean(&self) -> Result<bool, AdapterError> {
        match self.json.get("reduce").and_then(Json::as_str) {
            Some("sum") => Ok(false),
            Some("mean") => Ok(true),
            _ => Err(self.invalid("reduce", "it must be \"sum\" or \"mean\"".to_string())),
        }
    }
}
