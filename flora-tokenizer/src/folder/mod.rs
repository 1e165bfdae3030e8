//! The tokenizer of a Hugging Face folder: `tokenizer.json` or `tokenizer.model`, and the files beside it that say how it is
//! used.

mod settings;

use crate::cost;
use crate::description::{Frame, Kind, Parts, SpecialIds, Spelling, Token};
use crate::error::{TokenizerError, VocabularyProblem};
use crate::sentencepiece;
use crate::tokenizer::template_file;
use crate::vocabulary::{TOKENS_LIMIT, check_length};
use flora_checkpoint::SharedBytes;
use serde::Deserialize;
use serde_json::Value;
pub(crate) use settings::Settings;
use std::panic::{AssertUnwindSafe, catch_unwind};
use std::path::Path;
use tokenizers::AddedToken;

pub(crate) const TOKENIZER: &str = "tokenizer.json";
const SENTENCEPIECE: &str = "tokenizer.model";
pub(crate) const TEMPLATE: &str = "chat_template.jinja";

/// The longest file that is read, in bytes; the largest known `tokenizer.json` has 34 MB.
pub(crate) const FILE_LIMIT: u64 = 128 << 20;

/// `tokenizer.json`, as far as it is looked at before the library makes a tokenizer of it.
#[derive(Deserialize)]
struct File {
    model: ModelHead,
    #[serde(default)]
    added_tokens: Vec<Added>,
    #[serde(default)]
    normalizer: Value,
    #[serde(default)]
    pre_tokenizer: Value,
    #[serde(default)]
    post_processor: Value,
    #[serde(default)]
    decoder: Value,
}

#[derive(Deserialize)]
struct ModelHead {
    dropout: Option<f32>,
    max_input_chars_per_word: Option<u64>,
    unk_token: Option<String>,
    unk_id: Option<u32>,
}

#[derive(Deserialize)]
struct Added {
    id: u32,
    content: String,
}

/// A vocabulary that was built of a folder's file.
struct Built {
    inner: tokenizers::Tokenizer,
    spelling: Spelling,
    unknown: Option<u32>,
    /// Whether the file itself says what is put around prompts.
    frames_itself: bool,
}

pub(crate) fn read(folder: &Path) -> Result<Parts, TokenizerError> {
    let settings = Settings::read(folder)?;
    let (json, model) = (folder.join(TOKENIZER), folder.join(SENTENCEPIECE));
    let (path, built) = if json.is_file() {
        let built = build(&json, SharedBytes::read(&json, FILE_LIMIT)?.as_slice())?;
        (json, built)
    } else if model.is_file() {
        let bytes = SharedBytes::read(&model, FILE_LIMIT)?;
        let built = build_sentencepiece(&model, bytes.as_slice(), &settings)?;
        (model, built)
    } else {
        let reason = format!("the folder has no {TOKENIZER} and no {SENTENCEPIECE}");
        return Err(TokenizerError::NoTokenizer { path: folder.to_owned(), reason });
    };
    let Built { mut inner, spelling, unknown, frames_itself } = built;
    add_tokens(&path, &mut inner, &settings)?;
    let tokens = tokens(&path, &inner)?;
    let id = |text: &String| inner.token_to_id(text);
    let special = SpecialIds {
        end: settings.special("eos_token").and_then(id),
        more_ends: settings.ends().to_vec(),
        unknown: unknown.or_else(|| settings.special("unk_token").and_then(id)),
    };
    let beginning = settings.special("bos_token").and_then(id);
    let frame = match frames_itself {
        // What transformers does: a config's flags say nothing beside a tokenizer.json.
        true => Frame::Processor,
        false => Frame::Tokens {
            before: beginning.filter(|_| settings.adds_beginning()),
            after: special.end.filter(|_| settings.adds_end()),
        },
    };
    let template = folder.join(TEMPLATE);
    let chat_template = match template.is_file() {
        true => Some(template_file(&template)?),
        false => settings.chat_template().map(str::to_owned),
    };
    let special_texts = settings.special_texts();
    Ok(Parts { path, inner, tokens, spelling, frame, special, special_texts, chat_template })
}

