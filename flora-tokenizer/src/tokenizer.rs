//! Text to token ids and back.

use crate::chat::{ChatError, ChatTemplate, Conversation, Guard};
use crate::description::{Frame, Kind, Parts, SpecialIds, Spelling, Token};
use crate::error::{EncodeError, TokenizerError};
use crate::vocabulary::bytes_of_all;
use crate::{folder, gguf};
use flora_checkpoint::{FileError, SharedBytes};
use std::cell::Cell;
use std::collections::BTreeMap;
use std::ops::Range;
use std::panic::{AssertUnwindSafe, catch_unwind};
use std::path::Path;
use std::sync::Arc;
use tokenizers::{AddedVocabulary, Encoding, Model, OffsetType, PreTokenizedString, PreTokenizer};

/// The longest text that is encoded, in bytes: more than a context of 128 Ki tokens holds. The library takes up to four seconds
/// and 300 times as much memory for one that is all digits.
const TEXT_LIMIT: usize = 2 << 20;

/// The longest chat template, in bytes.
const TEMPLATE_LIMIT: u64 = 1 << 20;

/// What to make of control tokens that are written out in a text, such as `<|im_end|>`.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Specials {
    /// They are the tokens: for a conversation that [`Tokenizer::chat`] wrote.
    Parse,
    /// They are text like any other: for what people write.
    Plain,
}

/// How a text is read.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum Reading {
    /// With control tokens.
    Controls,
    /// As text alone.
    Text,
    /// With control tokens, but for those that have this character in them, which belongs to no text.
    Marked(char),
}

impl From<Specials> for Reading {
    fn from(specials: Specials) -> Self {
        match specials {
            Specials::Parse => Self::Controls,
            Specials::Plain => Self::Text,
        }
    }
}

/// The tokenizer of a model.
pub struct Tokenizer {
    inner: tokenizers::Tokenizer,
    /// Finds whole tokens in texts, but no control tokens.
    without_controls: AddedVocabulary,
    tokens: Vec<Token>,
    spelling: Spelling,
    bytes: Option<Arc<[Vec<u8>]>>,
    frame: Frame,
    special: SpecialIds,
    /// What templates may ask for, by names like `bos_token`.
    special_texts: BTreeMap<String, String>,
    template: Option<ChatTemplate>,
    /// Whether that is one that the operator named.
    template_is_chosen: bool,
}

impl Tokenizer {
    /// Reads the tokenizer of the model at `path`: a GGUF file, a folder with `tokenizer.json` or `tokenizer.model`, or a file
    /// in such a folder.
    ///
    /// # Errors
    /// The files are missing or damaged, or say what isn't supported.
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

    fn new(parts: Parts) -> Result<Tokenizer, TokenizerError> {
        let Parts { path, inner, tokens, spelling, frame, special, special_texts, chat_template } = parts;
        let SpecialIds { end, more_ends, unknown } = &special;
        let (before, after) = match frame {
            Frame::Processor => (None, None),
            Frame::Tokens { before, after } => (before, after),
        };
        let mut ids = before.iter().chain(&after).chain(end).chain(more_ends).chain(unknown);
        if let Some(id) = ids.find(|id| **id as usize >= tokens.len()) {
            let problem = format!("is {id}, but there are {} tokens", tokens.len());
            return Err(TokenizerError::entry(&path, "the id of a special token", problem));
        }
        let mut without_controls = inner.get_added_vocabulary().clone();
        without_controls.set_encode_special_tokens(true);
        let bytes = bytes_of_all(&tokens, spelling).map(Arc::from);
        let template = chat_template.map(|source| ChatTemplate::new(&source, special_texts.clone()));
        Ok(Tokenizer {
            inner,
            without_controls,
            tokens,
            spelling,
            bytes,
            frame,
            special,
            special_texts,
            template,
            template_is_chosen: false,
        })
    }

    /// Writes conversations by the template in the file at `path`, whatever the model's files have.
    ///
    /// # Errors
    /// The file can't be read, or isn't text.
    pub fn choose_template(&mut self, path: &Path) -> Result<(), TokenizerError> {
        self.template = Some(ChatTemplate::new(&template_file(path)?, self.special_texts.clone()));
        self.template_is_chosen = true;
        Ok(())
    }

