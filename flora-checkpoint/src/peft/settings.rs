//! What an adapter that is yet to be trained will be, by the options that PEFT has for it: which modules it adapts, of which layer,
//! rank and scale. They are read as those of a finished adapter are, so that an option has one meaning.

use super::against::HEAD;
use super::config::Config;
use super::description::{Choice, Divisor, Extent, KindDescription, LayerDescription, ScalarDescription};
use super::{AdapterError, AdapterKind, AdapterKinds, options};
use crate::json::Json;
use serde::Serialize;
use serde_json::{Map, Value, json};
use std::collections::BTreeMap;
use std::path::Path;
use std::sync::Arc;

/// What is said of an adapter that is to be made.
#[derive(Clone, Debug, PartialEq, Serialize)]
pub struct AdapterRequest {
    /// The layer of its modules: `lora`, `dora`, `ia3`, `hira`, `flora`, `flora_mean`, or one of a registered kind.
    pub layer: String,
    /// r, for a kind that has one.
    pub rank: Option<usize>,
    /// The number that its scale is made of, `lora_alpha` of LoRA. Without it, what makes the scale 1.
    pub alpha: Option<f64>,
    /// Modules by the ends of their paths, as PEFT's `target_modules`; or `all-linear` alone.
    pub targets: Vec<String>,
    /// Further options of the kind by the names in its config, such as `rank_pattern` or `feedforward_modules`.
    pub options: Map<String, Value>,
}

/// A request that was understood.
pub struct AdapterSettings(Config);

/// How one module is adapted.
#[derive(Clone, Debug, PartialEq)]
pub struct ModuleSettings<'a> {
    /// Its layer.
    pub layer: &'a LayerDescription,
    /// r; 0 for a layer without rank.
    pub rank: usize,
    /// The operands that are numbers.
    pub scalars: BTreeMap<String, f32>,
}

/// What every config has and a request may set; options of the kind itself are described with it.
const COMMON: [&str; 4] = ["target_modules", "exclude_modules", "layers_to_transform", "layers_pattern"];

impl AdapterSettings {
    /// Reads `request` as the config of one of `kinds`. Errors name `place`, where it is written.
    ///
    /// # Errors
    /// A layer that there isn't, or an option that is missing, makes no sense, or says what isn't trained.
    pub fn new(place: &Path, request: &AdapterRequest, kinds: &AdapterKinds) -> Result<Self, AdapterError> {
        let has = |kind: &&Arc<KindDescription>| kind.layers.iter().any(|own| own.name == request.layer);
        let layer = |kind: &'_ KindDescription| kind.layers.iter().find(|own| own.name == request.layer).cloned();
        let Some((description, layer)) = kinds.descriptions().find(has).and_then(|kind| Some((kind, layer(kind)?)))
        else {
            let names = kinds.descriptions().flat_map(|kind| &kind.layers).map(|layer| layer.name.as_str());
            let expected = format!("it must be one of {}", names.collect::<Vec<_>>().join(", "));
            return Err(invalid(place, "kind", &json!(request.layer), expected));
        };
        let mut config = request.options.clone();
        for (option, value) in &request.options {
            if !COMMON.contains(&option.as_str()) && !options::is_read(description, option) {
                let (path, key, value) = (place.to_owned(), option.clone(), shortened(value));
                let reason = format!("training of {} doesn't have it", description.peft_type);
                return Err(AdapterError::UnsupportedOption { path, key, value, reason });
            }
        }
        let mut set = |option: &str, value: Value, said_as: &str| match config.insert(option.to_owned(), value) {
            Some(other) => {
                Err(invalid(place, option, &other, format!("it is said by `{said_as}` already; remove one of both")))
            }
            None => Ok(()),
        };
        set("peft_type", json!(description.peft_type), "kind")?;
        for (option, choice) in &layer.when {
            let value = match choice {
                Choice::Flag(flag) => json!(flag),
                Choice::Word(word) => json!(word),
            };
            set(option, value, "kind")?;
        }
        let targets = match &request.targets[..] {
            [all] if all == "all-linear" => json!(all),
            [] => return Err(invalid(place, "targets", &Value::Null, "name at least one module".to_owned())),
            names => json!(names),
        };
        set("target_modules", targets, "targets")?;
        match (&description.rank, request.rank) {
            (Some(rank), Some(number)) => set(&rank.option, json!(number), "rank")?,
            (None, Some(number)) => {
                let expected = format!("{} has no rank; leave it out", layer.kind());
                return Err(invalid(place, "rank", &json!(number), expected));
            }
            (Some(rank), None) if !request.options.contains_key(&rank.option) => {
                return Err(invalid(place, "rank", &Value::Null, format!("{} needs one", layer.kind())));
            }
            _ => {}
        }
        match (&layer.scalars[..], request.alpha) {
            ([], Some(alpha)) => {
                let expected = format!("{} has no scale; leave it out", layer.kind());
                return Err(invalid(place, "alpha", &json!(alpha), expected));
            }
            ([scalar], Some(alpha)) => set(&scalar.option, json!(alpha), "alpha")?,
            ([_, ..], Some(alpha)) => {
                let expected = format!("{} has several scales; give them in `options`", layer.kind());
                return Err(invalid(place, "alpha", &json!(alpha), expected));
            }
            (scalars, None) => {
                for scalar in scalars {
                    let is_said = scalar.default.is_some() || request.options.contains_key(&scalar.option);
                    if let (false, Some(alpha)) = (is_said, unit(scalar, request)) {
                        set(&scalar.option, json!(alpha), "alpha")?;
                    }
                }
            }
        }
        let text = Value::Object(config).to_string();
        let json = Json::parse(place, text.as_bytes())?;
        Ok(Self(Config::read(place, &json, kinds)?))
    }

