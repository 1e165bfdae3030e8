//! The tokenizer that a GGUF file carries in its metadata.

use crate::description::{Description, Edges, Kind, SpecialIds, Token};
use crate::error::{TokenizerError, VocabularyProblem};
use crate::pieces::Pieces;
use crate::vocabulary::TOKENS_LIMIT;
use flora_checkpoint::gguf::{Gguf, MetadataArray, MetadataValue};
use std::path::{Path, PathBuf};

const MODEL: &str = "tokenizer.ggml.model";
const PRE: &str = "tokenizer.ggml.pre";
const TOKENS: &str = "tokenizer.ggml.tokens";
const TYPES: &str = "tokenizer.ggml.token_type";
const MERGES: &str = "tokenizer.ggml.merges";

pub(crate) fn read(path: &Path) -> Result<Description, TokenizerError> {
    let metadata = Metadata { path: path.to_owned(), gguf: Gguf::open(path)? };
    match metadata.text(MODEL)?.as_deref() {
        Some("gpt2") => {}
        None => {
            let reason = format!("its metadata has no `{MODEL}`");
            return Err(TokenizerError::NoTokenizer { path: path.to_owned(), reason });
        }
        Some(other) => {
            let problem = format!(
                "is `{other}` (SentencePiece where it is `llama`); only byte-level BPE, `gpt2`, is supported. \
                 Use a model with such a tokenizer, or send token ids in place of text"
            );
            return Err(metadata.error(MODEL, problem));
        }
    }
    let Some(name) = metadata.text(PRE)? else {
        let problem =
            "is missing, so it is not known how texts are cut; convert the model again with a current llama.cpp";
        return Err(metadata.error(PRE, problem));
    };
    let (pieces, whole_pieces_first) = Pieces::named(&name).map_err(|problem| metadata.error(PRE, problem))?;
    let tokens = tokens(&metadata)?;
    let flag = |key| metadata.flag(key);
    let special = SpecialIds {
        beginning: metadata.id("tokenizer.ggml.bos_token_id")?,
        // Llama 3's converter leaves the flag out of old files, and its models always want it.
        prompts_begin: flag("tokenizer.ggml.add_bos_token")?.unwrap_or(whole_pieces_first),
        end: metadata.id("tokenizer.ggml.eos_token_id")?,
        more_ends: ["tokenizer.ggml.eot_token_id", "tokenizer.ggml.eom_token_id"]
            .into_iter()
            .filter_map(|key| metadata.id(key).transpose())
            .collect::<Result<_, _>>()?,
    };
    let chat_template = metadata.text("tokenizer.chat_template")?;
    let merges = merges(&metadata)?;
    let path = metadata.path;
    Ok(Description { path, tokens, merges, whole_pieces_first, compose: false, pieces, special, chat_template })
}

fn tokens(metadata: &Metadata) -> Result<Vec<Token>, TokenizerError> {
    let texts = metadata.array(TOKENS)?;
    let found = texts.len();
    if found > TOKENS_LIMIT as u64 {
        let problem = VocabularyProblem::TooLarge { found, limit: TOKENS_LIMIT };
        return Err(TokenizerError::Vocabulary { path: metadata.path.clone(), problem });
    }
    let types = metadata.array(TYPES)?;
    if types.len() != found {
        let problem = format!("has {} types for {found} tokens", types.len());
        return Err(metadata.error(TYPES, problem));
    }
    let token = |(text, kind): (MetadataValue, MetadataValue)| {
        let MetadataValue::String(text) = text else { return Err(metadata.error(TOKENS, "holds what is no text")) };
        // ggml's numbers of the types.
        let kind = match kind.as_u64() {
            Some(1) => Kind::Text,
            Some(2 | 3) => Kind::Control(Edges::default()),
            Some(4) => Kind::Whole(Edges::default()),
            Some(5) => Kind::Unused,
            _ => {
                let problem = format!("gives {text:?} the type {kind:?}; a byte-level vocabulary has the types 1 to 5");
                return Err(metadata.error(TYPES, problem));
            }
        };
        Ok(Token { text, kind })
    };
    texts.iter().zip(types.iter()).map(token).collect()
}

fn merges(metadata: &Metadata) -> Result<Vec<(String, String)>, TokenizerError> {
    let merge = |(index, merge): (usize, MetadataValue)| {
        let MetadataValue::String(text) = merge else { return Err(metadata.error(MERGES, "holds what is no text")) };
        split_merge(index, &text).map_err(|problem| TokenizerError::Vocabulary { path: metadata.path.clone(), problem })
    };
    metadata.array(MERGES)?.iter().enumerate().map(merge).collect()
}

/// The two tokens of the merge `text`, which is at `index` in its list.
pub(crate) fn split_merge(index: usize, text: &str) -> Result<(String, String), VocabularyProblem> {
    match text.split_once(' ') {
        Some((left, right)) if !left.is_empty() && !right.is_empty() && !right.contains(' ') => {
            Ok((left.to_string(), right.to_string()))
        }
        _ => Err(VocabularyProblem::BadMerge { index, text: text.to_string() }),
    }
}

/// The metadata of a file, with typed errors.
struct Metadata {
    path: PathBuf,
    gguf: Gguf,
}

impl Metadata {
    fn error(&self, key: &str, problem: impl Into<String>) -> TokenizerError {
        TokenizerError::entry(&self.path, key, problem)
    }

    fn get(&self, key: &str) -> Option<&MetadataValue> {
        self.gguf.metadata().get(key)
    }

    fn text(&self, key: &str) -> Result<Option<String>, TokenizerError> {
        let text = |value: &MetadataValue| value.as_str().map(str::to_string);
        self.get(key).map(|value| text(value).ok_or_else(|| self.error(key, "is not a text"))).transpose()
    }

    fn flag(&self, key: &str) -> Result<Option<bool>, TokenizerError> {
        match self.get(key) {
            None => Ok(None),
            Some(MetadataValue::Bool(flag)) => Ok(Some(*flag)),
            Some(_) => Err(self.error(key, "is neither true nor false")),
        }
    }

    fn id(&self, key: &str) -> Result<Option<u32>, TokenizerError> {
        let id = |value: &MetadataValue| value.as_u64().and_then(|id| u32::try_from(id).ok());
        self.get(key).map(|value| id(value).ok_or_else(|| self.error(key, "is not the id of a token"))).transpose()
    }

    fn array(&self, key: &str) -> Result<&MetadataArray, TokenizerError> {
        match self.get(key) {
            Some(MetadataValue::Array(array)) => Ok(array),
            Some(_) => Err(self.error(key, "is not a list")),
            None => Err(self.error(key, "is missing")),
        }
    }
}
