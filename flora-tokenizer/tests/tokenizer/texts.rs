//! Small tokenizers of many kinds, and chat templates, against what `transformers` makes of them (`tests/golden/make_texts.py`).

use crate::files::gguf_file;
use crate::gguf_writer::{File, Value};
use chrono::{NaiveDate, NaiveDateTime};
use flora_tokenizer::{Content, Conversation, Message, Next, Specials, Tokenizer};
use serde::Deserialize;
use serde_json::Map;
use std::collections::BTreeMap;
use std::path::{Path, PathBuf};

fn golden(name: &str) -> PathBuf {
    Path::new(env!("CARGO_MANIFEST_DIR")).join("../tests/golden/texts").join(name)
}

fn read<T: serde::de::DeserializeOwned>(name: &str) -> T {
    let bytes = std::fs::read(golden(name)).expect("the golden file");
    serde_json::from_slice(&bytes).expect("JSON as the script writes it")
}

#[derive(Deserialize)]
struct Text {
    text: String,
    prompt: Vec<u32>,
    parsed: Vec<u32>,
    plain: Vec<u32>,
    decoded: String,
}

fn check(name: &str, tokenizer: &Tokenizer, texts: &[Text]) {
    assert!(texts.len() >= 12, "{name}");
    for Text { text, prompt, parsed, plain, decoded } in texts {
        let encode = |specials| tokenizer.encode(text, specials).expect("tokens");
        assert_eq!(encode(Specials::Parse), *parsed, "{name}: {text:?}");
        assert_eq!(tokenizer.prompt(text, Specials::Parse).expect("tokens"), *prompt, "{name}: {text:?}");
        // The library finds control tokens in plain text where the model's own vocabulary has them; here none may come.
        let controls: Vec<u32> =
            tokenizer.special_tokens().map(|(id, _)| id).filter(|id| Some(*id) != unknown(tokenizer)).collect();
        let ours = encode(Specials::Plain);
        assert!(ours.iter().all(|id| !controls.contains(id)), "{name}: {text:?}");
        if plain.iter().all(|id| !controls.contains(id)) {
            assert_eq!(ours, *plain, "{name}: {text:?}");
            assert_eq!(tokenizer.decode(plain), *decoded, "{name}: {text:?}");
        }
    }
}

fn unknown(tokenizer: &Tokenizer) -> Option<u32> {
    tokenizer.special_tokens().find(|(_, text)| ["<unk>", "[UNK]"].contains(text)).map(|(id, _)| id)
}

#[test]
fn every_kind_of_tokenizer_gives_the_tokens_of_transformers() {
    let all: BTreeMap<String, Vec<Text>> = read("tokenizers.json");
    assert_eq!(all.len(), 9);
    for (name, texts) in all {
        let tokenizer = Tokenizer::open(&golden("tokenizers").join(&name)).expect("a tokenizer");
        check(&name, &tokenizer, &texts);
    }
}

/// What a client sees: the text of all tokens, whichever way the engine reads them.
#[test]
fn the_bytes_of_tokens_are_their_text() {
    let all: BTreeMap<String, Vec<Text>> = read("tokenizers.json");
    for (name, texts) in all {
        let tokenizer = Tokenizer::open(&golden("tokenizers").join(&name)).expect("a tokenizer");
        let Some(bytes) = tokenizer.token_bytes() else {
            assert!(["wordpiece", "unigram", "word-ends"].contains(&&name[..]), "{name}");
            continue;
        };
        for Text { plain, decoded, .. } in texts {
            let said: Vec<u8> = plain.iter().flat_map(|id| &bytes[*id as usize]).copied().collect();
            let said = String::from_utf8_lossy(&said).into_owned();
            // What goes on with a text keeps the space that a text by itself begins without.
            let said = if name.starts_with("sentencepiece") {
                said.strip_prefix(' ').unwrap_or(&said).to_owned()
            } else {
                said
            };
            assert_eq!(said, decoded, "{name}");
        }
    }
}

#[derive(Deserialize)]
struct Arrays {
    tokens: Vec<String>,
    scores: Vec<f32>,
    types: Vec<i32>,
}

