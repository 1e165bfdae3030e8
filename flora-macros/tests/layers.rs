//! Every kind of adapter, written as a Rust function, is the layer that flora-ir has built in.

use flora_ir::{Layer, VerifiedLayer, builtin, parse, print};

/// Eq. 2, summed over the rank.
#[flora_macros::layer]
fn flora(x: Tokens<D>, w0: Weight<D, K>, b: Adapter<D, R>, a: Adapter<R, K>) -> Tokens<K> {
    x.matmul(w0 * b.matmul(a))
}

/// The mean over the rank.
#[flora_macros::layer]
fn flora_mean(x: Tokens<D>, w0: Weight<D, K>, b: Adapter<D, R>, a: Adapter<R, K>) -> Tokens<K> {
    x.matmul(w0 * b.matmul_mean(a))
}

/// fLoRA beside the base layer.
#[flora_macros::layer]
fn hira(x: Tokens<D>, w0: Weight<D, K>, b: Adapter<D, R>, a: Adapter<R, K>) -> Tokens<K> {
    x.matmul(w0 + w0 * b.matmul(a))
}

/// A scaled low-rank matrix beside the base weight.
#[flora_macros::layer]
fn lora(x: Tokens<D>, w0: Weight<D, K>, b: Adapter<D, R>, a: Adapter<R, K>, s: Scale) -> Tokens<K> {
    x.matmul(w0 + s * b.matmul(a))
}

/// IA3 on the output.
#[flora_macros::layer]
fn ia3(x: Tokens<D>, w0: Weight<D, K>, l: Adapter<K>) -> Tokens<K> {
    l * x.matmul(w0)
}

/// IA3 on the input.
#[flora_macros::layer]
fn ia3_feedforward(x: Tokens<D>, w0: Weight<D, K>, l: Adapter<D>) -> Tokens<K> {
    (l * x).matmul(w0)
}

/// LoRA with trained column magnitudes.
#[flora_macros::layer]
fn dora(x: Tokens<D>, w0: Weight<D, K>, b: Adapter<D, R>, a: Adapter<R, K>, s: Adapter, m: Adapter<K>) -> Tokens<K> {
    let w = w0 + s * b.matmul(a);
    m * x.matmul(w) / w.column_norm()
}

/// No adapter.
#[flora_macros::layer]
fn linear(x: Tokens<D>, w0: Weight<D, K>) -> Tokens<K> {
    x.matmul(w0)
}

#[test]
fn every_built_in_layer_can_be_written() {
    let written = [
        ("flora", flora::layer()),
        ("flora_mean", flora_mean::layer()),
        ("hira", hira::layer()),
        ("lora", lora::layer()),
        ("ia3", ia3::layer()),
        ("ia3_feedforward", ia3_feedforward::layer()),
        ("dora", dora::layer()),
        ("linear", linear::layer()),
    ];
    for name in builtin::names() {
        let (_, layer) =
            written.iter().find(|(known, _)| *known == name).unwrap_or_else(|| panic!("{name} is not written"));
        let built_in = builtin::builtin(name).expect("flora-ir names it");
        assert_eq!(print(layer.layer()), print(built_in.layer()));
    }
    assert_eq!(builtin::names().count(), written.len());
}

/// The layer of a text, printed.
fn printed(text: &str) -> String {
    let layer: Layer = parse(text).unwrap_or_else(|error| panic!("{text}: {error}"));
    print(&layer)
}

fn assert_is(layer: &VerifiedLayer, text: &str) {
    assert_eq!(print(layer.layer()), printed(text));
}

/// Eq. 5: fLoRA after the rewrite, by the rank's terms.
#[flora_macros::layer]
fn eq5(x: Tokens<D>, w0: Weight<D, K>, b: Adapter<D, R>, a: Adapter<R, K>) -> Tokens<K> {
    let terms = a.rows() * (b.columns() * x).matmul(w0);
    terms.sum_rank()
}

/// The paper's mean.
#[flora_macros::layer]
fn eq5_mean(x: Tokens<D>, w0: Weight<D, K>, b: Adapter<D, R>, a: Adapter<R, K>) -> Tokens<K> {
    (a.rows() * (b.columns() * x).matmul(w0)).mean_rank()
}

