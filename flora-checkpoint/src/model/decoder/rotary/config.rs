//! Rotary positions as `config.json` says them. transformers 4 wrote θ at the top and the scaling as `rope_scaling`; 5 writes both
//! into `rope_parameters`, for each kind of layer by itself in some models. All places are read, and must agree.

use super::{KNOWN, Rotary, RotaryScaling, Yarn};
use crate::model::ModelError;
use crate::model::settings::{Member, Settings};

/// θ where no place says one.
const DEFAULT_BASE: f64 = 10_000.0;

/// Kinds of layers that may have a group of their own.
const LAYER_TYPES: [&str; 2] = ["full_attention", "sliding_attention"];

const WHOLE_HEADS: &str = "is not 1; all of a head must turn";

pub(super) fn read(settings: &Settings, context_length: usize) -> Result<Rotary, ModelError> {
    let mut base = Agreed::<f64>::default();
    let mut scaling = Agreed::<RotaryScaling>::default();
    base.add(settings, "rope_theta".to_owned(), settings.optional_positive("rope_theta")?)?;
    for group in groups(settings)? {
        let theta = format!("{group}.rope_theta");
        base.add(settings, theta.clone(), settings.optional_positive(&theta)?)?;
        let written = scaling_of(settings, &group, context_length)?;
        scaling.add(settings, group, written)?;
    }
    if settings.optional_positive("partial_rotary_factor")?.is_some_and(|factor| factor != 1.0) {
        return Err(settings.error("partial_rotary_factor", WHOLE_HEADS));
    }
    Ok(Rotary { base: base.value().unwrap_or(DEFAULT_BASE), scaling: scaling.value().unwrap_or(RotaryScaling::None) })
}

/// What several places say, which must be the same.
struct Agreed<T>(Option<(String, T)>);

impl<T> Default for Agreed<T> {
    fn default() -> Self {
        Self(None)
    }
}

impl<T: PartialEq> Agreed<T> {
    /// What the entry `key` says, if it says anything.
    fn add(&mut self, settings: &Settings, key: String, value: Option<T>) -> Result<(), ModelError> {
        let Some(value) = value else { return Ok(()) };
        match &self.0 {
            Some((first, held)) if *held != value => {
                Err(settings.error(&key, format!("contradicts `{first}`; correct one of them, or remove it")))
            }
            Some(_) => Ok(()),
            None => {
                self.0 = Some((key, value));
                Ok(())
            }
        }
    }

    fn value(self) -> Option<T> {
        self.0.map(|(_, value)| value)
    }
}

/// The groups that speak of rotary positions, by their paths.
fn groups(settings: &Settings) -> Result<Vec<String>, ModelError> {
    let mut groups = Vec::new();
    for place in ["rope_scaling", "rope_parameters"] {
        let Some(members) = settings.optional_group(place)? else { continue };
        let layers: Vec<_> = members.iter().filter(|(_, member)| *member == Member::Group).collect();
        if layers.is_empty() {
            groups.push(place.to_owned());
        }
        for (name, _) in &layers {
            let key = format!("{place}.{name}");
            if !LAYER_TYPES.contains(name) {
                let problem = format!("is a kind of layer that isn't known; known: {}", LAYER_TYPES.join(", "));
                return Err(settings.error(&key, problem));
            }
            groups.push(key);
        }
        // Beside groups of layers, anything else would be one of two meanings.
        if let Some((name, _)) = members.iter().find(|(_, member)| *member != Member::Group && !layers.is_empty()) {
            let problem = "is beside what each kind of layer has; write it into each, or leave the kinds out";
            return Err(settings.error(&format!("{place}.{name}"), problem));
        }
    }
    Ok(groups)
}

