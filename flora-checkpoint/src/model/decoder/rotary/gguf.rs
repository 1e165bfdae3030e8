//! Rotary positions as GGUF files say them: `ARCHITECTURE.rope.*`, and a tensor of divisors, by which llama.cpp's converter writes
//! Llama 3.1's scaling.

use super::{Rotary, RotaryScaling, Yarn};
use crate::model::gguf::ROTARY_DIVISORS;
use crate::model::settings::in_gguf;
use crate::model::{Model, ModelError};

/// θ where the file says none.
const DEFAULT_BASE: f64 = 10_000.0;

pub(super) fn read(model: &Model, head_size: usize, context_length: usize) -> Result<Rotary, ModelError> {
    let settings = &*model.settings;
    let key = |name: &'static str| settings.name(in_gguf(name));
    let positive = |name: &'static str| settings.optional_positive(&key(name));
    let kind = settings.optional_text(&key("rope.scaling.type"))?;
    let factor = match (positive("rope.scaling.factor")?, positive("rope.scale_linear")?) {
        (Some(factor), Some(older)) if factor != older => {
            let problem = format!("contradicts `{}`; correct one of them, or remove it", key("rope.scaling.factor"));
            return Err(settings.error(&key("rope.scale_linear"), problem));
        }
        (factor, older) => factor.or(older).unwrap_or(1.0),
    };
    let attention_factor = positive("rope.scaling.attn_factor")?.unwrap_or(1.0);
    let divisors = divisors(model, head_size)?;
    let base = positive("rope.freq_base")?.unwrap_or(DEFAULT_BASE);
    let scaling = match (kind, divisors) {
        (Some("none"), _) if factor != 1.0 => {
            let problem = "is there, though the scaling's type is `none`; remove one of them";
            return Err(settings.error(&key("rope.scaling.factor"), problem));
        }
        (Some("yarn"), None) => {
            for (name, usual) in [
                ("rope.scaling.yarn_ext_factor", 1.0),
                ("rope.scaling.yarn_attn_factor", 1.0),
                ("rope.scaling.yarn_log_multiplier", 0.0),
            ] {
                if settings.optional_number(&key(name))?.is_some_and(|found| found != usual) {
                    return Err(settings.error(&key(name), format!("is not {usual}, which is not supported")));
                }
            }
            RotaryScaling::Yarn(Yarn {
                factor,
                original_context: positive("rope.scaling.original_context_length")?.unwrap_or(context_length as f64),
                attention_factor: attention_factor * Yarn::magnitude(factor, 1.0),
                beta_fast: positive("rope.scaling.yarn_beta_fast")?.unwrap_or(Yarn::BETA_FAST),
                beta_slow: positive("rope.scaling.yarn_beta_slow")?.unwrap_or(Yarn::BETA_SLOW),
                truncate: true,
            })
        }
        (None | Some("none" | "linear"), _) if attention_factor != 1.0 => {
            let problem = "is there without `yarn`, which is not supported";
            return Err(settings.error(&key("rope.scaling.attn_factor"), problem));
        }
        (None | Some("none" | "linear"), Some(mut divisors)) => {
            divisors.iter_mut().for_each(|divisor| *divisor *= factor);
            RotaryScaling::Divided { divisors }
        }
        (None | Some("none" | "linear"), None) if factor == 1.0 => RotaryScaling::None,
        (None | Some("none" | "linear"), None) => RotaryScaling::Linear { factor },
        (Some("yarn"), Some(_)) => return Err(settings.error(ROTARY_DIVISORS, "is there beside `yarn`; remove one")),
        (Some(other), _) => {
            let problem = format!(
                "is `{other}`, a scaling of rotary positions that isn't supported; supported: none, linear, yarn"
            );
            return Err(settings.error(&key("rope.scaling.type"), problem));
        }
    };
    Ok(Rotary { base, scaling })
}

/// The tensor of divisors, if there is one.
fn divisors(model: &Model, head_size: usize) -> Result<Option<Vec<f64>>, ModelError> {
    if !model.parameters.contains_key(ROTARY_DIVISORS) {
        return Ok(None);
    }
    let parameter = model.parameter(ROTARY_DIVISORS)?;
    parameter.must_be(&[head_size / 2], "one for each pair of a head")?;
    let divisors = parameter.to_f32()?;
    match divisors.iter().find(|divisor| **divisor <= 0.0) {
        Some(divisor) => Err(model.settings.error(ROTARY_DIVISORS, format!("holds {divisor}; divisors are positive"))),
        None => Ok(Some(divisors.into_iter().map(f64::from).collect())),
    }
}