    /// The tokens of `text`, without those to begin and end with.
    ///
    /// Where the vocabulary has no token for a character or byte, it is left out, as Hugging Face's tokenizers do.
    ///
    /// # Errors
    /// The text is longer than any context, or the model's pattern fails on it.
    pub fn encode(&self, text: &str, specials: Specials) -> Result<Vec<u32>, EncodeError> {
        Ok(self.encoding(text, specials.into(), OffsetType::None)?.get_ids().to_vec())
    }

    /// [`encode`](Self::encode), with the tokens around it that the model wants around every prompt, if it wants some.
    ///
    /// # Errors
    /// As [`encode`](Self::encode).
    pub fn prompt(&self, text: &str, specials: Specials) -> Result<Vec<u32>, EncodeError> {
        self.framed(self.encoding(text, specials.into(), OffsetType::None)?)
    }

    /// [`prompt`](Self::prompt), and for each token where its first byte lies in `text`. A token around the text lies at its start or at its
    /// end.
    ///
    /// # Errors
    /// As [`encode`](Self::encode).
    pub fn prompt_places(&self, text: &str, specials: Specials) -> Result<(Vec<u32>, Vec<usize>), EncodeError> {
        let encoding = self.encoding(text, specials.into(), OffsetType::Byte)?;
        let (own, places) = (encoding.get_ids().to_vec(), places(&encoding));
        let tokens = self.framed(encoding)?;
        // Tokens are put around the text, and its own stay as they are.
        let before = tokens.windows(own.len().max(1)).position(|tokens| tokens == own).unwrap_or(0);
        let after = tokens.len().saturating_sub(before + own.len());
        let all = std::iter::repeat_n(0, before).chain(places).chain(std::iter::repeat_n(text.len(), after)).collect();
        Ok((tokens, all))
    }

    /// The tokens with those that the model wants around every prompt.
    fn framed(&self, encoding: Encoding) -> Result<Vec<u32>, EncodeError> {
        match self.frame {
            Frame::Tokens { before, after } => {
                Ok(before.into_iter().chain(encoding.get_ids().iter().copied()).chain(after).collect())
            }
            Frame::Processor => {
                let prompt = guarded(|| self.inner.post_process(encoding, None, true))?;
                Ok(prompt.get_ids().to_vec())
            }
        }
    }

    /// Places of tokens in the text are found only where `offsets` says so.
    fn encoding(&self, text: &str, reading: Reading, offsets: OffsetType) -> Result<Encoding, EncodeError> {
        if text.len() > TEXT_LIMIT {
            return Err(EncodeError::TooLong { found: text.len(), limit: TEXT_LIMIT });
        }
        let (added, mark) = match reading {
            Reading::Controls => (self.inner.get_added_vocabulary(), None),
            Reading::Text => (&self.without_controls, None),
            Reading::Marked(mark) => (self.inner.get_added_vocabulary(), Some(mark)),
        };
        let (encoding, has_controls) = guarded(|| self.tokenize(added, text, mark, (false, offsets)))?;
        // A vocabulary may hold control tokens among those for text, where a model finds them.
        if reading == Reading::Controls || !has_controls {
            return Ok(encoding);
        }
        Ok(guarded(|| self.tokenize(added, text, mark, (true, offsets)))?.0)
    }

    /// The library's own steps, and whether control tokens were found in text that is none of `added`. `mark` is taken out of that
    /// text. `apart` cuts pieces that hold a control token within it, so that none comes of them.
    fn tokenize(
        &self,
        added: &AddedVocabulary,
        text: &str,
        mark: Option<char>,
        (apart, offsets): (bool, OffsetType),
    ) -> tokenizers::Result<(Encoding, bool)> {
        let mut pieces: PreTokenizedString = added.extract_and_normalize(self.inner.get_normalizer(), text);
        if let Some(mark) = mark {
            pieces.normalize(|piece| {
                piece.filter(|character| character != mark);
                Ok(())
            })?;
        }
        if let Some(cut) = self.inner.get_pre_tokenizer() {
            cut.pre_tokenize(&mut pieces)?;
        }
        if apart {
            let controls: Vec<&str> = self.special_tokens().map(|(_, text)| text).collect();
            pieces.split(|_, piece| {
                let cuts = cuts_within(piece.get(), &controls);
                let starts = std::iter::once(0).chain(cuts.iter().copied());
                let ends = cuts.iter().copied().chain([piece.get().len()]);
                Ok(starts
                    .zip(ends)
                    .filter_map(|(start, end)| {
                        piece.slice(tokenizers::tokenizer::normalizer::Range::Normalized(start..end))
                    })
                    .collect::<Vec<_>>())
            })?;
        }
        let has_controls = Cell::new(false);
        pieces.tokenize(|piece| {
            let mut tokens = self.inner.get_model().tokenize(piece.get())?;
            if tokens.iter().any(|token| self.is_control(token.id)) {
                has_controls.set(true);
            }
            if apart {
                tokens.retain(|token| !self.is_control(token.id));
            }
            Ok(tokens)
        })?;
        Ok((pieces.into_encoding(None, 0, offsets)?, has_controls.get()))
    }

