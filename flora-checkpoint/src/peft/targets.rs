//! Which modules a config targets, and which pattern holds for a module: PEFT's matching rules
//! (`check_target_module_exists`, `get_pattern_key`).
//!
//! Patterns are Python's `re` with look-around, so `fancy-regex` matches them, with a limit on backtracking.

use super::AdapterError;
use fancy_regex::{Regex, RegexBuilder};
use std::collections::BTreeSet;
use std::path::Path;
use std::sync::Arc;

/// The longest pattern, in bytes.
const PATTERN_LIMIT: usize = 1 << 16;
/// The steps that matching one name may take.
const BACKTRACK_LIMIT: usize = 100_000;
/// The bytes that one compiled pattern may take.
const COMPILED_LIMIT: usize = 1 << 20;

/// A pattern that can't be used; [`in_file`](Self::in_file) makes it an error.
pub(super) struct PatternProblem {
    key: String,
    pattern: String,
    problem: String,
}

impl PatternProblem {
    pub(super) fn in_file(self, path: &Path) -> AdapterError {
        let expected = format!("as a pattern it can't be used: {}", self.problem);
        let value = format!("{:?}", self.pattern.chars().take(60).collect::<String>());
        AdapterError::InvalidOption { path: path.to_owned(), key: self.key, value, expected }
    }
}

/// A compiled pattern of the option `key`.
#[derive(Clone, Debug)]
pub(super) struct Pattern {
    key: Arc<str>,
    source: String,
    regex: Regex,
}

impl Pattern {
    /// Python's `re.fullmatch(source, name)`.
    pub(super) fn full(key: &str, source: &str) -> Result<Self, PatternProblem> {
        Self::compile(key, source, format!("^(?:{source})$"))
    }

    /// PEFT's match of a pattern key: the whole name, or what follows one of its dots.
    pub(super) fn after_any_dot(key: &str, source: &str) -> Result<Self, PatternProblem> {
        Self::compile(key, source, format!(r"^(?:(.*\.)?({source})$)"))
    }

    /// The first layer number after a module list whose name matches `list`.
    pub(super) fn layer_number(key: &str, list: &str) -> Result<Self, PatternProblem> {
        Self::compile(key, list, format!(r"^(?:(?:^|.*?\.){list}\.(?P<idx>\d+)\.)"))
    }

    fn compile(key: &str, source: &str, whole: String) -> Result<Self, PatternProblem> {
        let fail = |problem: String| PatternProblem { key: key.to_string(), pattern: source.to_string(), problem };
        if whole.len() > PATTERN_LIMIT {
            return Err(fail(format!("it is longer than {PATTERN_LIMIT} bytes")));
        }
        let regex = RegexBuilder::new(&whole)
            .backtrack_limit(BACKTRACK_LIMIT)
            .delegate_size_limit(COMPILED_LIMIT)
            .build()
            .map_err(|error| fail(error.to_string()))?;
        Ok(Self { key: key.into(), source: source.to_string(), regex })
    }

    fn problem(&self, error: fancy_regex::Error) -> PatternProblem {
        PatternProblem { key: self.key.to_string(), pattern: self.source.clone(), problem: error.to_string() }
    }

    pub(super) fn matches(&self, name: &str) -> Result<bool, PatternProblem> {
        self.regex.is_match(name).map_err(|error| self.problem(error))
    }

    fn number(&self, name: &str) -> Result<Option<u64>, PatternProblem> {
        let captures = self.regex.captures(name).map_err(|error| self.problem(error))?;
        Ok(captures.and_then(|captures| captures.name("idx")).and_then(|number| number.as_str().parse().ok()))
    }
}

/// A config's `target_modules`, `exclude_modules` or `feedforward_modules`.
#[derive(Clone, Debug)]
pub(super) enum Names {
    /// Names or ends of paths.
    List(BTreeSet<String>),
    /// One pattern for whole paths.
    Pattern(Pattern),
}

