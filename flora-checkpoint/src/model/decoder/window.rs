//! Which layers of a model see a window of tokens before their own, and how long it is.

use crate::model::ModelError;
use crate::model::settings::{self, Key, key};

/// How a family says it in `config.json`. A GGUF file says a length for all layers, or nothing.
#[derive(Clone, Copy, Debug)]
pub(super) enum Settings {
    /// Not at all: every layer sees everything.
    None,
    /// `sliding_window` is of all layers. Where it isn't written at all, transformers has a length of its own.
    AllLayers,
    /// `use_sliding_window` says whether there is one, `layer_types` or `max_window_layers` in which layers.
    ByLayer,
}

/// transformers' length where a config that has windows says none.
const DEFAULT_WINDOW: usize = 4096;

/// transformers' first layer that has a window where a config doesn't say.
const DEFAULT_FIRST_LAYER: usize = 28;

const WINDOW: Key = key("attention.sliding_window", "sliding_window");

/// The tokens that each layer sees, its own among them; `None` where it sees all.
pub(super) fn read(
    settings: &settings::Settings,
    family: Settings,
    layers: usize,
    context_length: usize,
) -> Result<Vec<Option<usize>>, ModelError> {
    let name = settings.name(WINDOW);
    let written = |default: usize| match settings.optional_count(&name)? {
        None if !settings.is_written(&name) => Ok(Some(default)),
        window => Ok::<_, ModelError>(window),
    };
    let window_of = match (settings, family) {
        (settings::Settings::Gguf { .. }, _) => vec![settings.optional_count(&name)?; layers],
        (_, Settings::None) => vec![None; layers],
        (_, Settings::AllLayers) => vec![written(DEFAULT_WINDOW)?; layers],
        (_, Settings::ByLayer) => {
            let used = settings.optional_flag("use_sliding_window")?.unwrap_or(false);
            let window = if used { written(DEFAULT_WINDOW)? } else { None };
            by_layer(settings, window, layers)?
        }
    };
    // One that holds every position changes nothing.
    Ok(window_of.into_iter().map(|window| window.filter(|window| *window < context_length)).collect())
}

fn by_layer(
    settings: &settings::Settings,
    window: Option<usize>,
    layers: usize,
) -> Result<Vec<Option<usize>>, ModelError> {
    const TYPES: &str = "layer_types";
    let Some(types) = settings.optional_texts(TYPES)? else {
        let first = settings.optional_whole("max_window_layers")?.unwrap_or(DEFAULT_FIRST_LAYER);
        return Ok((0..layers).map(|layer| window.filter(|_| layer >= first)).collect());
    };
    if types.len() != layers {
        return Err(settings.error(TYPES, format!("has {} entries for {layers} layers", types.len())));
    }
    let one = |kind: &&str| match (*kind, window) {
        ("full_attention", _) => Ok(None),
        ("sliding_attention", Some(window)) => Ok(Some(window)),
        ("sliding_attention", None) => Err(settings
            .error(TYPES, "has a `sliding_attention`, but `use_sliding_window` and `sliding_window` say no length")),
        (other, _) => {
            Err(settings.error(TYPES, format!("has `{other}`; supported: full_attention, sliding_attention")))
        }
    };
    types.iter().map(one).collect()
}