/// The scaling that a group says, if it says one.
fn scaling_of(settings: &Settings, group: &str, context_length: usize) -> Result<Option<RotaryScaling>, ModelError> {
    let key = |name: &str| format!("{group}.{name}");
    let positive = |name: &str| settings.optional_positive(&key(name));
    let needed = |name: &str| positive(name)?.ok_or_else(|| settings.error(&key(name), "is missing"));
    let mut kind = Agreed::default();
    for name in ["rope_type", "type"] {
        kind.add(settings, key(name), settings.optional_text(&key(name))?)?;
    }
    if positive("partial_rotary_factor")?.is_some_and(|factor| factor != 1.0) {
        return Err(settings.error(&key("partial_rotary_factor"), WHOLE_HEADS));
    }
    Ok(Some(match kind.value() {
        None | Some("default") if positive("factor")?.is_some_and(|factor| factor != 1.0) => {
            let problem = "is there, but no `rope_type` that would use it; add the type, or remove the factor";
            return Err(settings.error(&key("factor"), problem));
        }
        None => return Ok(None),
        Some("default") => RotaryScaling::None,
        Some("linear") => RotaryScaling::Linear { factor: needed("factor")? },
        // The base grows with texts longer than `max_position_embeddings`, beyond which no position is accepted: it would change what
        // earlier positions mean, and so depend on what else is computed with them.
        Some("dynamic") => {
            needed("factor")?;
            RotaryScaling::None
        }
        Some("llama3") => {
            let (low, high) = (needed("low_freq_factor")?, needed("high_freq_factor")?);
            if high <= low {
                let problem = format!("is {high}; it must be above low_freq_factor, {low}");
                return Err(settings.error(&key("high_freq_factor"), problem));
            }
            RotaryScaling::Llama3 {
                factor: needed("factor")?,
                low_frequency_factor: low,
                high_frequency_factor: high,
                original_context: original_context(settings, group, context_length)?,
            }
        }
        Some("yarn") => RotaryScaling::Yarn(yarn(settings, group, context_length)?),
        Some(other) => {
            let name = if settings.optional_text(&key("rope_type"))?.is_some() { "rope_type" } else { "type" };
            let problem =
                format!("is `{other}`, a scaling of rotary positions that isn't supported; supported: {KNOWN}");
            return Err(settings.error(&key(name), problem));
        }
    }))
}

/// The positions before scaling: outside of the group in some models, and all there are where nothing says so.
fn original_context(settings: &Settings, group: &str, context_length: usize) -> Result<f64, ModelError> {
    const NAME: &str = "original_max_position_embeddings";
    let mut agreed = Agreed::default();
    for key in [NAME.to_owned(), format!("{group}.{NAME}")] {
        let value = settings.optional_positive(&key)?;
        agreed.add(settings, key, value)?;
    }
    Ok(agreed.value().unwrap_or(context_length as f64))
}

fn yarn(settings: &Settings, group: &str, context_length: usize) -> Result<Yarn, ModelError> {
    let key = |name: &str| format!("{group}.{name}");
    let positive = |name: &str| settings.optional_positive(&key(name));
    // 0 is as good as nothing there.
    let unless_zero = |name: &str| match settings.optional_number(&key(name))? {
        Some(0.0) => Ok(None),
        _ => positive(name),
    };
    let original_context = original_context(settings, group, context_length)?;
    let factor = positive("factor")?.unwrap_or(context_length as f64 / original_context);
    let attention_factor = match (positive("attention_factor")?, unless_zero("mscale")?, unless_zero("mscale_all_dim")?)
    {
        (Some(factor), ..) => factor,
        (None, Some(above), Some(below)) => Yarn::magnitude(factor, above) / Yarn::magnitude(factor, below),
        (None, ..) => Yarn::magnitude(factor, 1.0),
    };
    Ok(Yarn {
        factor,
        original_context,
        attention_factor,
        beta_fast: unless_zero("beta_fast")?.unwrap_or(Yarn::BETA_FAST),
        beta_slow: unless_zero("beta_slow")?.unwrap_or(Yarn::BETA_SLOW),
        truncate: settings.optional_flag(&key("truncate"))?.unwrap_or(true),
    })
}