#[test]
fn a_gguf_has_the_same_sentencepiece_tokens_as_the_folder() {
    let Arrays { tokens, scores, types } = read("sentencepiece.json");
    let array = |kind: u32, numbers: Vec<[u8; 4]>| {
        let mut bytes = kind.to_le_bytes().to_vec();
        bytes.extend((numbers.len() as u64).to_le_bytes());
        bytes.extend(numbers.concat());
        Value::raw(9, &bytes)
    };
    let metadata = |with_scores: bool| {
        let mut metadata: Vec<(String, Value)> = vec![
            ("tokenizer.ggml.model".into(), Value::string("llama")),
            ("tokenizer.ggml.tokens".into(), Value::strings(&tokens.iter().map(String::as_str).collect::<Vec<_>>())),
            ("tokenizer.ggml.token_type".into(), array(5, types.iter().map(|kind| kind.to_le_bytes()).collect())),
            ("tokenizer.ggml.bos_token_id".into(), Value::u32(1)),
            ("tokenizer.ggml.eos_token_id".into(), Value::u32(2)),
        ];
        if with_scores {
            let scores = scores.iter().map(|score| score.to_le_bytes()).collect();
            metadata.push(("tokenizer.ggml.scores".into(), array(6, scores)));
        }
        metadata
    };
    let (_guard, path) = gguf_file(&File { version: 3, metadata: metadata(true), tensors: vec![] }.bytes().0);
    let tokenizer = Tokenizer::open(&path).expect("a tokenizer");
    assert_eq!(tokenizer.stop_tokens(), [2]);
    let mut all: BTreeMap<String, Vec<Text>> = read("tokenizers.json");
    check("gguf", &tokenizer, &all.remove("sentencepiece").expect("its texts"));
    // Converters that leave scores out leave all pieces equal.
    let (_guard, path) = gguf_file(&File { version: 3, metadata: metadata(false), tensors: vec![] }.bytes().0);
    assert!(Tokenizer::open(&path).is_ok());
}

#[derive(Deserialize)]
struct Case {
    name: String,
    template: String,
    messages: Vec<Turn>,
    next: String,
    variables: Map<String, serde_json::Value>,
    text: String,
}

#[derive(Deserialize)]
struct Turn {
    role: String,
    content: Words,
}

#[derive(Deserialize)]
#[serde(untagged)]
enum Words {
    Text(String),
    Parts(Vec<Part>),
}

#[derive(Deserialize)]
struct Part {
    text: String,
}

fn now() -> NaiveDateTime {
    NaiveDate::from_ymd_opt(2024, 7, 4).and_then(|day| day.and_hms_opt(9, 5, 3)).expect("a time")
}

#[test]
fn templates_are_written_as_transformers_writes_them() {
    let cases: Vec<Case> = read("templates.json");
    assert!(cases.len() >= 18);
    let base = golden("tokenizers/roberta");
    for Case { name, template, messages, next, variables, text } in cases {
        let folder = tempfile::tempdir().expect("a temporary folder");
        std::fs::copy(base.join("tokenizer.json"), folder.path().join("tokenizer.json")).expect("a copy");
        std::fs::copy(base.join("tokenizer_config.json"), folder.path().join("tokenizer_config.json")).expect("a copy");
        std::fs::write(folder.path().join("chat_template.jinja"), template).expect("writing a file");
        let tokenizer = Tokenizer::open(folder.path()).expect("a tokenizer");
        let parts: Vec<Vec<String>> = messages
            .iter()
            .map(|turn| match &turn.content {
                Words::Text(_) => Vec::new(),
                Words::Parts(parts) => parts.iter().map(|part| part.text.clone()).collect(),
            })
            .collect();
        let messages: Vec<Message<'_>> = messages
            .iter()
            .zip(&parts)
            .map(|(turn, parts)| Message {
                role: &turn.role,
                content: match &turn.content {
                    Words::Text(text) => Content::Text(text),
                    Words::Parts(_) => Content::Parts(parts),
                },
                name: None,
                tool_calls: None,
                tool_call_id: None,
            })
            .collect();
        let next = match &next[..] {
            "answer" => Next::Answer,
            "anything" => Next::Anything,
            _ => Next::Rest,
        };
        let conversation = Conversation { messages: &messages, next, variables: &variables };
        let template = tokenizer.template().expect("a template");
        assert_eq!(template.render_at(&conversation, now()).expect(&name), text, "{name}");
    }
}

#[test]
fn a_template_hears_of_today() {
    let (_guard, path) = gguf_file(
        &crate::files::Source { template: Some("{{ strftime_now('%Y') }}".into()), ..crate::files::Source::small() }
            .gguf()
            .bytes()
            .0,
    );
    let tokenizer = Tokenizer::open(&path).expect("a tokenizer");
    let conversation = Conversation { messages: &[], next: Next::Answer, variables: &Map::new() };
    let year: i32 = tokenizer.chat(&conversation).expect("a year").parse().expect("a number");
    assert!(year >= 2025);
}
