//! The text form and the derivation of every built-in adapter, as people see them. `cargo insta review` updates them.

use flora_ir::algebra::normalize;
use flora_ir::gradient::differentiate;
use flora_ir::{VerifiedLayer, builtin, parse, print, verify};

/// The layer that gives the input's gradient with its derivation, and the gradients of all operands.
fn gradients(layer: &VerifiedLayer) -> String {
    let adjoint = normalize(layer).unwrap().linear.adjoint().unwrap().derivation;
    format!("{}\n{adjoint}\n{}", print(adjoint.start.layer()), differentiate(layer))
}

#[test]
fn builtins() {
    for name in builtin::names() {
        let layer = builtin::builtin(name).expect(name);
        insta::assert_snapshot!(format!("{name}.text"), print(layer.layer()));
        insta::assert_snapshot!(format!("{name}.derivation"), normalize(layer).expect(name).derivation.to_string());
        insta::assert_snapshot!(format!("{name}.gradient"), gradients(layer));
    }
}

#[test]
fn an_equation_in_the_form_of_eq5_with_scales_everywhere() {
    let source = "layer eq5(x: input[tokens, D], w0: weight[D, K], b: adapter[D, R], a: adapter[R, K], l: adapter[K], s: adapter[], c: bias[K]) {
        gelu_erf(mean_rank(s * ((x * columns(b)) @ (w0 / l)) * rows(a)) + x @ w0 + c)
    }";
    let layer = verify(parse(source).unwrap()).unwrap();
    insta::assert_snapshot!("eq5.derivation", normalize(&layer).unwrap().derivation.to_string());
    insta::assert_snapshot!("eq5.gradient", gradients(&layer));
}

/// LoHa, whose derivation reads as fLoRA's does.
#[test]
fn an_elementwise_product_of_low_rank_weights() {
    let source = "layer loha(x: input[tokens, D], w0: weight[D, K], b: adapter[D, R], a: adapter[R, K], d: adapter[D, R], c: adapter[R, K]) {
        x @ (w0 + (b @ a) * (d @ c))
    }";
    let layer = verify(parse(source).unwrap()).unwrap();
    insta::assert_snapshot!("loha.derivation", normalize(&layer).unwrap().derivation.to_string());
    insta::assert_snapshot!("loha.gradient", gradients(&layer));
}

#[test]
fn a_residual_in_the_middle_of_a_sum() {
    let source = "layer residual(x: input[tokens, D], w0: weight[D, K], b: adapter[D, R], a: adapter[R, K], c: bias[K], e: residual[tokens, K]) {
        x @ w0 + (e + c) + (x @ b) @ a
    }";
    let layer = verify(parse(source).unwrap()).unwrap();
    insta::assert_snapshot!("residual.text", print(layer.layer()));
    insta::assert_snapshot!("residual.derivation", normalize(&layer).unwrap().derivation.to_string());
}

#[test]
fn a_rendered_residual_in_the_way() {
    let source = "layer f(x: input[tokens, D], w0: weight[D, K], e: residual[tokens, K]) {\n    relu(x @ w0 + e)\n}\n";
    let layer = verify(parse(source).unwrap()).unwrap();
    insta::assert_snapshot!("residual.obstacle", normalize(&layer).unwrap_err().diagnostic().render("f.flora", source));
}

#[test]
fn a_rendered_mistake() {
    let source = "layer f(x: input[tokens, D], w0: weight[D, K], b: adapter[D, R], a: adapter[R, K]) {\n    x @ (w0 * (a @ b))\n}\n";
    let mistakes = verify(parse(source).unwrap()).unwrap_err();
    let rendered: String = mistakes.iter().map(|mistake| mistake.render("f.flora", source)).collect();
    insta::assert_snapshot!("mistake", rendered);
}

#[test]
fn a_rendered_obstacle() {
    let source = "layer f(x: input[tokens, D], w0: weight[D, K], c: adapter[D, K]) {\n    x @ (w0 * c)\n}\n";
    let layer = verify(parse(source).unwrap()).unwrap();
    insta::assert_snapshot!("obstacle", normalize(&layer).unwrap_err().diagnostic().render("f.flora", source));
}
