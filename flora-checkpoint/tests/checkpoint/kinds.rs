//! Kinds that flora doesn't have, described as data: what is read, written and refused.

use crate::mutation::{changed, changes, settings, soon};
use crate::peft::{Shaped, folder};
use flora_checkpoint::{
    AdapterError, AdapterFolder, AdapterKinds, AdapterModule, KindDescription, KindError, KindProblem, Operand,
};
use proptest::prelude::*;

/// A kind with every sort of statement: a choice, a list of modules, numbers over the rank, a tensor that may be missing, extents
/// of 1, a scalar that is stored.
pub(crate) const GATED: &str = r#"
peft_type = "GATED"
rank = { option = "r", patterns = "ranks" }

[[layers]]
name = "gated"
when = { tied = false }
bias = "unscaled"
tensors = [
    { operand = "b", names = ["down.weight", "down"], stored = ["R", "D"], transposed = true },
    { operand = "a", names = ["up.weight"], stored = ["R", "K"] },
    { operand = "g", names = ["gate"], stored = [1, "K"], default = 1.0 },
    { operand = "t", names = ["temperature"], stored = [1] },
]
scalars = [
    { operand = "s", option = "strength", patterns = "strengths", over = "rank", root = "softly", default = 4.0 },
    { operand = "u", option = "offset" },
]

[[layers]]
name = "gated_input"
kind = "gated"
when = { tied = false }
modules = "input_modules"
tensors = [{ operand = "g", names = ["gate"], stored = ["D", 1] }]

[[layers]]
name = "tied"
when = { tied = true }
tensors = [{ operand = "g", names = ["gate"], stored = ["D"] }]

[options]
epochs = "harmless"
layers_to_transform = "read"
shuffle = { refused = { because = "it shuffles the inputs", unless = ["none"] } }
"#;

pub(crate) const CONFIG: &str = r#"{"peft_type": "GATED", "target_modules": ["q"], "r": 2, "strengths": {"q": 6}, "offset": 0.5,
 "input_modules": [], "tied": false, "epochs": 3, "shuffle": "none", "ranks": {"z": 3}}"#;

pub(crate) const TENSORS: &[Shaped] =
    &[("q.down.weight", &[2, 5]), ("q.up.weight", &[2, 3]), ("q.gate", &[1, 3]), ("q.temperature", &[1])];

pub(crate) fn kinds() -> AdapterKinds {
    let mut kinds = AdapterKinds::builtin();
    kinds.register(KindDescription::parse(GATED).expect("a description")).expect("names of its own");
    kinds
}

fn open(config: &str, tensors: &[Shaped]) -> Result<AdapterFolder, AdapterError> {
    AdapterFolder::open(folder(config, tensors).path(), &kinds())
}

