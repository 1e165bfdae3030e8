//! The tokenizer of a Hugging Face folder: `tokenizer.json`, and the files beside it that say how it is used.

use crate::description::{Description, Edges, Kind, SpecialIds, Token};
use crate::error::{TokenizerError, VocabularyProblem};
use crate::gguf::split_merge;
use crate::pieces::{Pieces, Step};
use crate::vocabulary::TOKENS_LIMIT;
use flora_checkpoint::SharedBytes;
use serde::Deserialize;
use serde::de::DeserializeOwned;
use std::collections::HashMap;
use std::path::Path;

const TOKENIZER: &str = "tokenizer.json";
const CONFIG: &str = "tokenizer_config.json";
const GENERATION: &str = "generation_config.json";
const TEMPLATE: &str = "chat_template.jinja";

/// The longest file that is read, in bytes; the largest known `tokenizer.json` has 34 MB.
const FILE_LIMIT: u64 = 128 << 20;

/// `tokenizer.json`, as far as it matters. Padding and truncation are the engine's business.
#[derive(Deserialize)]
struct File {
    model: Bpe,
    #[serde(default)]
    added_tokens: Vec<Added>,
    normalizer: Option<Normalizer>,
    pre_tokenizer: Option<Step>,
    post_processor: Option<PostProcessor>,
    decoder: Option<Decoder>,
}

#[derive(Deserialize)]
struct Bpe {
    /// Older files leave it out.
    #[serde(rename = "type")]
    kind: Option<String>,
    vocab: HashMap<String, u32>,
    merges: Vec<Merge>,
    #[serde(default)]
    ignore_merges: bool,
    #[serde(default)]
    byte_fallback: bool,
    dropout: Option<f32>,
    continuing_subword_prefix: Option<String>,
    end_of_word_suffix: Option<String>,
}

#[derive(Deserialize)]
#[serde(untagged)]
enum Merge {
    Pair(String, String),
    Line(String),
}

#[derive(Deserialize)]
struct Added {
    id: u32,
    content: String,
    #[serde(default)]
    special: bool,
    #[serde(default)]
    lstrip: bool,
    #[serde(default)]
    rstrip: bool,
    #[serde(default)]
    single_word: bool,
}

#[derive(Deserialize)]
#[serde(tag = "type")]
enum Normalizer {
    #[serde(rename = "NFC")]
    Nfc,
    Sequence {
        normalizers: Vec<Normalizer>,
    },
}

#[derive(Deserialize)]
#[serde(tag = "type")]
enum Decoder {
    ByteLevel {},
}

#[derive(Deserialize)]
#[serde(tag = "type")]
enum PostProcessor {
    ByteLevel {},
    Sequence { processors: Vec<PostProcessor> },
    TemplateProcessing { single: Vec<Slot> },
}

#[derive(Deserialize)]
enum Slot {
    SpecialToken { id: String },
    Sequence {},
}

/// `tokenizer_config.json`.
#[derive(Default, Deserialize)]
struct Config {
    bos_token: Option<Name>,
    eos_token: Option<Name>,
    chat_template: Option<Templates>,
}

/// A special token, by itself or with its properties.
#[derive(Deserialize)]
#[serde(untagged)]
enum Name {
    Text(String),
    Token { content: String },
}

#[derive(Deserialize)]
#[serde(untagged)]
enum Templates {
    One(String),
    Named(Vec<NamedTemplate>),
}

#[derive(Deserialize)]
struct NamedTemplate {
    name: String,
    template: String,
}

/// `generation_config.json`.
#[derive(Default, Deserialize)]
struct Generation {
    eos_token_id: Option<Ids>,
}

#[derive(Deserialize)]
#[serde(untagged)]
enum Ids {
    One(u32),
    Many(Vec<u32>),
}

pub(crate) fn read(folder: &Path) -> Result<Description, TokenizerError> {
    let path = folder.join(TOKENIZER);
    if !path.is_file() {
        let reason = format!("the folder has no {TOKENIZER}");
        return Err(TokenizerError::NoTokenizer { path: folder.to_owned(), reason });
    }
    let file: File = parse(&path)?;
    check_model(&path, &file)?;
    let entry = |key: &str, problem: String| TokenizerError::entry(&path, key, problem);
    let steps = file.pre_tokenizer.ok_or_else(|| entry("pre_tokenizer", "is missing".to_string()))?;
    let pieces = Pieces::of(vec![steps]).map_err(|problem| entry("pre_tokenizer", problem))?;
    let fail = |problem| TokenizerError::Vocabulary { path: path.clone(), problem };
    let tokens = tokens(file.model.vocab, &file.added_tokens).map_err(fail)?;
    let merges = file.model.merges.into_iter().enumerate().map(|(index, merge)| match merge {
        Merge::Pair(left, right) => Ok((left, right)),
        Merge::Line(text) => split_merge(index, &text),
    });
    let merges = merges.collect::<Result<_, _>>().map_err(fail)?;

    let config: Config = parse_if_there(&folder.join(CONFIG))?.unwrap_or_default();
    let id = |name: &Name| {
        let (Name::Text(text) | Name::Token { content: text }) = name;
        file.added_tokens.iter().find(|token| token.content == *text).map(|token| token.id)
    };
    let first = file.post_processor.map_or(Ok(None), |processor| first_token(&processor));
    let first = match first.map_err(|problem| entry("post_processor", problem))? {
        None => None,
        Some(name) => {
            let unknown = || entry("post_processor", format!("puts {name:?} first, which is no added token"));
            Some(id(&Name::Text(name.clone())).ok_or_else(unknown)?)
        }
    };
    let generation: Generation = parse_if_there(&folder.join(GENERATION))?.unwrap_or_default();
    let special = SpecialIds {
        beginning: first.or_else(|| config.bos_token.as_ref().and_then(id)),
        prompts_begin: first.is_some(),
        end: config.eos_token.as_ref().and_then(id),
        more_ends: match generation.eos_token_id {
            None => Vec::new(),
            Some(Ids::One(id)) => vec![id],
            Some(Ids::Many(ids)) => ids,
        },
    };
    let chat_template = chat_template(folder, config.chat_template)?;
    let (whole_pieces_first, compose) = (file.model.ignore_merges, file.normalizer.as_ref().is_some_and(composes));
    Ok(Description { path, tokens, merges, whole_pieces_first, compose, pieces, special, chat_template })
}

