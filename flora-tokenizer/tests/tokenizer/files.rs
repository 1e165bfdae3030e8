//! Writes tokenizers as both kinds of files: GGUF metadata and a Hugging Face folder.

use crate::gguf_writer::{File, Value};
use flora_tokenizer::Tokenizer;
use std::path::PathBuf;
use tempfile::TempDir;

/// A byte-level vocabulary: control tokens, then single characters, then one token for each merge.
pub(crate) struct Source {
    pub(crate) controls: Vec<String>,
    pub(crate) characters: Vec<String>,
    pub(crate) merges: Vec<String>,
    pub(crate) pre: &'static str,
    /// `tokenizer.json`'s for the same.
    pub(crate) pre_json: &'static str,
    pub(crate) template: Option<String>,
}

impl Source {
    /// All 256 bytes, a few merges, `<|end|>` (0) and `<|start|>` (1) as control tokens.
    pub(crate) fn small() -> Self {
        let itself = |byte: &u8| matches!(byte, b'!'..=b'~' | 0xA1..=0xAC | 0xAE..=0xFF);
        let printable = (0..=u8::MAX).filter(itself).map(char::from);
        let characters = printable.chain(('\u{100}'..).take(68)).map(String::from).collect();
        let merges = ["Ġ Ġ", "h e", "l l", "he ll", "hell o", "Ġ w", "Ã ¤", "Ċ Ċ", "1 2"];
        Self {
            controls: vec!["<|end|>".into(), "<|start|>".into()],
            characters,
            merges: merges.map(String::from).into(),
            pre: "smollm",
            pre_json: r#"{"type": "Sequence", "pretokenizers": [{"type": "Digits", "individual_digits": true},
 {"type": "ByteLevel", "add_prefix_space": false, "trim_offsets": true, "use_regex": true}]}"#,
            template: None,
        }
    }

    pub(crate) fn tokens(&self) -> Vec<String> {
        let merged = self.merges.iter().map(|merge| merge.replace(' ', ""));
        self.controls.iter().chain(&self.characters).cloned().chain(merged).collect()
    }

    /// The metadata of a GGUF file.
    pub(crate) fn gguf(&self) -> File {
        let tokens = self.tokens();
        let mut types = 5u32.to_le_bytes().to_vec();
        types.extend((tokens.len() as u64).to_le_bytes());
        types.extend((0..tokens.len()).flat_map(|id| if id < self.controls.len() { 3i32 } else { 1 }.to_le_bytes()));
        let mut metadata: Vec<(String, Value)> = vec![
            ("tokenizer.ggml.model".into(), Value::string("gpt2")),
            ("tokenizer.ggml.pre".into(), Value::string(self.pre)),
            ("tokenizer.ggml.tokens".into(), Value::strings(&tokens.iter().map(String::as_str).collect::<Vec<_>>())),
            ("tokenizer.ggml.token_type".into(), Value::raw(9, &types)),
            (
                "tokenizer.ggml.merges".into(),
                Value::strings(&self.merges.iter().map(String::as_str).collect::<Vec<_>>()),
            ),
            ("tokenizer.ggml.eos_token_id".into(), Value::u32(0)),
        ];
        if let Some(template) = &self.template {
            metadata.push(("tokenizer.chat_template".into(), Value::string(template)));
        }
        File { version: 3, metadata, tensors: vec![] }
    }

    /// `tokenizer.json`, a literal in which tests replace parts.
    pub(crate) fn json(&self) -> String {
        let tokens = self.tokens();
        let quoted = |text: &String| serde_json::Value::from(&text[..]).to_string();
        let vocabulary: Vec<String> =
            tokens.iter().enumerate().map(|(id, token)| format!("{}: {id}", quoted(token))).collect();
        let added: Vec<String> = self
            .controls
            .iter()
            .enumerate()
            .map(|(id, token)| {
                let rest =
                    r#""single_word": false, "lstrip": false, "rstrip": false, "normalized": false, "special": true"#;
                format!(r#"{{"id": {id}, "content": {}, {rest}}}"#, quoted(token))
            })
            .collect();
        let merges: Vec<String> = self.merges.iter().map(quoted).collect();
        format!(
            r#"{{"version": "1.0", "truncation": null, "padding": null, "added_tokens": [{}], "normalizer": null,
 "pre_tokenizer": {}, "post_processor": null, "decoder": {{"type": "ByteLevel", "add_prefix_space": true, "trim_offsets": true, "use_regex": true}},
 "model": {{"type": "BPE", "dropout": null, "unk_token": null, "byte_fallback": false, "vocab": {{{}}}, "merges": [{}]}}}}"#,
            added.join(", "),
            self.pre_json,
            vocabulary.join(", "),
            merges.join(", ")
        )
    }
}

pub(crate) const CONFIG: &str = r#"{"bos_token": null, "eos_token": {"content": "<|end|>", "lstrip": false}}"#;

/// `gguf` in a file that lives as long as the returned guard.
pub(crate) fn gguf_file(bytes: &[u8]) -> (TempDir, PathBuf) {
    let folder = tempfile::tempdir().expect("a temporary folder");
    let path = folder.path().join("model.gguf");
    std::fs::write(&path, bytes).expect("writing a file");
    (folder, path)
}

/// A folder of these files.
pub(crate) fn folder(files: &[(&str, &str)]) -> TempDir {
    let folder = tempfile::tempdir().expect("a temporary folder");
    for (name, text) in files {
        std::fs::write(folder.path().join(name), text).expect("writing a file");
    }
    folder
}

/// The same tokenizer from both kinds of files.
pub(crate) fn both(source: &Source) -> [Tokenizer; 2] {
    let (_guard, path) = gguf_file(&source.gguf().bytes().0);
    let folder = folder(&[("tokenizer.json", &source.json()), ("tokenizer_config.json", CONFIG)]);
    [Tokenizer::open(&path).expect("a GGUF's tokenizer"), Tokenizer::open(folder.path()).expect("a folder's tokenizer")]
}

/// SmolLM2's tokenizer; `FLORA_MODEL=required` fetches it, and without it there is the file that was fetched before.
pub(crate) fn smollm2() -> Option<Tokenizer> {
    let path = flora_toolchain::smollm2_from_environment().expect("FLORA_MODEL=required, but SmolLM2 can't be had");
    if path.is_none() {
        eprintln!("NOT RUN: SmolLM2 was not fetched; FLORA_MODEL=required fetches it");
    }
    path.map(|path| Tokenizer::open(&path).expect("SmolLM2's tokenizer"))
}
