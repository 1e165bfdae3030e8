//! Files that are wrong or say what isn't supported: each mistake is named.

use crate::files::{CONFIG, Source, folder, gguf_file};
use crate::gguf_writer::{File, Value};
use flora_tokenizer::{Specials, Tokenizer};

fn set(file: &mut File, key: &str, value: Option<Value>) {
    file.metadata.retain(|(name, _)| name != key);
    file.metadata.extend(value.map(|value| (key.to_string(), value)));
}

fn gguf_error(file: &File) -> String {
    let (_guard, path) = gguf_file(&file.bytes().0);
    Tokenizer::open(&path).expect_err("a mistake").to_string()
}

#[test]
fn mistakes_in_a_gguf_are_named() {
    let types = |kinds: &[i32]| {
        let mut bytes = 5u32.to_le_bytes().to_vec();
        bytes.extend((kinds.len() as u64).to_le_bytes());
        bytes.extend(kinds.iter().flat_map(|kind| kind.to_le_bytes()));
        Some(Value::raw(9, &bytes))
    };
    let count = Source::small().tokens().len();
    let text = |text| Some(Value::string(text));
    let cases: Vec<(&str, Option<Value>, &str)> = vec![
        ("tokenizer.ggml.model", None, "its metadata has no `tokenizer.ggml.model`"),
        ("tokenizer.ggml.model", text("llama"), "is `llama` (SentencePiece"),
        ("tokenizer.ggml.model", Some(Value::u32(1)), "is not a text"),
        ("tokenizer.ggml.pre", None, "convert the model again"),
        ("tokenizer.ggml.pre", text("nobody-s"), "is `nobody-s`, a way to cut texts that is not known"),
        ("tokenizer.ggml.tokens", None, "is missing"),
        ("tokenizer.ggml.tokens", text("a"), "is not a list"),
        ("tokenizer.ggml.tokens", Some(Value::strings(&[])), "types for 0 tokens"),
        ("tokenizer.ggml.tokens", types(&vec![1; count]), "holds what is no text"),
        ("tokenizer.ggml.token_type", None, "is missing"),
        ("tokenizer.ggml.token_type", types(&[1, 1]), "has 2 types for 267 tokens"),
        ("tokenizer.ggml.token_type", types(&vec![6; count]), "has the types 1 to 5"),
        ("tokenizer.ggml.merges", Some(Value::strings(&["h e", "he"])), "merge 1 is \"he\""),
        ("tokenizer.ggml.merges", Some(Value::strings(&["h e l"])), "merge 0 is \"h e l\""),
        ("tokenizer.ggml.merges", Some(Value::strings(&["h  e"])), "two tokens with a space"),
        ("tokenizer.ggml.merges", Some(Value::strings(&["q q"])), "needs the token \"qq\""),
        ("tokenizer.ggml.merges", Some(Value::strings(&["h nothing"])), "needs the token \"nothing\""),
        ("tokenizer.ggml.merges", Some(Value::strings(&["<|end|> h"])), "needs the token \"<|end|>\""),
        ("tokenizer.ggml.eos_token_id", Some(Value::u32(267)), "is 267, but there are 267 tokens"),
        ("tokenizer.ggml.bos_token_id", Some(Value::u32(u32::MAX)), "but there are 267 tokens"),
        ("tokenizer.ggml.bos_token_id", text("<|end|>"), "is not the id of a token"),
        ("tokenizer.ggml.add_bos_token", Some(Value::raw(7, &[1])), "is missing, though prompts are to start with it"),
        ("tokenizer.ggml.add_bos_token", text("yes"), "neither true nor false"),
        ("tokenizer.chat_template", Some(Value::u32(3)), "is not a text"),
    ];
    for (key, value, expected) in cases {
        let mut file = Source::small().gguf();
        set(&mut file, key, value);
        let error = gguf_error(&file);
        assert!(error.contains(expected) && error.contains("model.gguf"), "{key}: {error}");
    }
    let mut source = Source::small();
    source.characters[5] = source.characters[4].clone();
    assert!(gguf_error(&source.gguf()).contains("is there twice, as 6 and as 7"));
    source.characters[5] = "€".into();
    assert!(gguf_error(&source.gguf()).contains("the token 7, \"€\", holds characters that stand for no byte"));
}