    /// The kind of its modules.
    pub fn kind(&self) -> &AdapterKind {
        &self.0.kind
    }

    /// How the module at `path` is adapted; `None`: not at all. `all-linear` leaves out the output matrix, as PEFT does.
    ///
    /// # Errors
    /// A pattern that fails on `path`, or a scale beyond f32.
    pub fn module(&self, path: &str) -> Result<Option<ModuleSettings<'_>>, AdapterError> {
        let config = &self.0;
        let all_but_head = config.targets.included.is_none() && path == HEAD;
        if all_but_head || !config.targets.adapt(path).map_err(config.pattern_error())? {
            return Ok(None);
        }
        let Some(layer) = self.layer(path)? else { return Ok(None) };
        let has_rank = layer.tensors.iter().any(|tensor| tensor.shape().contains(&Extent::Rank));
        let rank = match (&config.rank, has_rank) {
            (Some(setting), true) => setting.ranks.of(path).map_err(config.pattern_error())?,
            _ => 0,
        };
        let scalar = |scalar: &ScalarDescription| Ok((scalar.operand.clone(), config.scalar(scalar, path, rank)?));
        let scalars = layer.scalars.iter().map(scalar).collect::<Result<_, AdapterError>>()?;
        Ok(Some(ModuleSettings { layer, rank, scalars }))
    }

    /// The layer whose list has the module, or the one without a list.
    fn layer(&self, path: &str) -> Result<Option<&LayerDescription>, AdapterError> {
        let config = &self.0;
        let mut unlisted = None;
        for layer in config.layers() {
            match layer.modules.as_ref().and_then(|option| config.lists.get(option)?.as_ref()) {
                Some(names) if names.contain_loosely(path).map_err(config.pattern_error())? => return Ok(Some(layer)),
                _ if layer.modules.is_none() => unlisted = Some(layer),
                _ => {}
            }
        }
        Ok(unlisted)
    }

    /// Checks that every listed target is one of `modules`, the paths of a model's layers.
    ///
    /// # Errors
    /// The first that isn't.
    pub fn check_targets<'a>(&self, modules: impl Iterator<Item = &'a str> + Clone) -> Result<(), AdapterError> {
        let Some(name) = self.0.targets.unmatched(modules.clone()) else { return Ok(()) };
        let mut known: Vec<&str> = Vec::new();
        for end in modules.map(|module| module.rsplit('.').next().unwrap_or(module)) {
            if !known.contains(&end) {
                known.push(end);
            }
        }
        let expected = format!("no layer of the model is called so; its layers are called {}", known.join(", "));
        Err(invalid(&self.0.path, "targets", &json!(name), expected))
    }
}

/// The number that makes a scale 1 of the common rank.
fn unit(scalar: &ScalarDescription, request: &AdapterRequest) -> Option<f64> {
    let rank = request.rank.map(|rank| rank as f64);
    let is_root = scalar.root.as_ref().and_then(|root| request.options.get(root)) == Some(&Value::Bool(true));
    match (scalar.over, is_root) {
        (None, _) => Some(1.0),
        (Some(Divisor::Rank), false) => rank,
        (Some(Divisor::Rank), true) | (Some(Divisor::RootRank), _) => rank.map(f64::sqrt),
    }
}

fn invalid(place: &Path, key: &str, value: &Value, expected: String) -> AdapterError {
    let value = if value.is_null() { "missing".to_owned() } else { shortened(value) };
    AdapterError::InvalidOption { path: place.to_owned(), key: key.to_owned(), value, expected }
}

fn shortened(value: &Value) -> String {
    value.to_string().chars().take(60).collect()
}
