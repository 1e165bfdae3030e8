//! SentencePiece models, from a GGUF file's metadata or a folder's `tokenizer.model`, made into the library's tokenizers once.

mod protobuf;

pub(crate) use protobuf::read;

use crate::description::{Kind, Token};
use crate::error::VocabularyProblem;
use crate::vocabulary::{added_vocabulary, ids};
use serde_json::{Value, json};
use std::collections::HashMap;
use tokenizers::models::bpe::{BPE, Vocab};
use tokenizers::models::unigram::Unigram;
use tokenizers::{DecoderWrapper, ModelWrapper, NormalizerWrapper, PreTokenizerWrapper};

/// The character that stands for a space.
pub(crate) const SPACE: char = '▁';

/// The most work of finding the merges of all pieces: the sum of the squares of their lengths in bytes.
const MERGE_WORK: usize = 1 << 28;

/// What a piece is for, as SentencePiece and GGUF number it.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum Purpose {
    Normal,
    Unknown,
    Control,
    UserDefined,
    Unused,
    Byte,
}

impl Purpose {
    pub(crate) fn of(number: u64) -> Option<Self> {
        [Self::Normal, Self::Unknown, Self::Control, Self::UserDefined, Self::Unused, Self::Byte]
            .get(usize::try_from(number.checked_sub(1)?).ok()?)
            .copied()
    }
}

/// One token of a model; its id is its place.
#[derive(Clone, Debug)]
pub(crate) struct Piece {
    pub(crate) text: String,
    pub(crate) score: f32,
    pub(crate) purpose: Purpose,
}

/// Where a space is put before a text.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum Prefix {
    /// Nowhere.
    Never,
    /// Before a text that begins with none, but not behind a special token within it.
    First,
    /// Before every part of a text between special tokens that begins with none.
    EachPart,
    /// Before every part, whatever it begins with: what SentencePiece itself does.
    Always,
}

/// How pieces are chosen.
pub(crate) enum Choice {
    /// The pair with the best score is merged first; or in the order of these merges, where a file has some.
    Merges(Option<Vec<(String, String)>>),
    /// The pieces with the largest sum of scores.
    Unigram,
}

/// A model.
pub(crate) struct Model {
    pub(crate) pieces: Vec<Piece>,
    pub(crate) choice: Choice,
    pub(crate) prefix: Prefix,
    /// Leaves out spaces at the ends and all but one of several.
    pub(crate) removes_spaces: bool,
    /// A table of characters and what is put in their place, in SentencePiece's form; may be empty.
    pub(crate) characters: Vec<u8>,
}

impl Model {
    /// The tokenizer, its tokens by id, and the id for what it has no piece for.
    pub(crate) fn build(self) -> Result<(tokenizers::Tokenizer, Vec<Token>, Option<u32>), VocabularyProblem> {
        let cuts_whole = self.cuts_whole_pieces();
        let token = |piece: &Piece| Token { text: piece.text.clone(), kind: kind(piece, cuts_whole) };
        let tokens: Vec<Token> = self.pieces.iter().map(token).collect();
        let ids = ids(&tokens)?;
        let added = added_vocabulary(&tokens, &ids)?;
        let unknown = (0..).zip(&self.pieces).find(|(_, piece)| piece.purpose == Purpose::Unknown).map(|(id, _)| id);
        let refused = |error: tokenizers::Error| VocabularyProblem::Refused(error.to_string());
        let model: ModelWrapper = match &self.choice {
            Choice::Merges(given) => self.bpe(given.clone(), unknown)?.into(),
            Choice::Unigram => {
                // Ids are places, so that all pieces are there; a control token is never better than its own characters.
                let floor = self.pieces.iter().map(|piece| piece.score).fold(0.0f32, f32::min) - 1e6;
                let scored = self.pieces.iter().map(|piece| {
                    let is_text = matches!(piece.purpose, Purpose::Normal | Purpose::UserDefined | Purpose::Byte);
                    (piece.text.clone(), f64::from(if is_text { piece.score } else { floor }))
                });
                Unigram::from(scored.collect(), unknown.map(|id| id as usize), self.has_bytes())
                    .map_err(refused)?
                    .into()
            }
        };
        let mut tokenizer = tokenizers::Tokenizer::new(model);
        tokenizer.with_normalizer(part::<NormalizerWrapper>(self.normalizer())?);
        tokenizer.with_pre_tokenizer(part::<PreTokenizerWrapper>(self.pre_tokenizer())?);
        tokenizer.with_decoder(part::<DecoderWrapper>(self.decoder())?);
        tokenizer.with_added_vocabulary(added);
        Ok((tokenizer, tokens, unknown))
    }

    fn has_bytes(&self) -> bool {
        self.pieces.iter().any(|piece| piece.purpose == Purpose::Byte)
    }

