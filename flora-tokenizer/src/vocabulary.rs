//! A checked vocabulary: every token once, every merge of tokens that are there, and the exact bytes of each token.

use crate::description::{Edges, Kind, Token};
use crate::error::VocabularyProblem;
use std::collections::HashMap;
use tokenizers::models::bpe::BPE;
use tokenizers::normalizers::NFC;
use tokenizers::{AddedToken, AddedVocabulary};

/// The most tokens of a vocabulary; the largest known has about 260,000.
pub(crate) const TOKENS_LIMIT: usize = 1 << 21;

/// The most bytes of all tokens that are looked for in texts; the largest known vocabularies have about 100,000.
const SPECIALS_LIMIT: usize = 1 << 20;

/// Pieces that the BPE remembers, as the library does by default.
const CACHED_PIECES: usize = 10_000;

/// What turns pieces into tokens.
pub(crate) struct Vocabulary {
    pub(crate) bpe: BPE,
    /// Finds control tokens and whole tokens in texts.
    pub(crate) with_controls: AddedVocabulary,
    /// Finds whole tokens only.
    pub(crate) without_controls: AddedVocabulary,
}

impl Vocabulary {
    pub(crate) fn new(
        tokens: &[Token],
        merges: Vec<(String, String)>,
        whole_pieces_first: bool,
    ) -> Result<Self, VocabularyProblem> {
        let ids = ids(tokens)?;
        let text_ids = || ids.iter().filter(|(_, id)| tokens[**id as usize].kind == Kind::Text);
        let texts: HashMap<&str, u32> = text_ids().map(|(text, id)| (*text, *id)).collect();
        for (index, (left, right)) in merges.iter().enumerate() {
            let merged = format!("{left}{right}");
            let missing = [left, right, &merged].into_iter().find(|text| !texts.contains_key(&text[..]));
            if let Some(text) = missing {
                return Err(VocabularyProblem::UnknownMerge { index, text: text.clone() });
            }
        }
        let bpe = |ids: HashMap<String, u32>, merges| {
            BPE::builder()
                .vocab_and_merges(ids.into_iter().collect::<tokenizers::models::bpe::Vocab>(), merges)
                .cache_capacity(CACHED_PIECES)
                .ignore_merges(whole_pieces_first)
                .build()
                .map_err(|error| VocabularyProblem::Refused(error.to_string()))
        };
        let owned = |(text, id): (&&str, &u32)| (text.to_string(), *id);
        let added = added_tokens(tokens)?;
        // Added tokens get the ids that a model knows for them; the one that runs must not know them, or it could make one of
        // plain text.
        let all = bpe(ids.iter().map(owned).collect(), Vec::new())?;
        let mut with_controls = AddedVocabulary::new();
        with_controls.add_tokens(&added, &all, None::<&NFC>);
        let mut without_controls = with_controls.clone();
        without_controls.set_encode_special_tokens(true);
        Ok(Self { bpe: bpe(text_ids().map(owned).collect(), merges)?, with_controls, without_controls })
    }
}

/// The ids of all tokens that stand for something.
fn ids(tokens: &[Token]) -> Result<HashMap<&str, u32>, VocabularyProblem> {
    if tokens.is_empty() {
        return Err(VocabularyProblem::Empty);
    }
    if tokens.len() > TOKENS_LIMIT {
        return Err(VocabularyProblem::TooLarge { found: tokens.len() as u64, limit: TOKENS_LIMIT });
    }
    let mut ids = HashMap::with_capacity(tokens.len());
    for (id, token) in (0..).zip(tokens).filter(|(_, token)| token.kind != Kind::Unused) {
        if let Some(first) = ids.insert(&token.text[..], id) {
            return Err(VocabularyProblem::Repeated { text: token.text.clone(), first, second: id });
        }
    }
    Ok(ids)
}

/// The tokens that are looked for in texts.
fn added_tokens(tokens: &[Token]) -> Result<Vec<AddedToken>, VocabularyProblem> {
    let mut found = 0;
    let mut added = Vec::new();
    for token in tokens {
        let (edges, control) = match token.kind {
            Kind::Control(edges) => (edges, true),
            Kind::Whole(edges) => (edges, false),
            Kind::Text | Kind::Unused => continue,
        };
        found += token.text.len();
        let Edges { strip_left, strip_right, single_word } = edges;
        added.push(
            AddedToken::from(&token.text[..], control)
                .normalized(false)
                .lstrip(strip_left)
                .rstrip(strip_right)
                .single_word(single_word),
        );
    }
    if found > SPECIALS_LIMIT {
        return Err(VocabularyProblem::LongSpecials { found, limit: SPECIALS_LIMIT });
    }
    Ok(added)
}

/// The exact bytes of every token: none where it stands for no text.
pub(crate) fn bytes_of_all(tokens: &[Token]) -> Result<Vec<Vec<u8>>, VocabularyProblem> {
    let byte_of = byte_of_characters();
    let bytes = |(id, token): (u32, &Token)| match token.kind {
        Kind::Control(_) | Kind::Unused => Ok(Vec::new()),
        Kind::Whole(_) => Ok(token.text.clone().into_bytes()),
        Kind::Text => {
            let bytes: Option<Vec<u8>> = token.text.chars().map(|character| byte_of.get(&character).copied()).collect();
            bytes.ok_or_else(|| VocabularyProblem::NotByteLevel { id, text: token.text.clone() })
        }
    };
    (0..).zip(tokens).map(bytes).collect()
}

/// The byte that each character of a byte-level vocabulary stands for, as GPT-2 numbered them: printable Latin-1 stands for
/// itself, the other bytes in order for U+0100 and on.
fn byte_of_characters() -> HashMap<char, u8> {
    let is_itself = |byte: &u8| matches!(byte, b'!'..=b'~' | 0xA1..=0xAC | 0xAE..=0xFF);
    let printable = (0..=u8::MAX).filter(is_itself).map(|byte| (char::from(byte), byte));
    let others = (0..=u8::MAX).filter(|byte| !is_itself(byte));
    let shifted = ('\u{100}'..).zip(others);
    printable.chain(shifted).collect()
}

#[cfg(test)]
mod tests {
    use super::*;
    use tokenizers::pre_tokenizers::byte_level::ByteLevel;

    #[test]
    fn characters_are_those_of_the_library() {
        let ours = byte_of_characters();
        assert_eq!(ours.len(), 256);
        assert_eq!(
            ours.keys().copied().collect::<std::collections::HashSet<_>>(),
            ByteLevel::alphabet().into_iter().collect()
        );
        assert_eq!([ours[&'A'], ours[&'Ġ'], ours[&'Ċ'], ours[&'Ã']], [b'A', b' ', b'\n', 0xC3]);
    }
}
