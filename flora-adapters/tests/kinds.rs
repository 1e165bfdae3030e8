//! A kind of adapter that flora doesn't have, from its equation and description to the dense weight that it stands for.

use std::collections::BTreeMap;
use std::path::{Path, PathBuf};

use flora_adapters::{AdapterStore, Layers, RegisterError, StoreError};
use flora_checkpoint::{
    AdapterFolder, AdapterModule, BaseWeight, KindDescription, Matrix, Model, Operand, write_matrices,
};
use flora_ir::{Activation, Value, parse, verify};

/// The kind that `docs/extending.md` shows.
fn kind() -> PathBuf {
    Path::new(env!("CARGO_MANIFEST_DIR")).join("../examples/kinds/two_sided_lora.toml")
}

fn text() -> String {
    std::fs::read_to_string(kind()).expect("the example")
}

fn layers() -> Layers {
    let mut layers = Layers::builtin().expect("the built-in kinds");
    layers.register_file(&kind()).expect("the example");
    layers
}

/// Numbers between −1 and 1 that count through a cycle.
fn numbers(count: usize, step: usize) -> Vec<f32> {
    (1..=count).map(|index| ((index * step) % 17) as f32 / 8.0 - 1.0).collect()
}

const Q: &str = "model.layers.0.self_attn.q_proj";
const K: &str = "model.layers.0.self_attn.k_proj";
const D: usize = 5;
const OUTPUTS: usize = 4;
const RANK: usize = 2;

/// A folder of the kind as another program would write it; the module K has no scale of its input.
fn folder(parent: &Path) -> PathBuf {
    let path = parent.join("mine");
    std::fs::create_dir(&path).expect("a new folder");
    let config = r#"{"peft_type": "TWO_SIDED_LORA", "r": 2, "alpha": 3, "alpha_pattern": {"k_proj": 1}, "root_of_rank": true,
        "target_modules": ["q_proj", "k_proj"], "dropout": 0.1, "gate_bias": null}"#;
    std::fs::write(path.join("adapter_config.json"), config).expect("a new file");
    let mut tensors: Vec<(String, Vec<usize>, Vec<f32>)> = Vec::new();
    for (module, step) in [(Q, 3), (K, 5)] {
        let mut put = |name: &str, shape: &[usize], step| {
            let values = numbers(shape.iter().product(), step);
            tensors.push((format!("base_model.model.{module}.{name}"), shape.to_vec(), values));
        };
        put("down.weight", &[RANK, D], step);
        put("up.weight", &[OUTPUTS, RANK], step + 1);
        put("gate", &[OUTPUTS], step + 2);
        if module == Q {
            put("input_scale", &[D], step + 3);
        }
    }
    let bytes: Vec<Vec<u8>> = tensors.iter().map(|(_, _, values)| bytemuck::cast_slice(values).to_vec()).collect();
    let views = tensors.iter().zip(&bytes).map(|((name, shape, _), bytes)| {
        let view = safetensors::tensor::TensorView::new(safetensors::Dtype::F32, shape.clone(), bytes);
        (name.clone(), view.expect("matching bytes"))
    });
    let file = safetensors::serialize(views, None).expect("serialisable tensors");
    std::fs::write(path.join("adapter_model.safetensors"), file).expect("a new file");
    path
}

/// The weight `[d, k]` that rows of the adapter meet, in f64, from the tensors as they are stored; and the sum of the sizes of the
/// products that each element is made of.
fn dense(module: &str, w0: &[f32]) -> Vec<(f64, f64)> {
    let (step, alpha) = if module == Q { (3, 3.0) } else { (5, 1.0) };
    let f64s = |count, step| numbers(count, step).into_iter().map(f64::from).collect::<Vec<_>>();
    let (down, up, gate) = (f64s(RANK * D, step), f64s(OUTPUTS * RANK, step + 1), f64s(OUTPUTS, step + 2));
    let scale = if module == Q { f64s(D, step + 3) } else { vec![1.0; D] };
    let s = f64::from((alpha / 2f64.sqrt()) as f32);
    let element = |index: usize| {
        let (input, output) = (index / OUTPUTS, index % OUTPUTS);
        let products = (0..RANK).map(|r| s * down[r * D + input] * up[output * RANK + r]);
        let parts = products.chain([f64::from(w0[index])]).map(|part| gate[output] * scale[input] * part);
        (parts.clone().sum(), parts.map(f64::abs).sum())
    };
    (0..D * OUTPUTS).map(element).collect()
}