    fn bpe(&self, given: Option<Vec<(String, String)>>, unknown: Option<u32>) -> Result<BPE, VocabularyProblem> {
        let cuts_whole = self.cuts_whole_pieces();
        let in_model = |piece: &Piece| piece.purpose == Purpose::Unknown || kind(piece, cuts_whole) == Kind::Text;
        let numbered = (0u32..).zip(&self.pieces);
        let vocabulary: Vocab =
            numbered.filter(|(_, piece)| in_model(piece)).map(|(id, piece)| (piece.text.clone(), id)).collect();
        let merges = match given {
            Some(merges) => merges,
            None => self.merges()?,
        };
        for (index, (left, right)) in merges.iter().enumerate() {
            let merged = format!("{left}{right}");
            if let Some(text) = [left, right, &merged].into_iter().find(|text| !vocabulary.contains_key(&text[..])) {
                return Err(VocabularyProblem::UnknownMerge { index, text: text.clone() });
            }
        }
        let mut builder = BPE::builder()
            .vocab_and_merges(vocabulary, merges)
            .fuse_unk(true)
            .byte_fallback(self.has_bytes())
            .ignore_merges(cuts_whole);
        if let Some(unknown) = unknown.and_then(|id| self.pieces.get(id as usize)) {
            builder = builder.unk_token(unknown.text.clone());
        }
        builder.build().map_err(|error| VocabularyProblem::Refused(error.to_string()))
    }

    /// Every way to put a piece together from two, the best pieces first: what SentencePiece does at each step.
    fn merges(&self) -> Result<Vec<(String, String)>, VocabularyProblem> {
        let normal = || (0u32..).zip(&self.pieces).filter(|(_, piece)| piece.purpose == Purpose::Normal);
        let work = normal().fold(0usize, |work, (_, piece)| work.saturating_add(piece.text.len().pow(2)));
        if work > MERGE_WORK {
            return Err(VocabularyProblem::LongPieces);
        }
        let known: HashMap<&str, f32> = normal().map(|(_, piece)| (&piece.text[..], piece.score)).collect();
        let mut merges: Vec<(f32, u32, &str, &str)> = Vec::new();
        for (id, piece) in normal() {
            let cuts = piece.text.char_indices().map(|(place, _)| place).skip(1);
            merges.extend(cuts.filter_map(|place| {
                let (left, right) = piece.text.split_at(place);
                (known.contains_key(left) && known.contains_key(right)).then_some((piece.score, id, left, right))
            }));
        }
        merges.sort_by(|one, other| other.0.total_cmp(&one.0).then((one.1, one.2).cmp(&(other.1, other.2))));
        Ok(merges.into_iter().map(|(_, _, left, right)| (left.to_owned(), right.to_owned())).collect())
    }

    fn normalizer(&self) -> Value {
        let mut steps = Vec::new();
        if !self.characters.is_empty() {
            steps.push(json!({"type": "Precompiled", "precompiled_charsmap": base64(&self.characters)}));
        }
        let replace =
            |pattern: Value, content: &str| json!({"type": "Replace", "pattern": pattern, "content": content});
        if self.removes_spaces {
            steps.push(replace(json!({"Regex": r"\A +| +\z"}), ""));
            steps.push(replace(json!({"Regex": " {2,}"}), " "));
        }
        if self.prefix == Prefix::Always {
            steps.push(json!({"type": "Prepend", "prepend": SPACE}));
        }
        if matches!(self.prefix, Prefix::Never | Prefix::Always) {
            steps.push(replace(json!({"String": " "}), "▁"));
        }
        json!({"type": "Sequence", "normalizers": steps})
    }

    fn pre_tokenizer(&self) -> Value {
        let scheme = match self.prefix {
            Prefix::First => "first",
            Prefix::EachPart => "always",
            Prefix::Always if self.cuts_whole_pieces() => {
                let mut texts: Vec<&str> = self.user_defined().map(|piece| &piece.text[..]).collect();
                texts.sort_by_key(|text| std::cmp::Reverse(text.len()));
                let pattern = texts.into_iter().map(regex::escape).collect::<Vec<_>>().join("|");
                return json!({"type": "Split", "pattern": {"Regex": pattern}, "behavior": "Isolated", "invert": false});
            }
            Prefix::Never | Prefix::Always => return Value::Null,
        };
        json!({"type": "Metaspace", "replacement": SPACE, "prepend_scheme": scheme, "split": false})
    }

    fn user_defined(&self) -> impl Iterator<Item = &Piece> {
        self.pieces.iter().filter(|piece| piece.purpose == Purpose::UserDefined && !piece.text.is_empty())
    }

    /// Whether user-defined pieces are cut out behind the space that is put before a text, as SentencePiece itself does, and not
    /// looked for before that.
    fn cuts_whole_pieces(&self) -> bool {
        self.prefix == Prefix::Always && self.user_defined().next().is_some()
    }

    fn decoder(&self) -> Value {
        let mut steps = vec![
            json!({"type": "Replace", "pattern": {"String": "▁"}, "content": " "}),
            json!({"type": "ByteFallback"}),
            json!({"type": "Fuse"}),
        ];
        if self.prefix != Prefix::Never {
            steps.push(json!({"type": "Strip", "content": " ", "start": 1, "stop": 0}));
        }
        json!({"type": "Sequence", "decoders": steps})
    }
}

fn kind(piece: &Piece, cuts_whole: bool) -> Kind {
    match piece.purpose {
        Purpose::Normal | Purpose::Byte => Kind::Text,
        Purpose::Unknown | Purpose::Control => Kind::Control,
        Purpose::UserDefined if cuts_whole => Kind::Text,
        Purpose::UserDefined => Kind::Whole,
        Purpose::Unused => Kind::Unused,
    }
}

/// A part of a tokenizer, as `tokenizer.json` would write it.
fn part<T: serde::de::DeserializeOwned>(value: Value) -> Result<Option<T>, VocabularyProblem> {
    serde_json::from_value(value).map_err(|error| VocabularyProblem::Refused(error.to_string()))
}

fn base64(bytes: &[u8]) -> String {
    use base64::Engine;
    base64::engine::general_purpose::STANDARD.encode(bytes)
}
