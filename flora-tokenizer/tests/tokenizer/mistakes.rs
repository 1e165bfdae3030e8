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
        (
            "tokenizer.ggml.model",
            text("t5"),
            "is `t5`; `gpt2` (byte-level BPE) and `llama` (SentencePiece) are supported",
        ),
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
        (r#""type": "BPE""#, r#""type": "Oracle""#, "tokenizer.json"),
        (r#""dropout": null"#, r#""dropout": 0.5"#, "random"),
        (r#""normalizer": null"#, r#""normalizer": {}"#, "tokenizer.json"),
        (r#""normalizer": null"#, r#""normalizer": {"type": "Shout"}"#, "tokenizer.json"),
        (
            r#"{"type": "Digits", "individual_digits": true}"#,
            r#"{"type": "Split", "pattern": {"Regex": "(a"}, "behavior": "Isolated", "invert": false}"#,
            "tokenizer.json",
        ),
        (
            r#""post_processor": null"#,
            r#""post_processor": {"type": "TemplateProcessing", "single": [{"SpecialToken": {"id": "<x>"}}, {"Sequence": {}}]}"#,
            "tokenizer.json",
        ),
        (r#""A": 34"#, r#""A": 35"#, "the id 35 stands for"),
        (r#""A": 34"#, r#""A": 4294967295"#, "at most 2097152 tokens"),
        (r#""A": 34"#, r#""A": -1"#, "tokenizer.json"),
        (
            r#""id": 1, "content": "<|start|>""#,
            r#""id": 1, "content": "<|end|>""#,
            "the added token \"<|end|>\" has the id 1",
        ),
        (
            r#""id": 1, "content": "<|start|>""#,
            r#""id": 7, "content": "<|new|>""#,
            "the added token \"<|new|>\" has the id 7",
        ),
        (r#""h e""#, r#"["h", "q"]"#, "tokenizer.json"),
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
    assert!(
        Tokenizer::open(empty.path())
            .expect_err("no tokenizer")
            .to_string()
            .contains("has no tokenizer.json and no tokenizer.model")
    );
    assert!(Tokenizer::open(&empty.path().join("x.gguf")).expect_err("no file").to_string().contains("cannot open"));
    let wrong = folder(&[("tokenizer.json", &json), ("tokenizer_config.json", r#"{"eos_token": 3}"#)]);
    assert!(Tokenizer::open(wrong.path()).expect_err("a number").to_string().contains("tokenizer_config.json"));
    let wrong = folder(&[("tokenizer.json", &json), ("generation_config.json", r#"{"eos_token_id": [0, 300]}"#)]);
    assert!(Tokenizer::open(wrong.path()).expect_err("no such token").to_string().contains("is 300"));
}

#[test]
fn what_would_cost_too_much_is_refused() {
    let json = Source::small().json();
    let replace = |content: &str| {
        format!(r#""normalizer": {{"type": "Replace", "pattern": {{"String": "a"}}, "content": "{content}"}}"#)
    };
    let step = r#"{"type": "NFC"}"#;
    let cases = [
        (r#""normalizer": null"#, replace(&"b".repeat(17)), "makes texts 17 times longer"),
        (r#""normalizer": null"#, replace(&"b".repeat(5000)), "times longer"),
        (
            r#""normalizer": null"#,
            format!(r#""normalizer": {{"type": "Sequence", "normalizers": [{}]}}"#, vec![step; 64].join(",")),
            "more than 64 steps",
        ),
        (
            r#"{"type": "Digits", "individual_digits": true}"#,
            format!(
                r#"{{"type": "Split", "pattern": {{"Regex": "{}"}}, "behavior": "Isolated", "invert": false}}"#,
                "a".repeat(5000)
            ),
            "a text of 5000 bytes",
        ),
        (
            r#""type": "BPE", "dropout": null"#,
            r#""type": "WordPiece", "max_input_chars_per_word": 1000000"#.to_owned(),
            "words of 1000000 characters",
        ),
    ];
    for (from, to, expected) in cases {
        assert!(json.contains(from), "{from}");
        let folder = folder(&[("tokenizer.json", &json.replacen(from, &to, 1))]);
        let error = Tokenizer::open(folder.path()).expect_err(expected).to_string();
        assert!(error.contains(expected) && error.contains("tokenizer.json"), "{error}");
    }
}

#[test]
fn what_ends_a_text_is_found_wherever_files_say_it() {
    let json = Source::small().json();
    let open = |files: &[(&str, &str)]| {
        let files: Vec<_> = [("tokenizer.json", &json[..])].into_iter().chain(files.iter().copied()).collect();
        Tokenizer::open(folder(&files).path()).expect("a tokenizer").stop_tokens()
    };
    let config = r#"{"eos_token_id": [7, 9], "model_type": "llama"}"#;
    assert_eq!(open(&[("config.json", config)]), [7, 9]);
    assert_eq!(open(&[("config.json", r#"{"eos_token_id": 7}"#)]), [7]);
    assert_eq!(open(&[("config.json", config), ("generation_config.json", "{}")]), [7, 9]);
    // What is said of generation counts before what is said of the model.
    assert_eq!(open(&[("config.json", config), ("generation_config.json", r#"{"eos_token_id": 8}"#)]), [8]);
    // By its name, though it is no added token.
    assert_eq!(open(&[("tokenizer_config.json", r#"{"eos_token": "A"}"#)]), [34]);
    assert_eq!(open(&[("tokenizer_config.json", CONFIG)]), [0]);
    assert_eq!(open(&[("tokenizer_config.json", r#"{"eos_token": "<|nowhere|>"}"#)]), [0u32; 0]);
}

#[test]
fn a_gguf_ends_a_turn_at_control_tokens_of_known_names() {
    let mut source = Source::small();
    source.controls = ["<|end_of_text|>", "<|start|>", "<|eot_id|>", "<|im_end|>", "<|else|>"].map(String::from).into();
    let (_guard, path) = gguf_file(&source.gguf().bytes().0);
    assert_eq!(Tokenizer::open(&path).expect("a tokenizer").stop_tokens(), [0, 2, 3]);
    // A text that is written like one is none.
    source.controls.truncate(2);
    source.characters.push("<|eot_id|>".into());
    let (_guard, path) = gguf_file(&source.gguf().bytes().0);
    assert_eq!(Tokenizer::open(&path).expect("a tokenizer").stop_tokens(), [0]);
}

#[test]
fn a_folder_says_what_prompts_begin_with_and_what_ends_them() {
    let processor = r#""post_processor": {"type": "Sequence", "processors": [
 {"type": "ByteLevel", "add_prefix_space": false, "trim_offsets": false, "use_regex": true}, {"type": "TemplateProcessing",
 "single": [{"SpecialToken": {"id": "<|start|>", "type_id": 0}}, {"Sequence": {"id": "A", "type_id": 0}}], "pair": [],
 "special_tokens": {"<|start|>": {"id": "<|start|>", "ids": [1], "tokens": ["<|start|>"]}}}]}"#;
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
        ("qwen2", "12 a", 4),
        ("tekken", "12 a", 4),
    ];
    for (pre, text, count) in cases {
        let mut file = Source { pre, ..Source::small() }.gguf();
        file.metadata.push(("tokenizer.ggml.add_bos_token".into(), Value::raw(7, &[0])));
        let (_guard, path) = gguf_file(&file.bytes().0);
        let tokenizer = Tokenizer::open(&path).expect("a tokenizer");
        assert_eq!(tokenizer.encode(text, Specials::Plain).expect("tokens").len(), count, "{pre}");
    }
}
