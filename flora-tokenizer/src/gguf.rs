//! The tokenizer that a GGUF file carries in its metadata.

use crate::description::{Frame, Kind, Parts, SpecialIds, Spelling, Token};
use crate::error::{TokenizerError, VocabularyProblem};
use crate::pieces;
use crate::sentencepiece::{self, Choice, Piece, Prefix, Purpose};
use crate::vocabulary::{TOKENS_LIMIT, byte_level, not_byte_level};
use flora_checkpoint::gguf::{Gguf, MetadataArray, MetadataValue};
use std::collections::BTreeMap;
use std::path::{Path, PathBuf};
use tokenizers::pre_tokenizers::byte_level::ByteLevel;

const MODEL: &str = "tokenizer.ggml.model";
const PRE: &str = "tokenizer.ggml.pre";
const TOKENS: &str = "tokenizer.ggml.tokens";
const TYPES: &str = "tokenizer.ggml.token_type";
const SCORES: &str = "tokenizer.ggml.scores";
const MERGES: &str = "tokenizer.ggml.merges";

/// Control tokens that end a turn by their names: files say of one token alone that it ends a text, and chat models say another
/// at the end of what they say. llama.cpp stops at them too.
const ENDS: [&str; 19] = [
    "<|eot_id|>",
    "<|eom_id|>",
    "<|im_end|>",
    "<|end|>",
    "<|endoftext|>",
    "<|end_of_text|>",
    "<|return|>",
    "<|call|>",
    "<|flush|>",
    "<end_of_turn>",
    "<end_of_utterance>",
    "<eos>",
    "</s>",
    "<EOT>",
    "_<EOT>",
    "[EOT]",
    "[EOS]",
    "<|eot|>",
    "<｜end▁of▁sentence｜>",
];

pub(crate) fn read(path: &Path) -> Result<Parts, TokenizerError> {
    let metadata = Metadata { path: path.to_owned(), gguf: Gguf::open(path)? };
    match metadata.text(MODEL)?.as_deref() {
        Some("gpt2") => read_byte_level(&metadata),
        Some("llama") => read_sentencepiece(&metadata),
        None => {
            let reason = format!("its metadata has no `{MODEL}`");
            Err(TokenizerError::NoTokenizer { path: path.to_owned(), reason })
        }
        Some(other) => {
            let problem = format!(
                "is `{other}`; `gpt2` (byte-level BPE) and `llama` (SentencePiece) are supported. \
                 Use the model's folder with tokenizer.json, or send token ids in place of text"
            );
            Err(metadata.error(MODEL, problem))
        }
    }
}

fn read_byte_level(metadata: &Metadata) -> Result<Parts, TokenizerError> {
    let Some(name) = metadata.text(PRE)? else {
        let problem =
            "is missing, so it is not known how texts are cut; convert the model again with a current llama.cpp";
        return Err(metadata.error(PRE, problem));
    };
    let (cut, whole_pieces_first) = pieces::named(&name).map_err(|problem| metadata.error(PRE, problem))?;
    let tokens = tokens(metadata)?;
    let fail = |problem| metadata.vocabulary(problem);
    let (bpe, added) =
        byte_level(&tokens, metadata.merges(metadata.array(MERGES)?)?, whole_pieces_first).map_err(fail)?;
    if let Some(problem) = not_byte_level(&tokens) {
        return Err(fail(problem));
    }
    let mut inner = tokenizers::Tokenizer::new(bpe);
    inner.with_pre_tokenizer(Some(cut));
    inner.with_decoder(Some(ByteLevel::new(false, false, false)));
    inner.with_added_vocabulary(added);
    // Llama 3's converter leaves the flag out of old files, and its models always want it.
    parts(metadata, inner, tokens, Spelling::ByteLevel, None, whole_pieces_first)
}

fn read_sentencepiece(metadata: &Metadata) -> Result<Parts, TokenizerError> {
    let merges = metadata.get(MERGES).is_some().then(|| metadata.merges(metadata.array(MERGES)?)).transpose()?;
    let prefix = match metadata.flag("tokenizer.ggml.add_space_prefix")? {
        Some(false) => Prefix::Never,
        None | Some(true) => Prefix::First,
    };
    let model = sentencepiece::Model {
        pieces: pieces_of(metadata)?,
        choice: Choice::Merges(merges),
        prefix,
        removes_spaces: false,
        characters: Vec::new(),
    };
    let (inner, tokens, unknown) = model.build().map_err(|problem| metadata.vocabulary(problem))?;
    parts(metadata, inner, tokens, Spelling::Escaped(sentencepiece::SPACE), unknown, true)
}