#[test]
fn a_registered_kind_computes_its_equation() {
    let parent = tempfile::tempdir().expect("a temporary folder");
    folder(parent.path());
    let store = AdapterStore::open(parent.path(), layers()).expect("one adapter");
    assert_eq!(store.kinds().into_keys().map(|kind| kind.name().to_owned()).collect::<Vec<_>>(), ["two_sided_lora"]);
    let w0 = numbers(D * OUTPUTS, 7);
    let x: Vec<f64> = numbers(3 * D, 2).into_iter().map(f64::from).collect();
    for module in [Q, K] {
        // A bias is added as it is, which the kind says.
        let base = BaseWeight { d: D, k: OUTPUTS, values: w0.clone(), bias: Some(vec![0.5; OUTPUTS]) };
        let loaded = store.fold(module, &base).expect("it fits");
        let folded = &loaded["mine"].as_ref().expect("it adapts the module").folded;
        assert_eq!((folded.virtual_rows.len(), folded.low_rank.len()), (1, RANK));
        let matrix = |rows, columns, values: Vec<f64>| Value::matrix(rows, columns, values).expect("as many values");
        let base_value = matrix(D, OUTPUTS, w0.iter().map(|value| f64::from(*value)).collect());
        let found = folded.apply(&matrix(3, D, x.clone()), &base_value, None, Activation::Identity).expect("it fits");
        let dense = dense(module, &w0);
        for (index, found) in found.data().iter().enumerate() {
            let (row, output) = (index / OUTPUTS, index % OUTPUTS);
            let products = (0..D).map(|input| (x[row * D + input], dense[input * OUTPUTS + output]));
            let expected: f64 = products.clone().map(|(x, (weight, _))| x * weight).sum();
            let size: f64 = products.map(|(x, (_, size))| x.abs() * size).sum();
            let error = (found - expected).abs();
            // Two vectors meet in every product, each rounded to f32 once.
            assert!(error <= 2.0 * 2f64.powi(-24) * size, "{module} [{index}]: {error}");
        }
    }
}

#[test]
fn a_function_that_there_isn_t_is_named() {
    let line = "]\nderived = [{ operand = \"l\", shape = [\"D\"], function = \"leaden\", of = [\"a\"] }]\nscalars";
    let text = text().replace("]\nscalars", line);
    let tensor = text.lines().find(|line| line.contains("input_scale")).expect("the scale").to_owned();
    let description = KindDescription::parse(&text.replace(&tensor, "")).expect("a description");
    let mut layers = Layers::builtin().expect("the built-in kinds");
    let error = layers.register([], description).expect_err("no function is called so");
    assert!(matches!(&error, RegisterError::UnknownFunction { function, .. } if function == "leaden"), "{error}");
    assert!(error.to_string().contains("leading, tiled_identity"), "{error}");
}

/// A kind that PEFT doesn't have, by its text form and description alone: an elementwise product of two low-rank matrices.
#[test]
fn an_elementwise_product_is_registered_by_its_equation() {
    let mut layers = Layers::builtin().expect("the built-in kinds");
    let file = Path::new(env!("CARGO_MANIFEST_DIR")).join("../examples/kinds/abba.toml");
    layers.register_file(&file).expect("the example");
    let stored =
        |shape: [usize; 2], step| Operand { shape: shape.to_vec(), values: numbers(shape[0] * shape[1], step) };
    let factors = [("b", [D, RANK], 3), ("a", [RANK, OUTPUTS], 5), ("d", [D, RANK], 7), ("c", [RANK, OUTPUTS], 11)];
    let mut operands: BTreeMap<String, Operand> =
        factors.iter().map(|(name, shape, step)| ((*name).to_owned(), stored(*shape, *step))).collect();
    operands.insert("s".to_owned(), Operand { shape: Vec::new(), values: vec![1.5] });
    let kind = layers.kinds().kind_of_layer("abba").expect("it is registered");
    let modules = [(Q.to_owned(), AdapterModule { layer: "abba".to_owned(), rank: RANK, operands })];
    let adapter = AdapterFolder::new("mine", kind, modules.into());
    let parent = tempfile::tempdir().expect("a temporary folder");
    adapter.write(parent.path()).expect("a writable adapter");
    let store = AdapterStore::open(parent.path(), layers).expect("one adapter");
    let w0 = numbers(D * OUTPUTS, 13);
    let base = BaseWeight { d: D, k: OUTPUTS, values: w0.clone(), bias: None };
    let loaded = store.fold(Q, &base).expect("it fits");
    let folded = &loaded["mine"].as_ref().expect("it adapts the module").folded;
    assert_eq!((folded.virtual_rows.len(), folded.low_rank.len()), (1, RANK * RANK));
    let factor = |position: usize| {
        let (_, [_, columns], step) = factors[position];
        let values = numbers(factors[position].1.iter().product(), step);
        move |row: usize, column: usize| f64::from(values[row * columns + column])
    };
    let (b, a, d, c) = (factor(0), factor(1), factor(2), factor(3));
    for (input, output) in (0..D * OUTPUTS).map(|index| (index / OUTPUTS, index % OUTPUTS)) {
        let product = |one: &dyn Fn(usize, usize) -> f64, other: &dyn Fn(usize, usize) -> f64| {
            (0..RANK).map(|r| one(input, r) * other(r, output)).sum::<f64>()
        };
        let expected = 1.5 * product(&b, &a) * product(&d, &c);
        let pairs = folded.low_rank.iter();
        let found: f64 = pairs.map(|pair| f64::from(pair.shrink[input]) * f64::from(pair.expand[output])).sum();
        // Numbers of at most 17 eighths: products of four of them are far above the rounding of the vectors to f32.
        assert!((found - expected).abs() <= 1e-5, "[{input}, {output}]: {found} is not {expected}");
    }
}

