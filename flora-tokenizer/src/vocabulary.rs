//! A checked vocabulary: every token once, and the exact bytes of each where they are defined.

use crate::description::{Kind, Spelling, Token};
use crate::error::VocabularyProblem;
use std::collections::HashMap;
use tokenizers::models::bpe::{BPE, Vocab};
use tokenizers::normalizers::NFC;
use tokenizers::{AddedToken, AddedVocabulary, Model};

/// The most tokens of a vocabulary; the largest known has about 260,000.
pub(crate) const TOKENS_LIMIT: usize = 1 << 21;

/// The most bytes of all tokens that are looked for in texts; the largest known vocabularies have about 100,000.
pub(crate) const SPECIALS_LIMIT: usize = 1 << 20;

/// Pieces that the BPE remembers, as the library does by default.
const CACHED_PIECES: usize = 10_000;

/// The byte-level BPE of `tokens`, and the tokens that are looked for in texts.
///
/// Control tokens are not in the BPE, or it could make one of plain text.
pub(crate) fn byte_level(
    tokens: &[Token],
    merges: Vec<(String, String)>,
    whole_pieces_first: bool,
) -> Result<(BPE, AddedVocabulary), VocabularyProblem> {
    let ids = ids(tokens)?;
    let texts: HashMap<&str, u32> = text_ids(&ids, tokens).collect();
    for (index, (left, right)) in merges.iter().enumerate() {
        let merged = format!("{left}{right}");
        let missing = [left, right, &merged].into_iter().find(|text| !texts.contains_key(&text[..]));
        if let Some(text) = missing {
            return Err(VocabularyProblem::UnknownMerge { index, text: text.clone() });
        }
    }
    let vocabulary: Vocab = texts.iter().map(|(text, id)| (text.to_string(), *id)).collect();
    let bpe = BPE::builder()
        .vocab_and_merges(vocabulary, merges)
        .cache_capacity(CACHED_PIECES)
        .ignore_merges(whole_pieces_first)
        .build()
        .map_err(|error| VocabularyProblem::Refused(error.to_string()))?;
    Ok((bpe, added_vocabulary(tokens, &ids)?))
}

/// The ids of all tokens that stand for something.
pub(crate) fn ids(tokens: &[Token]) -> Result<HashMap<&str, u32>, VocabularyProblem> {
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

/// Those of them that stand for text that a model cuts.
pub(crate) fn text_ids<'a>(
    ids: &'a HashMap<&'a str, u32>,
    tokens: &'a [Token],
) -> impl Iterator<Item = (&'a str, u32)> {
    let is_text = |(_, id): &(&&str, &u32)| tokens[**id as usize].kind == Kind::Text;
    ids.iter().filter(is_text).map(|(text, id)| (*text, *id))
}

/// The tokens that are looked for in texts, with the ids that they have.
pub(crate) fn added_vocabulary(
    tokens: &[Token],
    ids: &HashMap<&str, u32>,
) -> Result<AddedVocabulary, VocabularyProblem> {
    let added: Vec<AddedToken> = tokens
        .iter()
        .filter(|token| matches!(token.kind, Kind::Control | Kind::Whole))
        .map(|token| AddedToken::from(&token.text[..], token.kind == Kind::Control).normalized(false))
        .collect();
    check_length(added.iter().map(|token| token.content.len()))?;
    // Added tokens get the ids that a model knows for them.
    let all: Vocab = ids.iter().map(|(text, id)| (text.to_string(), *id)).collect();
    let all = BPE::builder().vocab_and_merges(all, Vec::new()).cache_capacity(0).build();
    let all = all.map_err(|error| VocabularyProblem::Refused(error.to_string()))?;
    let mut vocabulary = AddedVocabulary::new();
    vocabulary.add_tokens(&added, &all, None::<&NFC>);
    debug_assert!(
        added
            .iter()
            .all(|token| vocabulary.get_vocab().get(&token.content) == all.token_to_id(&token.content).as_ref())
    );
    Ok(vocabulary)
}

/// Refuses tokens whose search would take memory without end.
pub(crate) fn check_length(lengths: impl Iterator<Item = usize>) -> Result<(), VocabularyProblem> {
    let found = lengths.fold(0, usize::saturating_add);
    match found > SPECIALS_LIMIT {
        true => Err(VocabularyProblem::LongSpecials { found, limit: SPECIALS_LIMIT }),
        false => Ok(()),
    }
}

/// The exact bytes of every token, none where it stands for no text; `None` where what a token says depends on others.
pub(crate) fn bytes_of_all(tokens: &[Token], spelling: Spelling) -> Option<Vec<Vec<u8>>> {
    let byte_of = byte_of_characters();
    let text = |text: &str| match spelling {
        Spelling::ByteLevel => {
            let bytes: Option<Vec<u8>> = text.chars().map(|character| byte_of.get(&character).copied()).collect();
            // The library reads such a token as it is.
            Some(bytes.unwrap_or_else(|| text.as_bytes().to_vec()))
        }
        Spelling::Escaped(space) => {
            Some(escaped_byte(text).map_or_else(|| text.replace(space, " ").into_bytes(), |byte| vec![byte]))
        }
        Spelling::Other => None,
    };
    let bytes = |token: &Token| match token.kind {
        Kind::Control | Kind::Unused => Some(Vec::new()),
        Kind::Whole if spelling == Spelling::ByteLevel => Some(token.text.clone().into_bytes()),
        Kind::Whole | Kind::Text => text(&token.text),
    };
    tokens.iter().map(bytes).collect()
}

/// The byte that `<0x41>` stands for.
fn escaped_byte(text: &str) -> Option<u8> {
    let digits = text.strip_prefix("<0x")?.strip_suffix('>')?;
    let are_two = digits.len() == 2 && digits.bytes().all(|digit| digit.is_ascii_hexdigit());
    are_two.then(|| u8::from_str_radix(digits, 16).ok())?
}

/// The first token for text that holds a character which stands for no byte.
pub(crate) fn not_byte_level(tokens: &[Token]) -> Option<VocabularyProblem> {
    let byte_of = byte_of_characters();
    let is_strange = |token: &Token| {
        token.kind == Kind::Text && !token.text.chars().all(|character| byte_of.contains_key(&character))
    };
    (0..)
        .zip(tokens)
        .find(|(_, token)| is_strange(token))
        .map(|(id, token)| VocabularyProblem::NotByteLevel { id, text: token.text.clone() })
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

    #[test]
    fn escaped_bytes_are_two_digits() {
        assert_eq!(
            ["<0x41>", "<0xff>", "<0x4>", "<0x+1>", "0x41"].map(escaped_byte),
            [Some(0x41), Some(0xff), None, None, None]
        );
    }
}