    /// Whether `id` is a control token that text can't stand for; the one for unknown text is written for text.
    fn is_control(&self, id: u32) -> bool {
        self.special.unknown != Some(id)
            && self.tokens.get(id as usize).is_some_and(|token| token.kind == Kind::Control)
    }

    /// The text of `tokens`; control tokens and ids that are none give no text, bytes that are no UTF-8 give U+FFFD.
    pub fn decode(&self, tokens: &[u32]) -> String {
        match (&self.bytes, self.spelling) {
            (Some(bytes), Spelling::ByteLevel) => {
                let bytes: Vec<u8> =
                    tokens.iter().filter_map(|id| bytes.get(*id as usize)).flatten().copied().collect();
                String::from_utf8_lossy(&bytes).into_owned()
            }
            // The library fails where its own decoder is given what it can't have written.
            _ => guarded(|| self.inner.decode(tokens, true)).unwrap_or_default(),
        }
    }

    /// What one token says by itself: its bytes, or the name of a control token. Nothing for an id that is none.
    pub fn spelled(&self, id: u32) -> Vec<u8> {
        let Some(token) = self.tokens.get(id as usize) else { return Vec::new() };
        match (&self.bytes, token.kind) {
            (_, Kind::Control) => token.text.clone().into_bytes(),
            (Some(bytes), _) => bytes.get(id as usize).cloned().unwrap_or_default(),
            (None, _) => self.decode(&[id]).into_bytes(),
        }
    }