#[test]
fn a_registered_kind_is_held_against_its_model() {
    let parent = tempfile::tempdir().expect("a temporary folder");
    let adapter = folder(parent.path());
    let model = |outputs: usize| {
        let matrix = |columns| Matrix { rows: outputs, columns, values: numbers(outputs * columns, 3) };
        let weights = [Q, K].map(|module| (format!("{module}.weight"), matrix(D)));
        let path = parent.path().join(format!("base-{outputs}.safetensors"));
        write_matrices(&path, &weights.into()).expect("a new file");
        Model::open(&path).expect("a model")
    };
    let layers = layers();
    let adapter = AdapterFolder::open(&adapter, layers.kinds()).expect("an adapter");
    assert_eq!(layers.prepare(&adapter, &model(OUTPUTS)).expect("it fits").modules.len(), 2);
    let message = layers.prepare(&adapter, &model(OUTPUTS + 1)).expect_err("another width").to_string();
    assert!(message.contains("[2, 4] where [2, 5]"), "{message}");
    // Without the kind, the folder says what is missing.
    let unknown = AdapterFolder::open(&parent.path().join("mine"), Layers::builtin().expect("built in").kinds());
    let message = unknown.expect_err("an unknown kind").to_string();
    assert!(message.contains("`TWO_SIDED_LORA` is not supported"), "{message}");
    // In memory, an adapter of a kind that these layers don't have is refused too.
    let foreign = Layers::builtin().expect("built in").prepare(&adapter, &model(OUTPUTS));
    assert!(matches!(foreign, Err(StoreError::UnknownLayer { layer, .. }) if layer == "two_sided_lora"));
}

#[test]
fn a_kind_whose_layer_is_written_in_rust_is_registered_with_it() {
    let description = |text: &str| KindDescription::parse(text).expect("a description");
    let whole = text();
    let (before, rest) = whole.split_once("equation = \"\"\"").expect("the example has an equation");
    let (equation, after) = rest.split_once("\"\"\"").expect("its end");
    let without = format!("{before}{after}");
    let layer = || verify(parse(equation).expect("the text form")).expect("an equation");
    let mut layers = Layers::builtin().expect("the built-in kinds");
    layers.register([layer()], description(&without)).expect("the equation that the description wants");
    assert!(layers.kinds().described("TWO_SIDED_LORA").is_some());

    let mut layers = Layers::builtin().expect("the built-in kinds");
    let missing = layers.register([], description(&without));
    assert!(matches!(missing, Err(RegisterError::NoEquation { layer }) if layer == "two_sided_lora"));
    for (equations, text) in [(vec![layer()], &whole), (vec![layer(), layer()], &without)] {
        assert!(matches!(layers.register(equations, description(text)), Err(RegisterError::ExtraEquation { .. })));
    }
    assert!(layers.kinds().described("TWO_SIDED_LORA").is_none(), "nothing is added by a refusal");
}

/// What is wrong with the example once `old` is `new`.
fn refusal(old: &str, new: &str) -> RegisterError {
    let text = text();
    assert!(text.contains(old), "{old}");
    let description = KindDescription::parse(&text.replacen(old, new, 1)).expect("a description");
    Layers::builtin().expect("the built-in kinds").register([], description).expect_err(new)
}