/// What the metadata says beside the vocabulary; `begins` is whether prompts begin with a token where no flag says so.
fn parts(
    metadata: &Metadata,
    inner: tokenizers::Tokenizer,
    tokens: Vec<Token>,
    spelling: Spelling,
    unknown: Option<u32>,
    begins: bool,
) -> Result<Parts, TokenizerError> {
    let (beginning, end) = (metadata.id("tokenizer.ggml.bos_token_id")?, metadata.id("tokenizer.ggml.eos_token_id")?);
    if let Some(id) = beginning.filter(|id| *id as usize >= tokens.len()) {
        let problem = format!("is {id}, but there are {} tokens", tokens.len());
        return Err(metadata.error("tokenizer.ggml.bos_token_id", problem));
    }
    let asked = metadata.flag("tokenizer.ggml.add_bos_token")?;
    if asked == Some(true) && beginning.is_none() {
        let problem = "is missing, though prompts are to start with it";
        return Err(metadata.error("the token that a text begins with", problem));
    }
    let ends_prompts = metadata.flag("tokenizer.ggml.add_eos_token")?.unwrap_or(false);
    let frame =
        Frame::Tokens { before: beginning.filter(|_| asked.unwrap_or(begins)), after: end.filter(|_| ends_prompts) };
    let mut more_ends: Vec<u32> = ["tokenizer.ggml.eot_token_id", "tokenizer.ggml.eom_token_id"]
        .into_iter()
        .filter_map(|key| metadata.id(key).transpose())
        .collect::<Result<_, _>>()?;
    let ends_by_name = |token: &Token| token.kind == Kind::Control && ENDS.contains(&&token.text[..]);
    more_ends.extend((0..).zip(&tokens).filter(|(_, token)| ends_by_name(token)).map(|(id, _)| id));
    let named = [
        ("bos_token", beginning),
        ("eos_token", end),
        ("unk_token", metadata.id("tokenizer.ggml.unknown_token_id")?),
        ("pad_token", metadata.id("tokenizer.ggml.padding_token_id")?),
    ];
    let special_texts: BTreeMap<String, String> = named
        .into_iter()
        .filter_map(|(name, id)| Some((name.to_owned(), tokens.get(id? as usize)?.text.clone())))
        .collect();
    Ok(Parts {
        path: metadata.path.clone(),
        inner,
        tokens,
        spelling,
        frame,
        special: SpecialIds { end, more_ends, unknown },
        special_texts,
        chat_template: metadata.text("tokenizer.chat_template")?,
    })
}

fn tokens(metadata: &Metadata) -> Result<Vec<Token>, TokenizerError> {
    let token = |(text, kind): (String, MetadataValue)| {
        // ggml's numbers of the types.
        let kind = match kind.as_u64() {
            Some(1) => Kind::Text,
            Some(2 | 3) => Kind::Control,
            Some(4) => Kind::Whole,
            Some(5) => Kind::Unused,
            _ => {
                let problem = format!("gives {text:?} the type {kind:?}; a byte-level vocabulary has the types 1 to 5");
                return Err(metadata.error(TYPES, problem));
            }
        };
        Ok(Token { text, kind })
    };
    let types = metadata.array(TYPES)?;
    let texts = metadata.texts(types.len())?;
    texts.into_iter().zip(types.iter()).map(token).collect()
}

fn pieces_of(metadata: &Metadata) -> Result<Vec<Piece>, TokenizerError> {
    let types = metadata.array(TYPES)?;
    let texts = metadata.texts(types.len())?;
    let mut pieces = Vec::with_capacity(texts.len());
    for (text, number) in texts.into_iter().zip(types.iter()) {
        let purpose = number.as_u64().and_then(Purpose::of).ok_or_else(|| {
            metadata.error(TYPES, format!("gives {text:?} the type {number:?}; SentencePiece has the types 1 to 6"))
        })?;
        pieces.push(Piece { text, score: 0.0, purpose });
    }
    if metadata.get(SCORES).is_some() {
        let scores = metadata.array(SCORES)?;
        if scores.len() != pieces.len() as u64 {
            let problem = format!("has {} scores for {} tokens", scores.len(), pieces.len());
            return Err(metadata.error(SCORES, problem));
        }
        for (piece, score) in pieces.iter_mut().zip(scores.iter()) {
            piece.score = match score {
                MetadataValue::F32(score) if score.is_finite() => score,
                _ => return Err(metadata.error(SCORES, "holds what is no f32 number")),
            };
        }
    }
    Ok(pieces)
}

/// The two tokens of the merge `text`, which is at `index` in its list.
fn split_merge(index: usize, text: &str) -> Result<(String, String), VocabularyProblem> {
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

    fn vocabulary(&self, problem: VocabularyProblem) -> TokenizerError {
        TokenizerError::Vocabulary { path: self.path.clone(), problem }
    }

    /// The texts of all tokens, of which there must be `types`.
    fn texts(&self, types: u64) -> Result<Vec<String>, TokenizerError> {
        let texts = self.array(TOKENS)?;
        let found = texts.len();
        if found > TOKENS_LIMIT as u64 {
            return Err(self.vocabulary(VocabularyProblem::TooLarge { found, limit: TOKENS_LIMIT }));
        }
        if types != found {
            return Err(self.error(TYPES, format!("has {types} types for {found} tokens")));
        }
        let text = |value| match value {
            MetadataValue::String(text) => Ok(text),
            _ => Err(self.error(TOKENS, "holds what is no text")),
        };
        texts.iter().map(text).collect()
    }

    fn merges(&self, merges: &MetadataArray) -> Result<Vec<(String, String)>, TokenizerError> {
        let merge = |(index, merge): (usize, MetadataValue)| {
            let MetadataValue::String(text) = merge else { return Err(self.error(MERGES, "holds what is no text")) };
            split_merge(index, &text).map_err(|problem| self.vocabulary(problem))
        };
        merges.iter().enumerate().map(merge).collect()
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