    /// The exact bytes of each token, by id: put together they are the text, though a character may be spread over several.
    /// Control tokens have none. `None` where what a token says depends on those around it, and [`decode`](Self::decode) reads
    /// them together.
    pub fn token_bytes(&self) -> Option<Arc<[Vec<u8>]>> {
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

    /// The token that ends a text, where the model has one: what templates call `eos_token`.
    pub fn end_token(&self) -> Option<u32> {
        self.special.end
    }

    /// The control tokens and how they are written, such as `<|im_end|>`, by id.
    pub fn special_tokens(&self) -> impl Iterator<Item = (u32, &str)> {
        let control = |(id, token): (u32, &'_ Token)| (token.kind == Kind::Control).then_some(id);
        (0..).zip(&self.tokens).filter_map(move |(id, token)| Some((control((id, token))?, &token.text[..])))
    }

    /// How a token is written in the vocabulary, if there is one with this id.
    pub(crate) fn token(&self, id: u32) -> Option<&str> {
        let token = self.tokens.get(id as usize)?;
        (token.kind != Kind::Unused).then_some(&token.text[..])
    }

    /// The id of the control token that is written as `text`.
    pub(crate) fn special_id(&self, text: &str) -> Option<u32> {
        self.special_tokens().find(|(_, known)| *known == text).map(|(id, _)| id)
    }

    /// The template of a conversation.
    pub fn template(&self) -> Option<&ChatTemplate> {
        self.template.as_ref()
    }

    /// What templates may ask for, by names like `bos_token`.
    pub fn special_texts(&self) -> &BTreeMap<String, String> {
        &self.special_texts
    }

    pub(crate) fn template_is_chosen(&self) -> bool {
        self.template_is_chosen
    }

    /// The tokens of the conversation as `template` writes it, or else the model's own template. Control tokens are the template's
    /// alone: one that a message, a call of a tool or the description of one spells is text.
    ///
    /// # Errors
    /// There is no template, or it refuses the messages or fails on them; or what it writes has no tokens.
    pub fn conversation(
        &self,
        template: Option<&ChatTemplate>,
        conversation: &Conversation<'_>,
    ) -> Result<Vec<u32>, ChatError> {
        let write = |template: &ChatTemplate, marked: &Conversation<'_>| template.render(marked);
        let (text, reading) = self.written(template, conversation, write)?;
        Ok(self.encoding(&text, reading, OffsetType::None)?.get_ids().to_vec())
    }

    /// [`conversation`](Self::conversation), and which of the tokens are each message's: those whose first byte is one of its content's.
    ///
    /// # Errors
    /// As [`conversation`](Self::conversation), and [`ChatError::Changed`].
    pub fn conversation_places(
        &self,
        template: Option<&ChatTemplate>,
        conversation: &Conversation<'_>,
    ) -> Result<(Vec<u32>, Vec<Range<usize>>), ChatError> {
        let write = |template: &ChatTemplate, marked: &Conversation<'_>| template.render_places(marked);
        let ((text, contents), reading) = self.written(template, conversation, write)?;
        let encoding = self.encoding(&text, reading, OffsetType::Byte)?;
        let places = places(&encoding);
        let tokens_of = |content: Range<usize>| {
            places.partition_point(|place| *place < content.start)..places.partition_point(|place| *place < content.end)
        };
        Ok((encoding.get_ids().to_vec(), contents.into_iter().map(tokens_of).collect()))
    }

    /// What `write` makes of the conversation with the template, and how that is to be read.
    fn written<T>(
        &self,
        template: Option<&ChatTemplate>,
        conversation: &Conversation<'_>,
        write: impl Fn(&ChatTemplate, &Conversation<'_>) -> Result<T, ChatError>,
    ) -> Result<(T, Reading), ChatError> {
        let template = template.or(self.template.as_ref()).ok_or(ChatError::NoTemplate)?;
        let controls =
            || (0..).zip(&self.tokens).filter(|(id, _)| self.is_control(*id)).map(|(_, token)| &token.text[..]);
        match Guard::of(controls(), conversation)? {
            None => Ok((write(template, conversation)?, Reading::Controls)),
            Some(guard) => {
                let written = guard.with(conversation, |marked| write(template, marked))?;
                Ok((written, Reading::Marked(guard.mark())))
            }
        }
    }

    /// The conversation as the model was trained to read it; to be encoded with [`Specials::Parse`].
    ///
    /// # Errors
    /// The model has no template, or it refuses the messages or fails on them.
    pub fn chat(&self, conversation: &Conversation<'_>) -> Result<String, ChatError> {
        self.template.as_ref().ok_or(ChatError::NoTemplate)?.render(conversation)
    }
}

/// Where each token's first byte lies in the text, in rising order.
fn places(encoding: &Encoding) -> Vec<usize> {
    let mut last = 0;
    let place = |(start, _): &(usize, usize)| {
        // A token for what isn't in the text has the place of the one before.
        last = last.max(*start);
        last
    };
    encoding.get_offsets().iter().map(place).collect()
}

/// Places behind the first character of each of `texts` wherever it occurs in `piece`, in order.
fn cuts_within(piece: &str, texts: &[&str]) -> Vec<usize> {
    let mut cuts: Vec<usize> = texts
        .iter()
        .flat_map(|text| {
            let first = text.chars().next().map_or(0, char::len_utf8);
            piece.match_indices(text).map(move |(start, _)| start + first)
        })
        .filter(|cut| (1..piece.len()).contains(cut))
        .collect();
    cuts.sort_unstable();
    cuts.dedup();
    cuts
}

/// The library's answer; some of its parts panic at files that nobody would write.
fn guarded<T>(work: impl FnOnce() -> tokenizers::Result<T>) -> Result<T, EncodeError> {
    match catch_unwind(AssertUnwindSafe(work)) {
        Ok(result) => result.map_err(|error| EncodeError::Pattern(error.to_string())),
        Err(_) => Err(EncodeError::Pattern("the tokenizer library fails at it".to_owned())),
    }
}

/// The text of the template in the file at `path`.
pub(crate) fn template_file(path: &Path) -> Result<String, TokenizerError> {
    let bytes = SharedBytes::read(path, TEMPLATE_LIMIT)?;
    let problem = |_| TokenizerError::entry(path, "the template", "is not UTF-8");
    Ok(std::str::from_utf8(bytes.as_slice()).map_err(problem)?.to_string())
}

impl std::fmt::Debug for Tokenizer {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.debug_struct("Tokenizer").field("vocabulary", &self.tokens.len()).field("special", &self.special).finish()
    }
}