#[test]
fn descriptions_and_equations_that_disagree_are_refused() {
    use RegisterError as R;
    assert!(
        matches!(refusal("operand = \"g\"", "operand = \"h\""), R::UnknownOperand { operand, .. } if operand == "h")
    );
    assert!(matches!(refusal("operand = \"g\"", "operand = \"w0\""), R::UnknownOperand { .. }));
    assert!(matches!(
        refusal("    { operand = \"g\", names = [\"gate\"], stored = [\"K\"] },\n", ""),
        R::NoSource { operand, .. } if operand == "g"
    ));
    for (old, new) in [
        ("stored = [\"K\"] }", "stored = [\"D\"] }"),
        ("stored = [\"K\", \"R\"], transposed = true", "stored = [\"K\", \"R\"]"),
        ("stored = [\"R\", \"D\"], transposed = true", "stored = [\"K\", \"D\"], transposed = true"),
        ("a: adapter[R, K]", "a: adapter[R, K], q: adapter[K, K]"),
        ("s: adapter[]", "s: adapter[K]"),
        ("b: adapter[D, R], a: adapter[R, K]", "b: adapter[D, 2], a: adapter[2, K]"),
    ] {
        let error = refusal(old, new);
        // An operand that the output doesn't depend on is a mistake in the equation.
        assert!(matches!(error, R::Shape { .. } | R::Equation { .. }), "{new}: {error}");
    }
    assert!(matches!(refusal("bias = \"unscaled\"\n", ""), R::BiasUnsaid { .. }));
    assert!(matches!(refusal("layer two_sided_lora(", "layer other("), R::Name { name, .. } if name == "other"));
    assert!(matches!(refusal("g * ((l", "g * (((l"), R::Text { .. }));
    assert!(matches!(refusal("(l * x) @", "relu(l * x) @"), R::Equation { .. }));
    assert!(matches!(
        refusal("    g * ((l * x) @ (w0 + s * (b @ a)))", "    relu(g * ((l * x) @ (w0 + s * (b @ a))))"),
        R::Epilogue { .. }
    ));
    assert!(matches!(refusal("name = \"two_sided_lora\"", "name = \"two_sided_lora\"\nkind = \"lora\""), R::Kind(_)));
}

#[test]
fn a_file_that_cannot_be_used_is_named() {
    let folder = tempfile::tempdir().expect("a temporary folder");
    let path = folder.path().join("kind.toml");
    let mut layers = Layers::builtin().expect("the built-in kinds");
    let mut message = |text: Option<&str>| {
        if let Some(text) = text {
            std::fs::write(&path, text).expect("a new file");
        }
        let message = layers.register_file(&path).expect_err("no kind").to_string();
        assert!(message.contains("kind.toml"), "{message}");
        message
    };
    message(None);
    assert!(message(Some("peft_type = 3")).contains("peft_type"));
    assert!(message(Some(&"#".repeat(2 << 20))).contains("bytes"));
    assert!(message(Some(&text().replace("bias = \"unscaled\"", ""))).contains("what becomes of a bias"));
}

/// Which adapters would scale a bias follows from the equation and what the description says of it, not from a name.
#[test]
fn a_scaled_bias_is_refused_whatever_the_kind_is_called() {
    let operand = |shape: &[usize]| Operand { shape: shape.to_vec(), values: vec![0.5; shape.iter().product()] };
    let operands = [("b", &[2, 1][..]), ("a", &[1, 2]), ("s", &[]), ("l", &[2]), ("g", &[2])];
    let module = AdapterModule {
        layer: "two_sided_lora".to_owned(),
        rank: 1,
        operands: operands.map(|(name, shape)| (name.to_owned(), operand(shape))).into(),
    };
    for (bias, is_refused) in [("scaled", true), ("unscaled", false)] {
        let text = text().replace("bias = \"unscaled\"", &format!("bias = \"{bias}\""));
        let mut layers = Layers::builtin().expect("the built-in kinds");
        layers.register([], KindDescription::parse(&text).expect("a description")).expect("a kind");
        let kind = layers.kinds().kind_of_layer("two_sided_lora").expect("registered");
        let adapter = AdapterFolder::new("mine", kind, BTreeMap::from([("q".to_owned(), module.clone())]));
        let store = AdapterStore::from_folders(vec![adapter], layers).expect("one adapter");
        let fold = |bias| store.fold("q", &BaseWeight { d: 2, k: 2, values: vec![1.0; 4], bias });
        assert!(fold(None).is_ok());
        assert_eq!(matches!(fold(Some(vec![1.0; 2])), Err(StoreError::ScaledBias { .. })), is_refused, "{bias}");
    }
}
