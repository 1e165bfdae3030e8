//! What adapters' folders say of texts: templates, tokens that end a text, and tokenizers that must be the model's.

use crate::files::{CONFIG, Source, folder};
use flora_tokenizer::{AdapterTexts, Conversation, Message, Next, Tokenizer};
use serde_json::Map;
use std::path::Path;
use std::sync::Arc;

const MODELS: &str = r#"{"eos_token": "<|end|>", "chat_template": "model {{ eos_token }}"}"#;

fn base() -> Tokenizer {
    let files = folder(&[("tokenizer.json", &Source::small().json()), ("tokenizer_config.json", MODELS)]);
    Tokenizer::open(files.path()).expect("a tokenizer")
}

/// A chat as it is written with the adapter in `folder`, or why it isn't.
fn chat(texts: &AdapterTexts, base: &Tokenizer, folder: &Path) -> Result<String, String> {
    let text = texts.of(folder)?;
    let conversation =
        Conversation { messages: &[Message::text("user", "hi")], next: Next::Answer, variables: &Map::new() };
    let written = match text.template() {
        Some(template) => template.render(&conversation),
        None => base.chat(&conversation),
    };
    Ok(written.expect("a conversation"))
}

#[test]
fn an_adapters_template_is_used_and_read_again_when_it_changes() {
    let base = Arc::new(base());
    let texts = AdapterTexts::new(Arc::clone(&base));
    let adapter = folder(&[("adapter_config.json", "{}")]);
    assert_eq!(chat(&texts, &base, adapter.path()).expect("a chat"), "model <|end|>");
    let write = |name: &str, text: &str| std::fs::write(adapter.path().join(name), text).expect("writing a file");
    write("chat_template.jinja", "one {{ eos_token }}{{ messages[0].content }}");
    assert_eq!(chat(&texts, &base, adapter.path()).expect("a chat"), "one <|end|>hi");
    assert_eq!(texts.of(adapter.path()).expect("its texts").end(), None);
    // Of the same length.
    write("chat_template.jinja", "two {{ eos_token }}{{ messages[0].content }}");
    write("tokenizer_config.json", r#"{"eos_token": "<|start|>"}"#);
    write("tokenizer.json", &Source::small().json());
    assert_eq!(chat(&texts, &base, adapter.path()).expect("a chat"), "two <|start|>hi");
    assert_eq!(texts.of(adapter.path()).expect("its texts").end(), Some(1));
}

#[test]
fn a_tokenizer_that_is_not_the_models_is_an_error_of_the_adapter() {
    let base = Arc::new(base());
    let texts = AdapterTexts::new(Arc::clone(&base));
    let json = Source::small().json();
    // One that has fewer tokens, or is written in another way, says nothing else.
    let fewer = Source { merges: Vec::new(), ..Source::small() }.json();
    for same in [json.clone(), json.replace(", ", ",  "), fewer] {
        let adapter = folder(&[("tokenizer.json", &same), ("tokenizer_config.json", CONFIG)]);
        assert_eq!(chat(&texts, &base, adapter.path()).expect("a chat"), "model <|end|>");
    }
    let other = Source { controls: vec!["<|end|>".into(), "<|turn|>".into()], ..Source::small() }.json();
    let more = Source { merges: vec!["a b".into(); 1], controls: vec!["<|end|>".into()], ..Source::small() }.json();
    for (wrong, expected) in [(&other, "token 1 is \"<|turn|>\""), (&more, "token 1 is"), (&"{".to_owned(), "EOF")] {
        let adapter = folder(&[("tokenizer.json", wrong)]);
        let error = texts.of(adapter.path()).expect_err("not the model's");
        assert!(error.contains(expected) && error.contains("tokenizer.json"), "{error}");
        assert_eq!(texts.of(adapter.path()).expect_err("not the model's"), error, "it is remembered");
    }
}

#[test]
fn a_chosen_template_goes_before_all_others() {
    let mut base = base();
    let chosen = folder(&[("mine.jinja", "mine {{ eos_token }}")]);
    base.choose_template(&chosen.path().join("mine.jinja")).expect("a template");
    let base = Arc::new(base);
    let texts = AdapterTexts::new(Arc::clone(&base));
    let adapter = folder(&[("chat_template.jinja", "adapter's")]);
    assert_eq!(chat(&texts, &base, adapter.path()).expect("a chat"), "mine <|end|>");
    let error = Tokenizer::choose_template(&mut self::base(), &chosen.path().join("nowhere")).expect_err("no file");
    assert!(error.to_string().contains("nowhere"), "{error}");
}
