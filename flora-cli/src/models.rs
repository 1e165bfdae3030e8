//! Models that are known by their shapes alone, and the names of projections that every command chooses by.

/// Projections of one shape in every layer of a model.
#[derive(Clone, Debug, PartialEq, Eq)]
pub(crate) struct ProjectionShape {
    /// The module path below the layer, such as `self_attn.q_proj`.
    pub(crate) name: String,
    /// Inputs.
    pub(crate) d: usize,
    /// Outputs.
    pub(crate) k: usize,
}

/// The linear layers of a decoder.
#[derive(Clone, Debug)]
pub(crate) struct ModelShapes {
    /// The path above the layer's number.
    pub(crate) prefix: &'static str,
    /// How many layers, each with all projections.
    pub(crate) layers: usize,
    /// The projections of one layer.
    pub(crate) projections: Vec<ProjectionShape>,
}

/// The names of the built-in shape tables.
pub(crate) const NAMES: [&str; 4] = ["starcoder-15b", "starcoder-3b", "starcoder-1b", SMOLLM2];

/// The projections that the paper adapts, query and key, by StarCoder's and by Llama's names.
pub(crate) const QUERY_AND_KEY: [&str; 4] = ["attn.q", "attn.k", "q_proj", "k_proj"];

/// The default model, whose weights can be fetched.
pub(crate) const SMOLLM2: &str = "smollm2-135m";

/// The built-in table called `name`.
pub(crate) fn builtin(name: &str) -> Option<ModelShapes> {
    match name {
        "starcoder-15b" => Some(starcoder(6144, 40, 24576)),
        "starcoder-3b" => Some(starcoder(2816, 36, 11264)),
        "starcoder-1b" => Some(starcoder(2048, 24, 8192)),
        SMOLLM2 => Some(smollm2()),
        _ => None,
    }
}

/// GPTBigCode with multi-query attention: keys and values have one head of 128.
fn starcoder(d: usize, layers: usize, ffn: usize) -> ModelShapes {
    let head = 128;
    let projections = [
        ("attn.q", d, d),
        ("attn.k", d, head),
        ("attn.v", d, head),
        ("attn.c_proj", d, d),
        ("mlp.c_fc", d, ffn),
        ("mlp.c_proj", ffn, d),
    ];
    shapes("transformer.h", layers, &projections)
}

fn smollm2() -> ModelShapes {
    let (d, keys, ffn) = (576, 3 * 64, 1536);
    let projections = [
        ("self_attn.q_proj", d, d),
        ("self_attn.k_proj", d, keys),
        ("self_attn.v_proj", d, keys),
        ("self_attn.o_proj", d, d),
        ("mlp.gate_proj", d, ffn),
        ("mlp.up_proj", d, ffn),
        ("mlp.down_proj", ffn, d),
    ];
    shapes("model.layers", 30, &projections)
}

fn shapes(prefix: &'static str, layers: usize, projections: &[(&str, usize, usize)]) -> ModelShapes {
    let projections = projections.iter().map(|(name, d, k)| ProjectionShape { name: (*name).to_owned(), d: *d, k: *k });
    ModelShapes { prefix, layers, projections: projections.collect() }
}

/// The part of a module path below the layer's number: `self_attn.q_proj` of `model.layers.3.self_attn.q_proj`.
pub(crate) fn name_in_layer(path: &str) -> &str {
    let is_number = |component: &str| !component.is_empty() && component.bytes().all(|byte| byte.is_ascii_digit());
    let mut rest = path;
    let mut name = path;
    while let Some((component, below)) = rest.split_once('.') {
        if is_number(component) {
            name = below;
        }
        rest = below;
    }
    name
}

/// Whether `target` chooses the module at `path`: the whole path, or what follows one of its dots, as PEFT's `target_modules`.
pub(crate) fn is_target(path: &str, target: &str) -> bool {
    path.strip_suffix(target).is_some_and(|above| above.is_empty() || above.ends_with('.'))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn names_are_what_follows_the_last_number() {
        assert_eq!(name_in_layer("model.layers.3.self_attn.q_proj"), "self_attn.q_proj");
        assert_eq!(name_in_layer("h.0.experts.11.up"), "up");
        assert_eq!(name_in_layer("score"), "score");
        assert_eq!(name_in_layer("layers.3"), "layers.3");
    }

    #[test]
    fn targets_are_whole_components() {
        assert!(is_target("h.0.attn.q", "q") && is_target("h.0.attn.q", "attn.q") && is_target("q", "q"));
        assert!(!is_target("h.0.attn.qq", "q") && !is_target("h.0.attn.q", "h.0"));
    }
}