impl Names {
    /// Whether `module` is listed, or ends in a dot and a listed name.
    fn contain(&self, module: &str) -> Result<bool, PatternProblem> {
        match self {
            Names::List(names) => Ok(ends(module).any(|end| names.contains(end))),
            Names::Pattern(pattern) => pattern.matches(module),
        }
    }

    /// IA3's rule for `feedforward_modules`: an end, with or without a dot before it.
    pub(super) fn contain_loosely(&self, module: &str) -> Result<bool, PatternProblem> {
        match self {
            Names::List(names) => Ok(names.iter().any(|name| module.ends_with(&**name))),
            Names::Pattern(pattern) => pattern.matches(module),
        }
    }
}

/// A path and what follows each of its dots.
fn ends(module: &str) -> impl Iterator<Item = &str> {
    std::iter::once(module).chain(module.match_indices('.').map(|(at, _)| &module[at + 1..]))
}

/// The modules that an adapter's config targets.
#[derive(Clone, Debug)]
pub(super) struct Targets {
    /// `None`: every linear layer (`all-linear`), or the choice that PEFT makes by architecture.
    pub(super) included: Option<Names>,
    pub(super) excluded: Option<Names>,
    /// `layers_to_transform`, which holds only for listed targets.
    pub(super) layers: Option<Vec<u64>>,
    /// How the layer number is found in a path.
    pub(super) layer_patterns: Vec<Pattern>,
}

impl Targets {
    pub(super) fn exactly(modules: impl Iterator<Item = String>) -> Self {
        let included = Some(Names::List(modules.collect()));
        Self { included, excluded: None, layers: None, layer_patterns: Vec::new() }
    }

    /// Whether an adapter of `module` may be in the file.
    fn allow(&self, module: &str) -> Result<bool, PatternProblem> {
        if let Some(excluded) = &self.excluded
            && excluded.contain(module)?
        {
            return Ok(false);
        }
        let Some(included) = &self.included else { return Ok(true) };
        if !included.contain(module)? {
            return Ok(false);
        }
        match (included, &self.layers) {
            // A target that is listed as the whole path holds whatever its layer.
            (Names::List(names), Some(layers)) if !names.contains(module) => {
                for pattern in &self.layer_patterns {
                    if let Some(layer) = pattern.number(module)? {
                        return Ok(layers.contains(&layer));
                    }
                }
                Ok(false)
            }
            _ => Ok(true),
        }
    }

    /// Whether the config says that `module` of the base model is adapted; false when it leaves the choice to PEFT.
    pub(super) fn asks_for(&self, module: &str) -> Result<bool, PatternProblem> {
        Ok(self.included.is_some() && self.allow(module)?)
    }

    /// Whether an adapter that is yet to be made adapts `module`.
    pub(super) fn adapt(&self, module: &str) -> Result<bool, PatternProblem> {
        self.allow(module)
    }

    /// The first listed name that none of `modules` is called by.
    pub(super) fn unmatched<'a>(&self, modules: impl Iterator<Item = &'a str> + Clone) -> Option<&str> {
        let Some(Names::List(names)) = &self.included else { return None };
        let is_meant = |name: &str| modules.clone().any(|module| ends(module).any(|end| end == name));
        names.iter().map(String::as_str).find(|name| !is_meant(name))
    }

    /// Checks that the modules that the file has tensors for are targeted. Whether a target without tensors is a module at all, only
    /// a model tells.
    pub(super) fn check_modules<'a>(
        &self,
        config: &Path,
        tensors: &Path,
        modules: impl Iterator<Item = &'a String>,
    ) -> Result<(), AdapterError> {
        for module in modules {
            if !self.allow(module).map_err(|problem| problem.in_file(config))? {
                let (path, config) = (tensors.to_owned(), config.to_owned());
                return Err(AdapterError::UntargetedModule { path, config, module: module.clone() });
            }
        }
        Ok(())
    }
}
