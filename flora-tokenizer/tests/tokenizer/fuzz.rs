//! Arbitrary and mutated files: whatever they hold, an answer comes soon and is no panic.
//!
//! `FLORA_FUZZ_CASES` sets the cases per property (64 where it is not set); the seed is fixed.

use crate::files::{CONFIG, Source, folder, gguf_file};
use crate::mutation::{changed, changes, settings, soon};
use flora_tokenizer::{Conversation, Message, Next, Specials, Tokenizer};
use proptest::prelude::*;
use std::path::{Path, PathBuf};

const TEXT: &str = "hello wörld <|end|> 1234 'll\n\n  ä\u{301}👍🏽<|start|>!";

/// Opens `path` and uses everything of it.
fn use_tokenizer(path: &Path) {
    let Ok(tokenizer) = Tokenizer::open(path) else { return };
    let count = tokenizer.vocabulary();
    assert!(tokenizer.token_bytes().is_none_or(|bytes| bytes.len() == count));
    assert!(tokenizer.stop_tokens().iter().all(|token| (*token as usize) < count));
    for specials in [Specials::Parse, Specials::Plain] {
        if let Ok(tokens) = tokenizer.prompt(TEXT, specials) {
            assert!(tokens.iter().all(|token| (*token as usize) < count), "{tokens:?}");
            tokenizer.decode(&tokens);
        }
    }
    for next in [Next::Answer, Next::Anything, Next::Rest] {
        let _ = tokenizer.chat(&Conversation {
            messages: &[Message::text("user", TEXT)],
            next,
            variables: &serde_json::Map::new(),
        });
    }
}

fn source() -> Source {
    let template = "{% for m in messages %}{{ m.role + ': ' + m.content }}{% endfor %}{{ eos_token }}";
    Source { template: Some(template.into()), ..Source::small() }
}

/// The folder of small tokenizers.
fn texts() -> PathBuf {
    Path::new(env!("CARGO_MANIFEST_DIR")).join("../tests/golden/texts/tokenizers")
}

/// Pieces of Jinja in any order.
fn template() -> impl Strategy<Value = String> {
    let pieces = [
        "{%",
        "%}",
        "{{",
        "}}",
        "{#",
        "#}",
        "-",
        " ",
        "for m in messages",
        "endfor",
        "if",
        "else",
        "endif",
        "set x =",
        "macro f(a)",
        "endmacro",
        "f(f)",
        "m.content",
        "messages",
        "[0]",
        "[1:]",
        "|",
        "trim",
        "length",
        "join(x)",
        "'a'",
        "\"",
        "1",
        "*",
        "+",
        "~",
        "**",
        "==",
        "is defined",
        "range(9)",
        "namespace(n=1)",
        "raise_exception('x')",
        "(",
        ")",
        "\n",
        "loop.first",
        ".strip()",
        ".split('e')",
        "recursive",
        "loop(m)",
        "filter upper",
        "call f()",
        "include 'x'",
    ];
    prop::collection::vec(prop::sample::select(pieces.to_vec()), 0..40).prop_map(|pieces| pieces.concat())
}

proptest! {
    #![proptest_config(settings())]

    #[test]
    fn mutated_gguf(changes in changes()) {
        let (_guard, path) = gguf_file(&changed(&source().gguf().bytes().0, &changes));
        soon(|| use_tokenizer(&path));
    }

    #[test]
    fn mutated_folders(tokenizer in changes(), config in changes(), which in 1u8..4) {
        let json = source().json();
        let folder = folder(&[("tokenizer_config.json", CONFIG)]);
        let tokenizer = if which & 1 == 0 { json.into_bytes() } else { changed(json.as_bytes(), &tokenizer) };
        std::fs::write(folder.path().join("tokenizer.json"), tokenizer).expect("writing a mutation");
        if which & 2 != 0 {
            let config = changed(CONFIG.as_bytes(), &config);
            std::fs::write(folder.path().join("tokenizer_config.json"), config).expect("writing a mutation");
        }
        soon(|| use_tokenizer(folder.path()));
    }

    #[test]
    fn mutated_kinds(changes in changes(), kind in prop::sample::select(vec!["wordpiece", "unigram", "roberta", "word-ends"])) {
        let kind = texts().join(kind);
        let json = std::fs::read(kind.join("tokenizer.json")).expect("a golden tokenizer");
        let folder = tempfile::tempdir().expect("a temporary folder");
        std::fs::copy(kind.join("tokenizer_config.json"), folder.path().join("tokenizer_config.json")).expect("a copy");
        std::fs::write(folder.path().join("tokenizer.json"), changed(&json, &changes)).expect("writing a mutation");
        soon(|| use_tokenizer(folder.path()));
    }

    #[test]
    fn mutated_sentencepiece(changes in changes()) {
        let model = std::fs::read(texts().join("sentencepiece/tokenizer.model")).expect("a golden model");
        let folder = tempfile::tempdir().expect("a temporary folder");
        std::fs::write(folder.path().join("tokenizer.model"), changed(&model, &changes)).expect("writing a mutation");
        soon(|| use_tokenizer(folder.path()));
    }

    #[test]
    fn arbitrary_patterns(pattern in "[a-z.*+?(){}|\\\\^$=!<0-9\\[\\]-]{0,30}", invert in any::<bool>()) {
        let pattern = serde_json::Value::from(pattern);
        let split = format!(r#"{{"type": "Split", "pattern": {{"Regex": {pattern}}}, "behavior": "Isolated", "invert": {invert}}}"#);
        let json = source().json().replace(r#"{"type": "Digits", "individual_digits": true}"#, &split);
        let folder = folder(&[("tokenizer.json", &json)]);
        soon(|| use_tokenizer(folder.path()));
    }

    #[test]
    fn arbitrary_templates(template in template()) {
        let (_guard, path) = gguf_file(&Source { template: Some(template), ..Source::small() }.gguf().bytes().0);
        soon(|| use_tokenizer(&path));
    }
}

#[test]
fn the_files_that_are_mutated_are_whole() {
    let (_guard, path) = gguf_file(&source().gguf().bytes().0);
    let tokenizer = Tokenizer::open(&path).expect("a tokenizer");
    assert_eq!(
        tokenizer
            .chat(&Conversation {
                messages: &[Message::text("user", "x")],
                next: Next::Answer,
                variables: &serde_json::Map::new(),
            })
            .expect("a text"),
        "user: x<|end|>"
    );
    let folder = folder(&[("tokenizer.json", &source().json()), ("tokenizer_config.json", CONFIG)]);
    assert!(Tokenizer::open(folder.path()).is_ok());
}