#[test]
fn a_described_kind_is_read_as_described() {
    let adapter = open(CONFIG, TENSORS).expect("an adapter");
    let AdapterModule { layer, rank, operands } = &adapter.modules["q"];
    assert_eq!((adapter.kind.name(), &layer[..], *rank), ("gated", "gated", 2));
    let operand = |name: &str| (&operands[name].shape[..], &operands[name].values[..]);
    let b = [1.0, 6.0, 2.0, 7.0, 3.0, 8.0, 4.0, 9.0, 5.0, 10.0];
    assert_eq!(operand("b"), (&[5, 2][..], &b[..]));
    assert_eq!(operand("a"), (&[2, 3][..], &[1.0, 2.0, 3.0, 4.0, 5.0, 6.0][..]));
    assert_eq!(operand("g"), (&[3][..], &[1.0, 2.0, 3.0][..]));
    assert_eq!(operand("t"), (&[][..], &[1.0][..]));
    assert_eq!(operand("s"), (&[][..], &[3.0][..]));
    assert_eq!(operand("u"), (&[][..], &[0.5][..]));

    // What is missing has its default, and a flag makes √r of r.
    let config = CONFIG.replace(r#""strengths": {"q": 6}"#, r#""softly": true"#);
    let without = [TENSORS[0], TENSORS[1], TENSORS[3]];
    let adapter = open(&config, &without).expect("an adapter");
    assert_eq!(adapter.modules["q"].operands["g"], Operand { shape: vec![3], values: vec![1.0; 3] });
    assert_eq!(adapter.modules["q"].operands["s"].values, [(4.0 / 2f64.sqrt()) as f32]);

    let listed = open(&CONFIG.replace(r#""input_modules": []"#, r#""input_modules": ["q"]"#), &[("q.gate", &[5, 1])]);
    assert_eq!(listed.expect("an adapter").modules["q"].layer, "gated_input");
    let tied = open(&CONFIG.replace(r#""tied": false"#, r#""tied": true"#), &[("q.gate", &[5])]).expect("an adapter");
    assert_eq!((tied.kind.name(), &tied.modules["q"].layer[..]), ("tied", "tied"));
}

#[test]
fn what_is_written_is_read_back() {
    let adapter = open(CONFIG, TENSORS).expect("an adapter");
    let parent = tempfile::tempdir().expect("a temporary folder");
    let written = adapter.write(parent.path()).expect("a writable adapter");
    let again = AdapterFolder::open(&written, &kinds()).expect("what was written");
    assert_eq!((again.kind, again.modules), (adapter.kind, adapter.modules));
}

#[test]
fn mistakes_in_a_folder_are_named() {
    let cases: &[(&str, &str, &[Shaped], &str)] = &[
        ("\"r\": 2", "\"r\": 3", TENSORS, "has rank 2 where `r` says 3"),
        (r#""ranks": {"z": 3}"#, r#""ranks": {"q": 3}"#, TENSORS, "`ranks` says 3"),
        (r#""offset": 0.5,"#, "", TENSORS, "`offset` is missing"),
        (r#""offset": 0.5"#, r#""offset": "x""#, TENSORS, "`offset` is \"x\""),
        (r#""shuffle": "none""#, r#""shuffle": "all""#, TENSORS, "`shuffle` = \"all\" is not supported: it shuffles"),
        (r#""epochs": 3"#, r#""epoch": 3"#, TENSORS, "`epoch` = 3 is unknown"),
        (r#""tied": false"#, r#""tied": 1"#, TENSORS, "`tied` is 1"),
        ("GATED", "GRATED", TENSORS, "BOFT, RANDLORA, GATED"),
        ("", "", &TENSORS[..3], "`base_model.model.q.temperature` is missing, which gated needs for module `q`"),
        ("", "", &[TENSORS[0], TENSORS[1], ("q.gate", &[1, 4]), TENSORS[3]], "where [1, 3], the outputs of `up`"),
        ("", "", &[TENSORS[0], ("q.up.weight", &[3, 3]), TENSORS[2], TENSORS[3]], "has rank 3"),
        ("", "", &[TENSORS[0], TENSORS[1], ("q.gate", &[3]), TENSORS[3]], "[1, K]"),
        ("", "", &[TENSORS[0], TENSORS[1], TENSORS[2], TENSORS[3], ("q.down", &[2, 5])], "says the same as"),
        ("[]", "[\"q\"]", &[("q.gate", &[5, 1]), TENSORS[3]], "is no part of a module of the layer `gated_input`"),
        (r#""input_modules": [], "#, "", &[("q.gate", &[2, 2])], "[1, K] or [D, 1]"),
        (r#""input_modules": [], "#, "", &[("q.temperature", &[2])], "[1]"),
    ];
    for (old, new, tensors, expected) in cases {
        let message = open(&CONFIG.replace(old, new), tensors).expect_err(expected).to_string();
        assert!(message.contains(expected), "{expected}: {message}");
    }
}

/// A kind with a tensor of all modules, which a function reads.
const SHARING: &str = r#"
peft_type = "SHARING"
[[layers]]
name = "sharing"
tensors = [
    { operand = "b", names = ["down"], stored = ["D", "R"] },
    { operand = "p", names = ["bank"], stored = ["*", "R"], shared = true },
]
derived = [{ operand = "a", shape = ["R", "K"], function = "f", of = ["p"] }]
"#;

#[test]
fn contradictions_of_what_functions_read_are_named() {
    use KindProblem as P;
    KindDescription::parse(SHARING).expect("a description");
    let problem = |old: &str, new: &str| match KindDescription::parse(&SHARING.replacen(old, new, 1)).expect_err(new) {
        KindError::Inconsistent { problem, .. } => problem,
        other => panic!("{other}"),
    };
    assert!(matches!(problem("of = [\"p\"]", "of = [\"q\"]"), P::NoInput { input, .. } if input == "q"));
    assert!(matches!(problem("of = [\"p\"]", "of = [\"a\"]"), P::NoInput { .. }), "nothing is made of itself");
    assert!(matches!(problem("of = [\"p\"]", "of = [\"b\"]"), P::Shape { .. }), "no function reads the bank");
    assert!(matches!(problem("\"*\", \"R\"", "\"D\", \"R\""), P::Number { .. }), "D is of one module");
    assert!(matches!(problem("[\"R\", \"K\"]", "[\"R\", \"*\"]"), P::Shape { .. }), "what is made has a shape");
    assert!(matches!(problem("operand = \"a\"", "operand = \"b\""), P::OperandTwice { .. }));
    for more in ["optional = true", "init = \"zeros\""] {
        let new = format!("stored = [\"D\", \"R\"], {more} }}");
        assert!(matches!(problem("stored = [\"D\", \"R\"] }", &new), P::Number { .. }), "{more}");
    }
}

#[test]
fn contradictions_in_a_description_are_named() {
    let problem = |old: &str, new: &str| {
        assert!(GATED.contains(old), "{old}");
        let error = KindDescription::parse(&GATED.replacen(old, new, 1)).expect_err(new);
        let KindError::Inconsistent { problem, .. } = error else { panic!("{new}: {error}") };
        problem
    };
    use KindProblem as P;
    assert!(matches!(problem("\"GATED\"", "\"\""), P::Name { what: "a `peft_type`", .. }));
    assert!(matches!(problem("name = \"tied\"", "name = \"gated\""), P::LayerTwice(name) if name == "gated"));
    assert!(matches!(problem("operand = \"a\"", "operand = \"b\""), P::OperandTwice { .. }));
    assert!(matches!(problem("operand = \"u\"", "operand = \"b\""), P::OperandTwice { .. }));
    assert!(matches!(problem("\"up.weight\"", "\"down.weight\""), P::AmbiguousName { .. }));
    assert!(matches!(problem("\"up.weight\"", "\"weight\""), P::AmbiguousName { .. }));
    assert!(matches!(problem("\"up.weight\"", "\".up\""), P::TensorName { .. }));
    assert!(matches!(problem("[\"up.weight\"]", "[]"), P::TensorName { .. }));
    assert!(matches!(problem("[\"R\", \"K\"]", "[\"R\", \"K\", 2]"), P::Shape { .. }));
    assert!(matches!(problem("[\"R\", \"K\"]", "[\"R\", \"Q\"]"), P::Shape { .. }), "components are made, not stored");
    assert!(matches!(problem("[\"R\", \"K\"]", "[\"R\", \"*\"]"), P::Shape { .. }), "no function reads it");
    assert!(matches!(problem("stored = [1] }", "stored = [1], transposed = true }"), P::Shape { .. }));
    assert!(matches!(problem("stored = [\"R\", \"K\"]", "stored = [\"R\", 3]"), P::UnknownExtent { .. }));
    assert!(matches!(problem("default = 1.0", "default = nan"), P::Number { .. }));
    assert!(matches!(
        problem("[\"R\", \"K\"] }", "[\"R\", \"K\"], default = 0.0 }"),
        P::UnknownExtent { .. } | P::Number { .. }
    ));
    assert!(matches!(problem("over = \"rank\", root", "root"), P::Number { .. }));
    for start in ["\"column_norms\"", "{ first = \"ones\", others = \"column_norms\" }"] {
        let stored = format!("[\"R\", \"K\"], init = {start} }}");
        assert!(matches!(problem("[\"R\", \"K\"] }", &stored), P::Number { .. }));
    }
    for start in ["init = \"rank\"", "reference = { first = \"ones\", others = \"zeros\" }"] {
        let stored = format!("stored = [1], {start} }}");
        assert!(matches!(problem("stored = [1] }", &stored), P::Number { .. }));
    }
    assert!(matches!(problem("option = \"offset\"", "option = \"r\""), P::OptionTwice { .. }));
    assert!(matches!(problem("option = \"offset\"", "option = \"target_modules\""), P::OptionTwice { .. }));
    assert!(matches!(problem("epochs =", "tied ="), P::OptionTwice { .. }));
    assert!(matches!(problem("epochs = \"harmless\"", "epochs = \"read\""), P::NotRead(_)));
    assert!(matches!(problem("tied = true", "tied = \"yes\""), P::MixedChoice(_)));
    assert!(matches!(problem("tied = true", "tied = false"), P::Selection { .. }));
    assert!(matches!(problem("modules = \"input_modules\"\n", ""), P::Selection { .. }));
    assert!(matches!(problem("kind = \"gated\"\n", ""), P::Selection { .. }));
    assert!(matches!(problem("stored = [\"D\"] }]", "stored = [\"D\"], default = 1.0 }]"), P::NoTensor(_)));

    for (old, new) in
        [("[\"R\", \"K\"]", "[\"R\", \"Z\"]"), ("[\"R\", \"K\"]", "[0]"), ("epochs", "= 1"), ("names", "name")]
    {
        let error = KindDescription::parse(&GATED.replacen(old, new, 1)).expect_err(new);
        assert!(matches!(error, KindError::Text(_)), "{new}: {error}");
    }
    let long = format!("#{}", "x".repeat(1 << 20));
    assert!(matches!(KindDescription::parse(&long), Err(KindError::TooLong { .. })));
}

#[test]
fn names_of_other_kinds_are_taken() {
    let register = |old: &str, new: &str| {
        let description = KindDescription::parse(&GATED.replace(old, new)).expect("a description");
        AdapterKinds::builtin().register(description)
    };
    assert_eq!(register("", ""), Ok(()));
    for (old, new, expected) in [
        ("\"GATED\"", "\"LORA\"", "peft_type"),
        ("\"gated_input\"", "\"ia3\"", "layer"),
        ("name = \"tied\"", "name = \"tied\"\nkind = \"dora\"", "kind"),
    ] {
        assert!(matches!(register(old, new), Err(KindError::Taken { what, .. }) if what == expected), "{new}");
    }
    let twice = kinds().register(KindDescription::parse(GATED).expect("a description"));
    assert!(matches!(twice, Err(KindError::Taken { what: "peft_type", .. })));
}

proptest! {
    #![proptest_config(settings())]

    #[test]
    fn mutated_descriptions(changes in changes()) {
        let text = String::from_utf8_lossy(&changed(GATED.as_bytes(), &changes)).into_owned();
        soon(|| {
            let Ok(description) = KindDescription::parse(&text) else { return };
            // What is accepted can be registered, and reads a folder or refuses it.
            let mut kinds = AdapterKinds::builtin();
            if kinds.register(description).is_ok() {
                let _ = AdapterFolder::open(folder(CONFIG, TENSORS).path(), &kinds);
            }
        });
    }
}
