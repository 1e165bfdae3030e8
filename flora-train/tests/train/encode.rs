//! Examples to tokens with a tokenizer whose tokens are bytes: what is learnt of each form, and where its tokens begin and end.

use std::path::Path;

use flora_tokenizer::Tokenizer;
use flora_train::data::{Document, EncodeProblem, encode, parse_lines};
use flora_train::{DataError, Dataset};

/// Written as Hugging Face's byte-level tokenizers are, without merges; control tokens come first.
fn tokenizer(template: &str) -> Tokenizer {
    let itself = |byte: &u8| matches!(byte, b'!'..=b'~' | 0xA1..=0xAC | 0xAE..=0xFF);
    let printable = (0..=u8::MAX).filter(itself).map(char::from);
    let characters: Vec<char> = printable.chain(('\u{100}'..).take(68)).collect();
    let controls = ["<|end|>", "<|turn|>"];
    let texts = controls.into_iter().map(str::to_owned).chain(characters.iter().map(char::to_string));
    let vocabulary: serde_json::Map<String, serde_json::Value> =
        texts.zip(0u32..).map(|(text, id)| (text, id.into())).collect();
    let added = |(id, content): (u32, &str)| {
        serde_json::json!({"id": id, "content": content, "single_word": false, "lstrip": false, "rstrip": false,
            "normalized": false, "special": true})
    };
    let json = serde_json::json!({
        "version": "1.0", "truncation": null, "padding": null, "normalizer": null, "post_processor": null,
        "added_tokens": (0u32..).zip(controls).map(added).collect::<Vec<_>>(),
        "pre_tokenizer": {"type": "ByteLevel", "add_prefix_space": false, "trim_offsets": true, "use_regex": true},
        "decoder": {"type": "ByteLevel", "add_prefix_space": true, "trim_offsets": true, "use_regex": true},
        "model": {"type": "BPE", "dropout": null, "unk_token": null, "byte_fallback": false, "vocab": vocabulary, "merges": []},
    });
    let config = serde_json::json!({"eos_token": "<|end|>", "chat_template": template});
    let folder = tempfile::tempdir().expect("a folder");
    std::fs::write(folder.path().join("tokenizer.json"), json.to_string()).expect("a file");
    std::fs::write(folder.path().join("tokenizer_config.json"), config.to_string()).expect("a file");
    Tokenizer::open(folder.path()).expect("a tokenizer")
}

const TEMPLATE: &str = "{% for m in messages %}<|turn|>{{ m.role }}:{{ m.content }}<|end|>{% endfor %}{% if add_generation_prompt %}<|turn|>assistant:{% endif %}";

fn documents(template: &str, lines: &str) -> Result<Vec<Document>, DataError> {
    let examples = parse_lines(Path::new("x.jsonl"), lines.as_bytes()).expect("examples");
    encode(&examples, &tokenizer(template))
}

/// All tokens of a document but its first as text, in which what is learnt stands in brackets.
fn shown(lines: &str) -> String {
    let tokenizer = tokenizer(TEMPLATE);
    let documents = documents(TEMPLATE, lines).expect("documents");
    let made = Dataset::new(&documents, 1000).expect("sequences");
    let text = |token: u32| match token {
        0 => "$".to_owned(),
        1 => "@".to_owned(),
        token => tokenizer.decode(&[token]),
    };
    let mut shown = String::new();
    let mut learnt = false;
    let own = &made.sequences()[0];
    let next = own.tokens[1..].iter().copied().map(Some).chain([None]);
    for (token, target) in next.zip(&own.targets) {
        if target.is_some() != learnt {
            shown.push(if learnt { ']' } else { '[' });
            learnt = target.is_some();
        }
        // The last target isn't among the tokens.
        shown += &token.or(*target).map(text).unwrap_or_default();
    }
    if learnt {
        shown.push(']');
    }
    shown
}

#[test]
fn what_is_learnt_is_the_answer_and_its_end() {
    assert_eq!(shown(r#"{"text": "abc"}"#), "[bc$]");
    assert_eq!(shown(r#"{"text": "abc<|end|>"}"#), "[bc$]", "it ends already");
    assert_eq!(shown(r#"{"prompt": "ab ", "completion": "cd"}"#), "b [cd$]");
    assert_eq!(shown(r#"{"prompt": "", "completion": "cd"}"#), "[d$]");
    let turns = r#"{"messages": [{"role": "system", "content": "s"}, {"role": "user", "content": "q"},
        {"role": "assistant", "content": "one"}, {"role": "user", "content": "r"}, {"role": "assistant", "content": "<|turn|>x"}]}"#;
    assert_eq!(shown(&turns.replace('\n', " ")), "system:s$@user:q$@assistant:[one$]@user:r$@assistant:[@x$]");
    let asked = r#"{"messages": [{"role": "assistant", "content": "hi"}, {"role": "user", "content": "q"}]}"#;
    assert_eq!(shown(asked), "assistant:[hi$]@user:q".to_owned(), "nothing is learnt after the last answer");
}

#[test]
fn files_are_text_whatever_they_hold() {
    let folder = tempfile::tempdir().expect("a folder");
    std::fs::write(folder.path().join("a.rkt"), "(a <|end|> b)").expect("a file");
    let sources = flora_train::Sources { paths: vec![folder.path().to_owned()], extensions: Vec::new() };
    let (examples, _) = flora_train::data::read(&sources).expect("a file");
    let document = encode(&examples, &tokenizer(TEMPLATE)).expect("tokens").remove(0);
    assert_eq!(document.len(), "(a <|end|> b)".len() + 1, "bytes, and one control token at the end");
    assert_eq!(document.last(), Some(0));
}

#[test]
fn a_template_that_can_t_say_what_is_learnt_is_refused_by_line() {
    let lines = "{\"text\": \"fine\"}\n{\"messages\": [{\"role\": \"assistant\", \"content\": \"a\"}, {\"role\": \"assistant\", \"content\": \"b\"}]}";
    // It leaves out all but the last message.
    let error = documents("{% if messages %}{{ messages[-1].content }}{% endif %}", lines).expect_err("no prefix");
    assert!(matches!(&error, DataError::Encode { line: Some(2), problem: EncodeProblem::Rewritten(1), .. }), "{error}");
    assert!(error.to_string().starts_with("x.jsonl:2: "), "{error}");
    let error = documents("{{ raise_exception('never') }}", lines).expect_err("a refusal").to_string();
    assert!(error.contains("x.jsonl:2: ") && error.contains("never"), "{error}");
}

#[test]
fn the_same_file_has_the_same_tokens_on_another_day() {
    let template = "{{ strftime_now('%Y') }}{% for m in messages %}{{ m.content }}{% endfor %}";
    let folder = tempfile::tempdir().expect("a folder");
    let path = folder.path().join("x.jsonl");
    std::fs::write(&path, "{\"messages\": [{\"role\": \"assistant\", \"content\": \"a\"}]}").expect("a file");
    // The middle of 2001.
    let then = std::time::SystemTime::UNIX_EPOCH + std::time::Duration::from_secs(993_945_600);
    std::fs::File::options().write(true).open(&path).and_then(|file| file.set_modified(then)).expect("a time");
    let sources = flora_train::Sources { paths: vec![path], extensions: Vec::new() };
    let (examples, _) = flora_train::data::read(&sources).expect("a line");
    let tokenizer = tokenizer(template);
    let document = encode(&examples, &tokenizer).expect("tokens").remove(0);
    let made = Dataset::new(&[document], 100).expect("a sequence");
    assert_eq!(tokenizer.decode(&made.sequences()[0].tokens), "2001");
}