#[test]
fn mistakes_in_a_folder_are_named() {
    let json = Source::small().json();
    let cases = [
        (r#""type": "BPE""#, r#""type": "WordPiece""#, "`model.type` is `WordPiece`"),
        (r#""byte_fallback": false"#, r#""byte_fallback": true"#, "byte_fallback"),
        (r#""unk_token": null"#, r#""continuing_subword_prefix": "zzzzzzzz""#, "continuing_subword_prefix"),
        (r#""dropout": null"#, r#""dropout": 0.5"#, "random"),
        (r#""normalizer": null"#, r#""normalizer": {"type": "Lowercase"}"#, "unknown variant `Lowercase`"),
        (r#""normalizer": null"#, r#""normalizer": {}"#, "missing field `type`"),
        (r#"{"type": "Digits", "individual_digits": true}"#, r#"{"type": "Metaspace"}"#, "unknown variant `Metaspace`"),
        (
            r#"{"type": "Digits", "individual_digits": true}"#,
            r#"{"type": "ByteLevel", "add_prefix_space": false}"#,
            "one ByteLevel",
        ),
        (r#""add_prefix_space": false"#, r#""add_prefix_space": true"#, "`add_prefix_space`"),
        (r#""decoder": {"type": "ByteLevel""#, r#""decoder": {"type": "Fuse""#, "unknown variant `Fuse`"),
        (
            r#"{"type": "Digits", "individual_digits": true}"#,
            r#"{"type": "Split", "pattern": {"Regex": "(a"}, "behavior": "Isolated"}"#,
            "has a bad pattern",
        ),
        (
            r#""post_processor": null"#,
            r#""post_processor": {"type": "TemplateProcessing", "single": [{"Sequence": {"id": "A", "type_id": 0}}, {"SpecialToken": {"id": "<|end|>", "type_id": 0}}]}"#,
            "does more than to put one token before a text",
        ),
        (
            r#""post_processor": null"#,
            r#""post_processor": {"type": "TemplateProcessing", "single": [{"SpecialToken": {"id": "<x>"}}, {"Sequence": {}}]}"#,
            "puts \"<x>\" first, which is no added token",
        ),
        (r#""A": 34"#, r#""A": 35"#, "the id 35 stands for"),
        (r#""A": 34"#, r#""A": 4294967295"#, "at most 2097152 tokens"),
        (r#""A": 34"#, r#""A": -1"#, "invalid value"),
        (r#""A": 34"#, r#""€": 34"#, "stand for no byte"),
        (r#""id": 1, "content": "<|start|>""#, r#""id": 1, "content": "<|end|>""#, "the id 1 stands for"),
        (r#""h e""#, r#"["h", "q"]"#, "needs the token \"hq\""),
        (r#""h e""#, r#"["h"]"#, "tokenizer.json"),
        (r#""model""#, r#""modell""#, "missing field `model`"),
    ];
    for (from, to, expected) in cases {
        assert!(json.contains(from), "{from}");
        let folder = folder(&[("tokenizer.json", &json.replacen(from, to, 1)), ("tokenizer_config.json", CONFIG)]);
        let error = Tokenizer::open(folder.path()).expect_err(to).to_string();
        assert!(error.contains(expected) && error.contains("tokenizer.json"), "{to}: {error}");
    }
    let empty = folder(&[]);
    assert!(Tokenizer::open(empty.path()).expect_err("no tokenizer").to_string().contains("has no tokenizer.json"));
    assert!(Tokenizer::open(&empty.path().join("x.gguf")).expect_err("no file").to_string().contains("cannot open"));
    let wrong = folder(&[("tokenizer.json", &json), ("tokenizer_config.json", r#"{"eos_token": 3}"#)]);
    assert!(Tokenizer::open(wrong.path()).expect_err("a number").to_string().contains("tokenizer_config.json"));
    let wrong = folder(&[("tokenizer.json", &json), ("generation_config.json", r#"{"eos_token_id": [0, 300]}"#)]);
    assert!(Tokenizer::open(wrong.path()).expect_err("no such token").to_string().contains("is 300"));
}

#[test]
fn a_folder_says_what_prompts_begin_with_and_what_ends_them() {
    let processor = r#""post_processor": {"type": "Sequence", "processors": [{"type": "ByteLevel"}, {"type": "TemplateProcessing",
 "single": [{"SpecialToken": {"id": "<|start|>", "type_id": 0}}, {"Sequence": {"id": "A", "type_id": 0}}], "pair": [],
 "special_tokens": {}}]}"#;
    let json = Source::small().json().replace(r#""post_processor": null"#, processor);
    let generation = r#"{"eos_token_id": [5, 0, 7]}"#;
    let files =
        [("tokenizer.json", &json[..]), ("tokenizer_config.json", CONFIG), ("generation_config.json", generation)];
    let folder = folder(&files);
    // A file of the model leads to its folder.
    std::fs::write(folder.path().join("model.safetensors"), "").expect("writing a file");
    for path in [folder.path().to_owned(), folder.path().join("model.safetensors")] {
        let tokenizer = Tokenizer::open(&path).expect("a tokenizer");
        let text = tokenizer.encode("hello", Specials::Plain).expect("tokens");
        assert_eq!(tokenizer.prompt("hello", Specials::Plain).expect("tokens"), [&[1][..], &text].concat());
        assert_eq!(tokenizer.stop_tokens(), [0, 5, 7]);
    }
}

#[test]
fn a_gguf_s_ways_to_cut_texts_differ_where_they_should() {
    let cases = [
        ("gpt-2", "12 a", 3),
        ("smollm", "12 a", 4),
        ("refact", "12 a", 4),
        ("starcoder", "12 a", 4),
        ("llama-bpe", "12 a", 3),
        ("default", "12 a", 3),
    ];
    for (pre, text, count) in cases {
        let mut file = Source { pre, ..Source::small() }.gguf();
        file.metadata.push(("tokenizer.ggml.add_bos_token".into(), Value::raw(7, &[0])));
        let (_guard, path) = gguf_file(&file.bytes().0);
        let tokenizer = Tokenizer::open(&path).expect("a tokenizer");
        assert_eq!(tokenizer.encode(text, Specials::Plain).expect("tokens").len(), count, "{pre}");
    }
}
