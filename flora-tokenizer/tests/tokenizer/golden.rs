//! Real vocabularies against other implementations: SmolLM2's against `transformers` (`tests/golden/make_tokenizer.py`),
//! StarCoder's against llama.cpp's own test cases (`tests/golden/make_starcoder.py`).

use crate::files::{Source, both, smollm2};
use flora_tokenizer::{Conversation, Message, Next, Specials};
use serde::Deserialize;

#[derive(Deserialize)]
struct Golden {
    texts: Vec<Text>,
    chats: Vec<Chat>,
}

#[derive(Deserialize)]
struct Text {
    text: String,
    parsed: Vec<u32>,
    plain: Vec<u32>,
}

#[derive(Deserialize)]
struct Chat {
    messages: Vec<Turn>,
    text: String,
    tokens: Vec<u32>,
}

#[derive(Deserialize)]
struct Turn {
    role: String,
    content: String,
}

#[test]
fn smollm2_s_tokens_are_those_of_transformers() {
    let Some(tokenizer) = smollm2() else { return };
    let golden: Golden =
        serde_json::from_str(include_str!("../../../tests/golden/tokenizer.json")).expect("the golden file");
    for Text { text, parsed, plain } in golden.texts {
        assert_eq!(tokenizer.encode(&text, Specials::Parse).expect("tokens"), parsed, "{text:?}");
        assert_eq!(tokenizer.encode(&text, Specials::Plain).expect("tokens"), plain, "{text:?}");
        assert_eq!(tokenizer.prompt(&text, Specials::Plain).expect("tokens"), plain, "SmolLM2 adds no token in front");
    }
    for chat in golden.chats {
        let messages: Vec<Message> =
            chat.messages.iter().map(|turn| Message::text(&turn.role, &turn.content)).collect();
        let text = tokenizer
            .chat(&Conversation { messages: &messages, next: Next::Answer, variables: &serde_json::Map::new() })
            .expect("a conversation");
        assert_eq!(text, chat.text);
        assert_eq!(tokenizer.encode(&text, Specials::Parse).expect("tokens"), chat.tokens);
    }
}

#[test]
fn smollm2_s_special_tokens_are_known() {
    let Some(tokenizer) = smollm2() else { return };
    assert_eq!((tokenizer.vocabulary(), tokenizer.stop_tokens()), (49_152, vec![0, 2]));
    let special: Vec<(u32, &str)> = tokenizer.special_tokens().collect();
    assert_eq!(special.len(), 17);
    assert_eq!(special[..3], [(0, "<|endoftext|>"), (1, "<|im_start|>"), (2, "<|im_end|>")]);
    assert_eq!(tokenizer.decode(&[504, 3575, 282, 4649, 314, 2]), "The capital of France is");
    assert_eq!(tokenizer.decode(&[0, 1, 2, 49_152, u32::MAX]), "");
    assert_eq!(tokenizer.token_bytes().expect("a byte-level vocabulary")[3575], b" capital");
}

#[derive(Deserialize)]
struct StarCoder {
    controls: Vec<String>,
    bytes: Vec<String>,
    merges: Vec<String>,
    cases: Vec<Case>,
}

#[derive(Deserialize)]
struct Case {
    text: String,
    tokens: Vec<u32>,
}

#[test]
fn starcoder_s_tokens_are_those_of_llama_cpp_from_both_kinds_of_files() {
    let golden: StarCoder =
        serde_json::from_str(include_str!("../../../tests/golden/starcoder.json")).expect("the golden file");
    let StarCoder { controls, bytes, merges, cases } = golden;
    assert_eq!(cases.len(), 47);
    let source = Source { controls, characters: bytes, merges, pre: "starcoder", ..Source::small() };
    for tokenizer in both(&source) {
        assert_eq!(tokenizer.vocabulary(), 49_152);
        for Case { text, tokens } in &cases {
            assert_eq!(tokenizer.encode(text, Specials::Plain).expect("tokens"), *tokens, "{text:?}");
            assert_eq!(tokenizer.decode(tokens), *text);
        }
    }
}