#[test]
fn the_rank_axis_can_be_written() {
    let operands = "x: input[tokens, D], w0: weight[D, K], b: adapter[D, R], a: adapter[R, K]";
    assert_is(&eq5::layer(), &format!("layer eq5({operands}) {{ sum_rank(rows(a) * ((columns(b) * x) @ w0)) }}"));
    assert_is(
        &eq5_mean::layer(),
        &format!("layer eq5_mean({operands}) {{ mean_rank(rows(a) * ((columns(b) * x) @ w0)) }}"),
    );
}

macro_rules! activated {
    ($($name:ident),*) => {
        $(
            #[flora_macros::layer]
            fn $name(x: Tokens<D>, w0: Weight<D, K>, bias: Bias<K>) -> Tokens<K> {
                (x.matmul(w0) + bias).$name()
            }
        )*
    };
}
activated!(relu, gelu, gelu_tanh, silu);

#[test]
fn bias_and_activation_can_be_written() {
    let layers = [
        (relu::layer(), "relu", "relu"),
        (gelu::layer(), "gelu", "gelu_erf"),
        (gelu_tanh::layer(), "gelu_tanh", "gelu_tanh"),
        (silu::layer(), "silu", "silu"),
    ];
    for (layer, name, function) in layers {
        let operands = "x: input[tokens, D], w0: weight[D, K], bias: bias[K]";
        assert_is(&layer, &format!("layer {name}({operands}) {{ {function}(x @ w0 + bias) }}"));
    }
}

/// What a transformer's output projection is followed by.
#[flora_macros::layer]
fn added(x: Tokens<D>, w0: Weight<D, K>, residual: Residual<K>) -> Tokens<K> {
    x.matmul(w0) + residual
}

/// The whole epilogue, the residual written first and of its own element type.
#[flora_macros::layer]
fn activated(x: Tokens<D>, w0: Weight<D, 64>, bias: Bias<64>, residual: Residual<64, bf16>) -> Tokens<64> {
    residual + (x.matmul(w0) + bias).silu()
}

#[test]
fn a_residual_can_be_written() {
    let operands = "x: input[tokens, D], w0: weight[D, K], residual: residual[tokens, K]";
    assert_is(&added::layer(), &format!("layer added({operands}) {{ x @ w0 + residual }}"));
    let operands = "x: input[tokens, D], w0: weight[D, 64], bias: bias[64], residual: residual[tokens, 64]: bf16";
    assert_is(&activated::layer(), &format!("layer activated({operands}) {{ residual + silu(x @ w0 + bias) }}"));
    let residual = activated::layer().residual();
    assert!(residual.is_some() && residual == activated::layer().operand_named("residual"));
}

/// Extents that are known and element types that differ.
#[flora_macros::layer]
fn typed(x: Tokens<576, f16>, w0: Weight<576, 1_536, f16>, l: Adapter<1536, bf16>, s: Scale<f16>) -> Tokens<1536, f32> {
    s * (l * x.matmul(w0))
}

#[test]
fn extents_and_element_types_are_kept() {
    let operands = "x: input[tokens, 576]: f16, w0: weight[576, 1536]: f16, l: adapter[1536]: bf16, s: adapter[]: f16";
    assert_is(&typed::layer(), &format!("layer typed({operands}) {{ s * (l * (x @ w0)) }}"));
}

/// Numbers and signs, and a name used twice.
#[flora_macros::layer]
fn signed(x: Tokens<D>, w0: Weight<D, K>, b: Adapter<D, R>, a: Adapter<R, K>) -> Tokens<K> {
    let w0 = w0 - b.matmul(a) * 2;
    let w0 = -w0 / -1e-3 * 0.25;
    x.matmul(w0)
}

#[test]
fn a_minus_is_a_product_with_minus_one() {
    let operands = "x: input[tokens, D], w0: weight[D, K], b: adapter[D, R], a: adapter[R, K]";
    let equation = "x @ ((-1 * (w0 + -1 * ((b @ a) * 2))) / -0.001 * 0.25)";
    assert_is(&signed::layer(), &format!("layer signed({operands}) {{ {equation} }}"));
}