/// The library's tokenizer of `bytes`, a `tokenizer.json` at `path`.
fn build(path: &Path, bytes: &[u8]) -> Result<Built, TokenizerError> {
    let json = |error: String| TokenizerError::Json { path: path.to_owned(), problem: error };
    let file: File = serde_json::from_slice(bytes).map_err(|error| json(error.to_string()))?;
    let parts = [
        ("normalizer", &file.normalizer),
        ("pre_tokenizer", &file.pre_tokenizer),
        ("post_processor", &file.post_processor),
        ("decoder", &file.decoder),
    ];
    for (key, part) in parts {
        if let Some(problem) = cost::fault(part) {
            return Err(TokenizerError::entry(path, key, problem));
        }
    }
    if file.model.dropout.is_some_and(|dropout| dropout != 0.0) {
        return Err(TokenizerError::entry(path, "model.dropout", "would make tokens random; set it to null"));
    }
    if let Some(problem) = file.model.max_input_chars_per_word.and_then(cost::word_fault) {
        return Err(TokenizerError::entry(path, "model.max_input_chars_per_word", problem));
    }
    let fail = |problem| TokenizerError::Vocabulary { path: path.to_owned(), problem };
    check_length(file.added_tokens.iter().map(|token| token.content.len())).map_err(fail)?;
    let mut inner = catch_unwind(AssertUnwindSafe(|| tokenizers::Tokenizer::from_bytes(bytes)))
        .map_err(|_| json("the tokenizer library fails at it".to_owned()))?
        .map_err(|error| json(error.to_string()))?;
    // How long prompts may be is the engine's to say.
    inner.with_padding(None);
    inner.with_truncation(None).map_err(|error| json(error.to_string()))?;
    for Added { id, content } in &file.added_tokens {
        if let Some(found) = inner.token_to_id(content).filter(|found| found != id) {
            return Err(fail(VocabularyProblem::WrongId { text: content.clone(), listed: *id, found }));
        }
    }
    let unknown = file.model.unk_token.and_then(|text| inner.token_to_id(&text)).or(file.model.unk_id);
    Ok(Built { spelling: spelling(&file.decoder), inner, unknown, frames_itself: true })
}

fn build_sentencepiece(path: &Path, bytes: &[u8], settings: &Settings) -> Result<Built, TokenizerError> {
    let model = sentencepiece::read(path, bytes, settings.prefix())?;
    let build = catch_unwind(AssertUnwindSafe(|| model.build()))
        .unwrap_or_else(|_| Err(VocabularyProblem::Refused("the tokenizer library fails at it".to_owned())));
    let (inner, _, unknown) = build.map_err(|problem| TokenizerError::Vocabulary { path: path.to_owned(), problem })?;
    Ok(Built { inner, spelling: Spelling::Escaped(sentencepiece::SPACE), unknown, frames_itself: false })
}

/// What a decoder makes of tokens, where that doesn't depend on those around it. A space that is left out where a text begins is
/// not: what is generated goes on with a text.
fn spelling(decoder: &Value) -> Spelling {
    let steps: Vec<&Value> = match decoder["type"].as_str() {
        Some("Sequence") => decoder["decoders"].as_array().into_iter().flatten().collect(),
        _ => vec![decoder],
    };
    match &steps[..] {
        [step] if step["type"] == "ByteLevel" => Spelling::ByteLevel,
        [replace, bytes, rest @ ..] if bytes["type"] == "ByteFallback" && rest.iter().all(|step| is_of_ends(step)) => {
            let is_space = replace["type"] == "Replace" && replace["content"] == " ";
            let pattern = replace["pattern"]["String"].as_str().and_then(only_character);
            pattern.filter(|_| is_space).map_or(Spelling::Other, Spelling::Escaped)
        }
        _ => Spelling::Other,
    }
}