/// Refuses models that are not plain byte-level BPE.
fn check_model(path: &Path, file: &File) -> Result<(), TokenizerError> {
    let refuse = |key: &str, problem: &str| {
        Err(TokenizerError::entry(path, key, format!("{problem}; only byte-level BPE is supported")))
    };
    let model = &file.model;
    if let Some(kind) = model.kind.as_ref().filter(|kind| *kind != "BPE") {
        return refuse("model.type", &format!("is `{kind}`"));
    }
    let empty = |text: &Option<String>| text.as_ref().is_none_or(String::is_empty);
    if model.byte_fallback || !empty(&model.continuing_subword_prefix) || !empty(&model.end_of_word_suffix) {
        return refuse("model", "has byte_fallback, continuing_subword_prefix or end_of_word_suffix");
    }
    if model.dropout.is_some_and(|dropout| dropout != 0.0) {
        return refuse("model.dropout", "would make tokens random");
    }
    match file.decoder {
        Some(Decoder::ByteLevel {}) => Ok(()),
        None => refuse("decoder", "is missing"),
    }
}

fn composes(normalizer: &Normalizer) -> bool {
    match normalizer {
        Normalizer::Nfc => true,
        Normalizer::Sequence { normalizers } => normalizers.iter().any(composes),
    }
}

/// The token that a post-processor puts before every text.
fn first_token(processor: &PostProcessor) -> Result<Option<String>, String> {
    match processor {
        PostProcessor::ByteLevel {} => Ok(None),
        PostProcessor::Sequence { processors } => {
            let mut found = None;
            for processor in processors {
                match (first_token(processor)?, &found) {
                    (Some(_), Some(_)) => return Err("puts several tokens before a text".to_string()),
                    (Some(token), None) => found = Some(token),
                    (None, _) => {}
                }
            }
            Ok(found)
        }
        PostProcessor::TemplateProcessing { single } => match &single[..] {
            [Slot::Sequence {}] => Ok(None),
            [Slot::SpecialToken { id }, Slot::Sequence {}] => Ok(Some(id.clone())),
            _ => Err("does more than to put one token before a text, which is not supported".to_string()),
        },
    }
}

/// The tokens by id; ids that nothing has are [`Kind::Unused`].
fn tokens(vocabulary: HashMap<String, u32>, added: &[Added]) -> Result<Vec<Token>, VocabularyProblem> {
    let kinds = added.iter().map(|token| {
        let edges = Edges { strip_left: token.lstrip, strip_right: token.rstrip, single_word: token.single_word };
        let kind = if token.special { Kind::Control(edges) } else { Kind::Whole(edges) };
        (token.id, Token { text: token.content.clone(), kind })
    });
    let texts = vocabulary.into_iter().map(|(text, id)| (id, Token { text, kind: Kind::Text }));
    let mut tokens: Vec<Token> = Vec::new();
    for (id, token) in texts.chain(kinds) {
        let place = id as usize;
        if place >= TOKENS_LIMIT {
            return Err(VocabularyProblem::TooLarge { found: id.into(), limit: TOKENS_LIMIT });
        }
        if place >= tokens.len() {
            tokens.resize(place + 1, Token { text: String::new(), kind: Kind::Unused });
        }
        let before = &mut tokens[place];
        // An added token is mostly in the vocabulary too.
        if before.kind == Kind::Unused || (before.kind == Kind::Text && before.text == token.text) {
            *before = token;
        } else {
            return Err(VocabularyProblem::Ambiguous { id, first: before.text.clone(), second: token.text });
        }
    }
    Ok(tokens)
}

/// The template in a file of its own, else the one in the config, of several the one called `default`.
fn chat_template(folder: &Path, config: Option<Templates>) -> Result<Option<String>, TokenizerError> {
    let path = folder.join(TEMPLATE);
    if path.is_file() {
        let bytes = SharedBytes::read(&path, FILE_LIMIT)?;
        let problem = |_| TokenizerError::entry(&path, "the template", "is not UTF-8");
        return Ok(Some(std::str::from_utf8(bytes.as_slice()).map_err(problem)?.to_string()));
    }
    Ok(match config {
        None => None,
        Some(Templates::One(template)) => Some(template),
        Some(Templates::Named(named)) => {
            named.into_iter().find(|template| template.name == "default").map(|template| template.template)
        }
    })
}

fn parse<T: DeserializeOwned>(path: &Path) -> Result<T, TokenizerError> {
    let bytes = SharedBytes::read(path, FILE_LIMIT)?;
    serde_json::from_slice(bytes.as_slice())
        .map_err(|error| TokenizerError::Json { path: path.to_owned(), problem: error.to_string() })
}

fn parse_if_there<T: DeserializeOwned>(path: &Path) -> Result<Option<T>, TokenizerError> {
    if path.is_file() { parse(path).map(Some) } else { Ok(None) }
}
