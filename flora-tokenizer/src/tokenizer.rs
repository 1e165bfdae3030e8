//! Text to token ids and back.

use crate::chat::{ChatError, ChatTemplate, Message};
use crate::description::{Description, Kind, SpecialIds, Token};
use crate::error::{EncodeError, TokenizerError};
use crate::pieces::Pieces;
use crate::vocabulary::{Vocabulary, bytes_of_all};
use crate::{folder, gguf};
use flora_checkpoint::FileError;
use std::path::Path;
use std::sync::Arc;
use tokenizers::normalizers::NFC;
use tokenizers::{Model, OffsetType, PreTokenizedString};

/// The longest text that is encoded, in bytes: more than a context of 128 Ki tokens holds. The library takes up to four seconds
/// and 300 times as much memory for one that is all digits.
const TEXT_LIMIT: usize = 2 << 20;

/// What to make of control tokens that are written out in a text, such as `<|im_end|>`.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Specials {
    /// They are the tokens: for a conversation that [`Tokenizer::chat`] wrote.
    Parse,
    /// They are text like any other: for what people write.
    Plain,
}

/// The tokenizer of a model.
pub struct Tokenizer {
    tokens: Vec<Token>,
    bytes: Arc<[Vec<u8>]>,
    vocabulary: Vocabulary,
    pieces: Pieces,
    compose: Option<NFC>,
    special: SpecialIds,
    template: Option<ChatTemplate>,
}

impl Tokenizer {
    /// Reads the tokenizer of the model at `path`: a GGUF file, a folder with `tokenizer.json`, or a file in such a folder.
    ///
    /// # Errors
    /// The files are missing or damaged, or say what isn't supported: anything but byte-level BPE.
    pub fn open(path: &Path) -> Result<Tokenizer, TokenizerError> {
        let metadata = std::fs::metadata(path).map_err(|source| FileError::Io {
            path: path.to_owned(),
            action: "open",
            source,
        })?;
        let is_gguf = path.extension().is_some_and(|extension| extension == "gguf");
        Self::new(match (metadata.is_dir(), is_gguf) {
            (true, _) => folder::read(path)?,
            (false, true) => gguf::read(path)?,
            (false, false) => folder::read(path.parent().unwrap_or(Path::new("")))?,
        })
    }

    fn new(description: Description) -> Result<Tokenizer, TokenizerError> {
        let Description { path, tokens, merges, whole_pieces_first, compose, pieces, special, chat_template } =
            description;
        let fail = |problem| TokenizerError::Vocabulary { path: path.clone(), problem };
        let vocabulary = Vocabulary::new(&tokens, merges, whole_pieces_first).map_err(fail)?;
        let bytes = bytes_of_all(&tokens).map_err(fail)?.into();
        let SpecialIds { beginning, end, more_ends, prompts_begin } = &special;
        let outside = |id: &&u32| **id as usize >= tokens.len();
        if let Some(id) = beginning.iter().chain(end).chain(more_ends).find(outside) {
            let problem = format!("is {id}, but there are {} tokens", tokens.len());
            return Err(TokenizerError::entry(&path, "the id of a special token", problem));
        }
        if *prompts_begin && beginning.is_none() {
            let problem = "is missing, though prompts are to start with it";
            return Err(TokenizerError::entry(&path, "the token that a text begins with", problem));
        }
        let template = chat_template.map(|source| {
            let text = |id: Option<u32>| id.and_then(|id| tokens.get(id as usize)).map(|token| token.text.clone());
            ChatTemplate { source, beginning: text(*beginning), end: text(*end) }
        });
        let compose = compose.then_some(NFC);
        Ok(Tokenizer { bytes, vocabulary, pieces, compose, template, special, tokens })
    }

    /// The tokens of `text`, without one to begin with.
    ///
    /// Where the vocabulary has no token for a byte, the byte is left out, as Hugging Face's tokenizers do.
    ///
    /// # Errors
    /// The text is longer than any context, or the model's pattern fails on it.
    pub fn encode(&self, text: &str, specials: Specials) -> Result<Vec<u32>, EncodeError> {
        if text.len() > TEXT_LIMIT {
            return Err(EncodeError::TooLong { found: text.len(), limit: TEXT_LIMIT });
        }
        let whole = match specials {
            Specials::Parse => &self.vocabulary.with_controls,
            Specials::Plain => &self.vocabulary.without_controls,
        };
        let mut pieces: PreTokenizedString = whole.extract_and_normalize(self.compose.as_ref(), text);
        let tokens = self
            .pieces
            .cut(&mut pieces)
            .and_then(|()| pieces.tokenize(|piece| self.vocabulary.bpe.tokenize(piece.get())))
            .and_then(|()| pieces.into_encoding(None, 0, OffsetType::None));
        Ok(tokens.map_err(|error| EncodeError::Pattern(error.to_string()))?.get_ids().to_vec())
    }

    /// [`encode`](Self::encode), with the token in front that the model wants before every prompt, if it wants one.
    ///
    /// # Errors
    /// As [`encode`](Self::encode).
    pub fn prompt(&self, text: &str, specials: Specials) -> Result<Vec<u32>, EncodeError> {
        let beginning = self.special.beginning.filter(|_| self.special.prompts_begin);
        Ok(beginning.into_iter().chain(self.encode(text, specials)?).collect())
    }

    /// The text of `tokens`; control tokens and ids that are none give no text, bytes that are no UTF-8 give U+FFFD.
    pub fn decode(&self, tokens: &[u32]) -> String {
        let bytes: Vec<u8> = tokens.iter().filter_map(|id| self.bytes.get(*id as usize)).flatten().copied().collect();
        String::from_utf8_lossy(&bytes).into_owned()
    }

    /// The exact bytes of each token, by id: put together they are the text, though a character may be spread over several.
    /// Control tokens have none.
    pub fn token_bytes(&self) -> Arc<[Vec<u8>]> {
        self.bytes.clone()
    }

    /// The number of ids. The model's own vocabulary may be padded to more.
    pub fn vocabulary(&self) -> usize {
        self.tokens.len()
    }

    /// The tokens that end what a model generates, each once.
    pub fn stop_tokens(&self) -> Vec<u32> {
        let mut ends: Vec<u32> = self.special.end.iter().chain(&self.special.more_ends).copied().collect();
        ends.sort_unstable();
        ends.dedup();
        ends
    }

    /// The control tokens and how they are written, such as `<|im_end|>`, by id.
    pub fn special_tokens(&self) -> impl Iterator<Item = (u32, &str)> {
        let control = |(id, token)| match token {
            &Token { ref text, kind: Kind::Control(_) } => Some((id, &text[..])),
            _ => None,
        };
        (0..).zip(&self.tokens).filter_map(control)
    }

    /// The conversation as the model was trained to read it, ready for the assistant's answer; to be encoded with
    /// [`Specials::Parse`].
    ///
    /// # Errors
    /// The model has no template, or it refuses the messages or fails on them.
    pub fn chat(&self, messages: &[Message<'_>]) -> Result<String, ChatError> {
        self.template.as_ref().ok_or(ChatError::NoTemplate)?.render(messages)
    }
}

impl std::fmt::Debug for Tokenizer {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.debug_struct("Tokenizer").field("vocabulary", &self.tokens.len()).field("special", &self.special).finish()
    }
}
