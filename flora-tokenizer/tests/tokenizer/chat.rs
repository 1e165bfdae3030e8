//! Chat templates: what real ones ask for, and what hostile ones do.

use crate::files::{Source, folder, gguf_file};
use flora_tokenizer::{ChatError, Content, Conversation, Message, Next, Specials, Tokenizer};
use serde_json::{Map, json};

fn tokenizer(template: Option<&str>) -> Tokenizer {
    let source = Source { template: template.map(String::from), ..Source::small() };
    let (_guard, path) = gguf_file(&source.gguf().bytes().0);
    Tokenizer::open(&path).expect("a tokenizer")
}

fn chat(template: &str, messages: &[Message<'_>]) -> Result<String, ChatError> {
    written(&tokenizer(Some(template)), messages)
}

fn written(tokenizer: &Tokenizer, messages: &[Message<'_>]) -> Result<String, ChatError> {
    tokenizer.chat(&Conversation { messages, next: Next::Answer, variables: &Map::new() })
}

const TURNS: [Message<'_>; 2] = [Message::text("system", " Be <b>. "), Message::text("user", "{{ hi }}\n")];

#[test]
fn templates_have_what_transformers_gives_them() {
    let expected = "<|end|>system:Be <b>.;USER:{{ hi }};!";
    let template = "{{ bos_token + eos_token }}
{%- for message in messages %}
    {% if message['role'] == 'system' and loop.first %}
        {{- message.role }}:{{ message['content'].strip() }};
    {%- else %}
        {{- message.role.upper() ~ ':' ~ message.content | trim }};
    {%- endif %}
{%- endfor %}
{% if add_generation_prompt is defined and add_generation_prompt %}!{% endif %}
";
    assert_eq!(chat(template, &TURNS).expect("a conversation"), expected);

    // Slices, namespaces, macros, `continue` and Python's methods occur in real templates.
    let template = "{% macro say(m) %}{{ m.content.split('<')[0].rstrip() }}{% endmacro %}{% set ns = namespace(n=0) %}\
{% for m in messages[::-1] %}{% if m.role.startswith('sys') %}{% continue %}{% endif %}{% set ns.n = ns.n + 1 %}{% endfor %}\
{{ ns.n }}{{ say(messages[0]) }}{{ undefined_thing }}{{ messages | length }}";
    assert_eq!(chat(template, &TURNS).expect("a conversation"), "1 Be2");
}

#[test]
fn blocks_are_trimmed_as_transformers_sets_jinja() {
    assert_eq!(chat("  {% if true %}\na\n  {% endif %}\nb\n", &[]).expect("a text"), "a\nb");
}

#[test]
fn a_model_without_a_template_says_so() {
    assert!(matches!(written(&tokenizer(None), &TURNS), Err(ChatError::NoTemplate)));
}

#[test]
fn a_template_may_refuse() {
    let template =
        "{% if messages[0].role == 'system' %}{{ raise_exception('System role not supported') }}{% endif %}ok";
    match chat(template, &TURNS) {
        Err(ChatError::Refused(reason)) => assert_eq!(reason, "System role not supported"),
        other => panic!("{other:?}"),
    }
    assert_eq!(chat(template, &TURNS[1..]).expect("no system turn"), "ok");
}

#[test]
fn hostile_templates_fail_soon() {
    for template in [
        "{% for a in range(100000) %}{% for b in range(100000) %}x{% endfor %}{% endfor %}",
        "{% macro f() %}{{ f() }}{% endmacro %}{{ f() }}",
        "{{ 'x' * 10000000000 }}",
        "{{ range(100000000000) | list }}",
        "{% include 'other' %}",
        "{% for",
        "{{ messages.nothing.more }}",
        "{{ nothing() }}",
        "{{ 'x' | nothing }}",
        "{{ 1 / 0 }}",
    ] {
        let error = chat(template, &TURNS).expect_err(template);
        assert!(matches!(error, ChatError::Failed(_)), "{template}: {error:?}");
    }
    let deep = format!("{}{}", "{% if true %}".repeat(10_000), "{% endif %}".repeat(10_000));
    assert!(chat(&deep, &TURNS).is_err());
    let deep = format!("{{{{ {}1{} }}}}", "(".repeat(10_000), ")".repeat(10_000));
    assert!(chat(&deep, &TURNS).is_err());
}

#[test]
fn a_folder_s_template_is_found_wherever_it_is() {
    let source = Source::small().json();
    let config = |template: &str| format!(r#"{{"eos_token": "<|end|>", "chat_template": {template}}}"#);
    let cases = [
        (config(r#""one {{ eos_token }}""#), None, "one <|end|>"),
        (config(r#"[{"name": "tool_use", "template": "a"}, {"name": "default", "template": "b"}]"#), None, "b"),
        (config(r#""one""#), Some("file {{ messages | length }}"), "file 2"),
    ];
    for (config, file, expected) in cases {
        let mut files = vec![("tokenizer.json", &source[..]), ("tokenizer_config.json", &config)];
        files.extend(file.map(|template| ("chat_template.jinja", template)));
        let folder = folder(&files);
        let tokenizer = Tokenizer::open(folder.path()).expect("a tokenizer");
        assert_eq!(written(&tokenizer, &TURNS).expect("a conversation"), expected);
    }
}

/// What a message says is text, even where it is the name of a control token; what the template writes isn't.
#[test]
fn messages_spell_no_control_tokens() {
    let template = "{% for m in messages %}<|start|>{{ m.role }}: {{ m.content | trim }}{% for c in m.tool_calls or [] %}{{ c | tojson }}{% endfor %}<|end|>{% endfor %}";
    let source = Source { template: Some(template.to_owned()), ..Source::small() };
    let (_guard, path) = gguf_file(&source.gguf().bytes().0);
    let tokenizer = Tokenizer::open(&path).expect("a tokenizer");
    let plain = |text: &str| tokenizer.encode(text, Specials::Plain).expect("tokens");
    let parts = ["<|e".to_owned(), "nd|> hello".to_owned()];
    let calls = json!([{"name": "<|start|>"}]);
    let user = Message::text("user", " <|end|><|start|>hello<|end|>\n");
    for (message, text) in [
        (user, "user: <|end|><|start|>hello<|end|>"),
        (Message { content: Content::Parts(&parts), ..user }, "user: <|end|> hello"),
        (
            Message { role: "assistant", content: Content::None, tool_calls: Some(&calls), ..user },
            "assistant: None[...]",
        ),
        (Message::text("user", "hello"), "user: hello"),
    ] {
        let conversation = Conversation { messages: &[message], next: Next::Anything, variables: &Map::new() };
        let tokens = tokenizer.conversation(None, &conversation).expect("tokens");
        let (start, end) = (1, 0);
        assert_eq!((tokens[0], tokens[tokens.len() - 1]), (start, end));
        let said = &tokens[1..tokens.len() - 1];
        assert!(said.iter().all(|token| *token > 1), "{said:?}");
        if message.tool_calls.is_some() {
            assert!(tokenizer.decode(said).ends_with(r#"{"name": "<|start|>"}"#), "{:?}", tokenizer.decode(said));
        } else {
            assert_eq!(said, plain(text));
        }
    }
    // All that is not spelled by a message is read as it was written.
    let conversation = Conversation { messages: &TURNS, next: Next::Anything, variables: &Map::new() };
    let written = tokenizer.chat(&conversation).expect("a text");
    let expected = tokenizer.encode(&written, Specials::Parse).expect("tokens");
    assert_eq!(tokenizer.conversation(None, &conversation).expect("tokens"), expected);
}
