//! Rotary positions in every place where files write them.

use crate::decoder::{LLAMA_CONFIG, decoder, llama_tensors, refused, set, unscaled};
use crate::gguf_writer::{File, Tensor, Value};
use crate::model::open_gguf;
use flora_checkpoint::model::{DecoderConfig, Rotary, RotaryScaling, Yarn};

/// What `LLAMA_CONFIG` says of rotary positions.
const WRITTEN: &str = r#""rope_theta": 500000.0, "rope_scaling": null"#;

fn rotary(config: &str) -> Rotary {
    let changed = LLAMA_CONFIG.replace(WRITTEN, config);
    assert_ne!(changed, LLAMA_CONFIG);
    match decoder(&changed, &llama_tensors()).unwrap_or_else(|error| panic!("{config}: {error}")) {
        DecoderConfig::Llama(config) => config.rotary,
        other => panic!("{other:?}"),
    }
}

#[test]
fn every_place_of_transformers_4_and_5_is_read() {
    let linear = |base| Rotary { base, scaling: RotaryScaling::Linear { factor: 2.0 } };
    for (config, right) in [
        (r#""x": 1"#, unscaled(10_000.0)),
        (r#""rope_scaling": {}"#, unscaled(10_000.0)),
        (r#""rope_theta": 7"#, unscaled(7.0)),
        (r#""rope_scaling": {"rope_theta": 7.5, "rope_type": "default"}"#, unscaled(7.5)),
        (r#""rope_parameters": {"rope_theta": 7.5}"#, unscaled(7.5)),
        (r#""rope_parameters": {"rope_theta": null, "type": null, "factor": null}, "rope_theta": 3.0"#, unscaled(3.0)),
        (
            r#""rope_theta": 7.0, "rope_parameters": {"rope_theta": 7, "rope_type": "default", "factor": 1}"#,
            unscaled(7.0),
        ),
        (r#""rope_theta": 7.0, "rope_scaling": {"type": "linear", "factor": 2}"#, linear(7.0)),
        (r#""rope_scaling": {"type": "linear", "rope_type": "linear", "factor": 2.0, "rope_theta": 7.0}"#, linear(7.0)),
        (
            r#""rope_parameters": {"rope_type": "linear", "factor": 2.0, "rope_theta": 7.0}, "rope_scaling": null"#,
            linear(7.0),
        ),
        (
            r#""rope_parameters": {"rope_theta": 7.0}, "rope_scaling": {"type": "linear", "factor": 2.0}, "rope_theta": 7"#,
            linear(7.0),
        ),
        (r#""rope_scaling": {"type": "dynamic", "factor": 4.0}"#, unscaled(10_000.0)),
        (
            r#""rope_parameters": {"full_attention": {"rope_type": "linear", "factor": 2.0, "rope_theta": 7.0},
              "sliding_attention": {"rope_type": "linear", "factor": 2.0, "rope_theta": 7.0}}"#,
            linear(7.0),
        ),
    ] {
        assert_eq!(rotary(config), right, "{config}");
    }
}

#[test]
fn scalings_have_transformers_defaults() {
    let llama3 = |original_context| Rotary {
        base: 10_000.0,
        scaling: RotaryScaling::Llama3 {
            factor: 32.0,
            low_frequency_factor: 1.0,
            high_frequency_factor: 4.0,
            original_context,
        },
    };
    const LLAMA3: &str =
        r#""rope_scaling": {"rope_type": "llama3", "factor": 32, "low_freq_factor": 1.0, "high_freq_factor": 4.0"#;
    assert_eq!(rotary(&format!("{LLAMA3}}}")), llama3(77.0));
    assert_eq!(rotary(&format!(r#"{LLAMA3}, "original_max_position_embeddings": 64}}"#)), llama3(64.0));
    assert_eq!(rotary(&format!(r#"{LLAMA3}}}, "original_max_position_embeddings": 64"#)), llama3(64.0));

    let yarn = |yarn: Yarn| Rotary { base: 10_000.0, scaling: RotaryScaling::Yarn(yarn) };
    let usual = Yarn {
        factor: 4.0,
        original_context: 64.0,
        attention_factor: 0.1 * 4f64.ln() + 1.0,
        beta_fast: 32.0,
        beta_slow: 1.0,
        truncate: true,
    };
    const YARN: &str = r#""rope_scaling": {"type": "yarn", "original_max_position_embeddings": 64"#;
    assert_eq!(rotary(&format!(r#"{YARN}, "factor": 4.0, "beta_fast": 0, "mscale": 0}}"#)), yarn(usual.clone()));
    let implied = 77.0 / 64.0;
    let without_factor = Yarn { factor: implied, attention_factor: 0.1 * implied.ln() + 1.0, ..usual.clone() };
    assert_eq!(rotary(&format!(r#"{YARN}, "factor": null}}"#)), yarn(without_factor));
    let deepseek = Yarn {
        attention_factor: (0.1 * 2.0 * 4f64.ln() + 1.0) / (0.1 * 0.5 * 4f64.ln() + 1.0),
        beta_fast: 16.0,
        beta_slow: 2.0,
        truncate: false,
        ..usual.clone()
    };
    let config =
        r#""factor": 4.0, "mscale": 2.0, "mscale_all_dim": 0.5, "beta_fast": 16, "beta_slow": 2, "truncate": false"#;
    assert_eq!(rotary(&format!("{YARN}, {config}}}")), yarn(deepseek));
    let given = Yarn { attention_factor: 1.5, ..usual };
    assert_eq!(rotary(&format!(r#"{YARN}, "factor": 4.0, "mscale": 2.0, "attention_factor": 1.5}}"#)), yarn(given));
}

#[test]
fn what_contradicts_itself_or_is_not_known_is_refused() {
    const LLAMA3: &str = r#""rope_type": "llama3", "factor": 8.0, "low_freq_factor": 1.0, "high_freq_factor""#;
    for (config, expected) in [
        (
            r#""rope_theta": 7.0, "rope_parameters": {"rope_theta": 8.0}"#,
            "`rope_parameters.rope_theta` contradicts `rope_theta`",
        ),
        (
            r#""rope_scaling": {"rope_theta": 7.0}, "rope_parameters": {"rope_theta": 8.0}"#,
            "`rope_parameters.rope_theta` contradicts `rope_scaling.rope_theta`",
        ),
        (
            r#""rope_scaling": {"type": "linear", "factor": 2.0}, "rope_parameters": {"rope_type": "default"}"#,
            "`rope_parameters` contradicts `rope_scaling`",
        ),
        (
            r#""rope_scaling": {"type": "linear", "rope_type": "yarn", "factor": 2.0}"#,
            "`rope_scaling.type` contradicts",
        ),
        (r#""rope_scaling": {"factor": 2.0}"#, "no `rope_type` that would use it"),
        (r#""rope_scaling": {"type": "default", "factor": 2.0}"#, "no `rope_type` that would use it"),
        (r#""rope_scaling": {"type": "linear"}"#, "`rope_scaling.factor` is missing"),
        (r#""rope_scaling": {"type": "dynamic"}"#, "`rope_scaling.factor` is missing"),
        (r#""rope_scaling": {"type": "linear", "factor": 0}"#, "must be positive"),
        (r#""rope_scaling": {"type": "linear", "factor": "2"}"#, "is not a number"),
        (r#""rope_scaling": {"type": 3, "factor": 2.0}"#, "is not a text"),
        (r#""rope_scaling": 2"#, "is not an object"),
        (r#""rope_scaling": {"type": "longrope", "factor": 2.0}"#, "`rope_scaling.type` is `longrope`"),
        (r#""rope_parameters": {"rope_type": "mrope"}"#, "`rope_parameters.rope_type` is `mrope`"),
        (&format!(r#""rope_scaling": {{{LLAMA3}: 1.0}}"#), "must be above low_freq_factor"),
        (
            &format!(
                r#""rope_scaling": {{{LLAMA3}: 4.0, "original_max_position_embeddings": 9}}, "original_max_position_embeddings": 8"#
            ),
            "contradicts `original_max_position_embeddings`",
        ),
        (r#""rope_scaling": {"rope_type": "llama3", "factor": 8.0}"#, "`rope_scaling.low_freq_factor` is missing"),
        (r#""rope_scaling": {"type": "yarn", "factor": 2.0}, "rope_theta": 1.0"#, "frequencies that are no numbers"),
        (r#""rope_scaling": {"type": "yarn", "factor": 2.0, "beta_fast": -1}"#, "must be positive"),
        (
            r#""rope_parameters": {"full_attention": {"rope_theta": 7.0}, "sliding_attention": {"rope_theta": 8.0}}"#,
            "`rope_parameters.sliding_attention.rope_theta` contradicts",
        ),
        (
            r#""rope_parameters": {"full_attention": {"rope_theta": 7.0}, "rope_theta": 7.0}"#,
            "beside what each kind of layer has",
        ),
        (
            r#""rope_parameters": {"full_attention": {}, "sliding_attention": null}"#,
            "beside what each kind of layer has",
        ),
        (r#""rope_parameters": {"a.b": {"rope_theta": 7.0}}"#, "is a kind of layer that isn't known"),
        (r#""partial_rotary_factor": 0.5"#, "all of a head must turn"),
        (r#""rope_parameters": {"partial_rotary_factor": 0.5}"#, "all of a head must turn"),
    ] {
        refused(LLAMA_CONFIG, WRITTEN, config, &llama_tensors(), expected);
    }
}

fn gguf(settings: Vec<(&str, Value)>, divisors: Option<&[f32]>) -> Result<Rotary, String> {
    let mut file = File::llama(1, 4, 2, 6, 5, 3);
    settings.into_iter().for_each(|(key, value)| set(&mut file, &format!("llama.rope.{key}"), value));
    if let Some(divisors) = divisors {
        file.tensors.push(Tensor::f32("rope_freqs.weight", &[divisors.len() as u64], divisors));
    }
    match open_gguf(&file).expect("a model").decoder().map_err(|error| error.to_string())? {
        DecoderConfig::Llama(config) => Ok(config.rotary),
        other => panic!("{other:?}"),
    }
}

#[test]
fn a_gguf_s_scaling_is_read() {
    let scaled = |scaling| Ok(Rotary { base: 100_000.0, scaling });
    let linear = |factor| scaled(RotaryScaling::Linear { factor });
    let kind = |kind: &str| ("scaling.type", Value::string(kind));
    let factor = |factor| ("scaling.factor", Value::f32(factor));
    assert_eq!(gguf(vec![kind("none")], None), scaled(RotaryScaling::None));
    assert_eq!(gguf(vec![kind("linear")], None), scaled(RotaryScaling::None));
    assert_eq!(gguf(vec![factor(4.0)], None), linear(4.0));
    assert_eq!(gguf(vec![kind("linear"), factor(4.0)], None), linear(4.0));
    assert_eq!(gguf(vec![("scale_linear", Value::f32(4.0)), factor(4.0)], None), linear(4.0));
    let yarn = Yarn {
        factor: 4.0,
        original_context: 16.0,
        attention_factor: 0.1 * 4f64.ln() + 1.0,
        beta_fast: 32.0,
        beta_slow: 1.0,
        truncate: true,
    };
    let original = ("scaling.original_context_length", Value::u32(16));
    assert_eq!(gguf(vec![kind("yarn"), factor(4.0), original], None), scaled(RotaryScaling::Yarn(yarn)));
    let divided = |divisors: &[f64]| scaled(RotaryScaling::Divided { divisors: divisors.to_vec() });
    assert_eq!(gguf(vec![], Some(&[1.0, 2.0, 8.0])), divided(&[1.0, 2.0, 8.0]));
    assert_eq!(gguf(vec![factor(4.0)], Some(&[1.0, 2.0, 8.0])), divided(&[4.0, 8.0, 32.0]));
}

#[test]
fn a_gguf_s_scaling_that_contradicts_itself_or_is_not_known_is_refused() {
    let kind = |kind: &str| ("scaling.type", Value::string(kind));
    let factor = |factor| ("scaling.factor", Value::f32(factor));
    for (settings, divisors, expected) in [
        (vec![kind("longrope")], None, "`llama.rope.scaling.type` is `longrope`"),
        (vec![kind("none"), factor(2.0)], None, "though the scaling's type is `none`"),
        (vec![("scale_linear", Value::f32(2.0)), factor(4.0)], None, "contradicts `llama.rope.scaling.factor`"),
        (vec![factor(-1.0)], None, "must be positive"),
        (vec![("scaling.attn_factor", Value::f32(2.0))], None, "without `yarn`"),
        (vec![kind("yarn"), ("scaling.yarn_ext_factor", Value::f32(0.5))], None, "is not 1"),
        (vec![kind("yarn")], Some(&[1.0, 1.0, 1.0][..]), "beside `yarn`"),
        (vec![], Some(&[1.0, 1.0]), "one for each pair of a head"),
        (vec![], Some(&[1.0, 0.0, 1.0]), "divisors are positive"),
        (vec![], Some(&[1.0, f32::NAN, 1.0]), "NaN"),
    ] {
        let error = gguf(settings, divisors).expect_err(expected);
        assert!(error.contains(expected), "{expected}: {error}");
    }
}