/// Whether a step only puts texts together, or leaves out the space that a text begins with.
fn is_of_ends(step: &Value) -> bool {
    let is_strip = step["type"] == "Strip" && step["content"] == " " && step["start"] == 1 && step["stop"] == 0;
    is_strip || step["type"] == "Fuse"
}

fn only_character(text: &str) -> Option<char> {
    let mut characters = text.chars();
    characters.next().filter(|_| characters.next().is_none())
}

/// Adds the tokens that the settings name and the vocabulary doesn't look for: those with an id of their own, and special ones
/// that are in the vocabulary.
fn add_tokens(path: &Path, inner: &mut tokenizers::Tokenizer, settings: &Settings) -> Result<(), TokenizerError> {
    let fail = |problem| TokenizerError::Vocabulary { path: path.to_owned(), problem };
    let known = inner.get_added_vocabulary().get_vocab();
    let mut added: Vec<AddedToken> = Vec::new();
    for (id, token) in settings.added() {
        match inner.token_to_id(&token.content) {
            Some(found) if found != *id => {
                return Err(fail(VocabularyProblem::WrongId { text: token.content.clone(), listed: *id, found }));
            }
            _ if !known.contains_key(&token.content) => added.push(token.clone()),
            _ => {}
        }
    }
    for text in settings.special_texts().into_values() {
        let is_new = !known.contains_key(&text) && added.iter().all(|token| token.content != text);
        if is_new && inner.token_to_id(&text).is_some() {
            added.push(AddedToken::from(text, true).normalized(false));
        }
    }
    check_length(added.iter().map(|token| token.content.len())).map_err(fail)?;
    if added.is_empty() {
        return Ok(());
    }
    inner.add_tokens(&added);
    for (id, token) in settings.added() {
        if let Some(found) = inner.token_to_id(&token.content).filter(|found| found != id) {
            return Err(fail(VocabularyProblem::WrongId { text: token.content.clone(), listed: *id, found }));
        }
    }
    Ok(())
}

/// The tokens by id; ids that nothing has are [`Kind::Unused`].
fn tokens(path: &Path, inner: &tokenizers::Tokenizer) -> Result<Vec<Token>, TokenizerError> {
    let fail = |problem| TokenizerError::Vocabulary { path: path.to_owned(), problem };
    let added = inner.get_added_vocabulary().get_added_tokens_decoder();
    let mut tokens: Vec<Token> = Vec::new();
    for (text, id) in inner.get_vocab(true) {
        let place = id as usize;
        if place >= TOKENS_LIMIT {
            return Err(fail(VocabularyProblem::TooLarge { found: id.into(), limit: TOKENS_LIMIT }));
        }
        if place >= tokens.len() {
            tokens.resize(place + 1, Token { text: String::new(), kind: Kind::Unused });
        }
        let kind = match added.get(&id).map(|token| token.special) {
            Some(true) => Kind::Control,
            Some(false) => Kind::Whole,
            None => Kind::Text,
        };
        let before = &mut tokens[place];
        if before.kind != Kind::Unused {
            let (first, second) =
                if before.text < text { (before.text.clone(), text) } else { (text, before.text.clone()) };
            return Err(fail(VocabularyProblem::Ambiguous { id, first, second }));
        }
        *before = Token { text, kind };
    }
    if tokens.is_empty() {
        return Err(fail(VocabularyProblem::Empty));
    }
    Ok(tokens)
}

/// The texts and ids of all tokens in `bytes`, a `tokenizer.json` at `path`.
pub(crate) fn vocabulary(path: &Path, bytes: &[u8]) -> Result<Vec<(u32, String)>, TokenizerError> {
    let tokens = tokens(path, &build(path, bytes)?.inner)?;
    let numbered = (0..).zip(tokens).filter(|(_, token)| token.kind != Kind::Unused);
    Ok(numbered.map(|(id, token)| (id, token.text)).collect())
}
