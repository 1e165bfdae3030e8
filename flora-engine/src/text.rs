//! Tokens to text: tokens stand for bytes or are read together, and what is passed on is whole characters.

use std::fmt;
use std::sync::Arc;

/// What tokens say.
#[derive(Clone)]
pub struct Vocabulary(Meaning);

#[derive(Clone)]
enum Meaning {
    /// Each stands for bytes.
    Bytes {
        bytes: Arc<[u8]>,
        /// Where each token's bytes end.
        ends: Arc<[usize]>,
    },
    /// What one says depends on those around it.
    Text(Arc<Decode>),
}

/// Tokens to the text of all of them.
type Decode = dyn Fn(&[u32]) -> String + Send + Sync;

impl Vocabulary {
    /// Of tokens 0, 1, … that stand for bytes; special ones have none.
    pub fn new(tokens: Vec<Vec<u8>>) -> Self {
        let ends = tokens.iter().scan(0, |end, token| {
            *end += token.len();
            Some(*end)
        });
        Self(Meaning::Bytes { ends: ends.collect(), bytes: tokens.concat().into() })
    }

    /// Of tokens that are read together: `decode` gives the text of several that follow each other, in time that grows with
    /// their number. A character that isn't whole yet is U+FFFD at the end of it.
    pub fn decoded(decode: impl Fn(&[u32]) -> String + Send + Sync + 'static) -> Self {
        Self(Meaning::Text(Arc::new(decode)))
    }

    /// What reads the tokens that follow `prompt`, one after the other.
    pub(crate) fn reader(&self, prompt: &[u32]) -> Reader {
        match &self.0 {
            Meaning::Bytes { .. } => Reader::Bytes(Utf8Assembler::default()),
            Meaning::Text(_) => {
                let around = prompt[prompt.len().saturating_sub(TOKENS_BEFORE)..].to_vec();
                Reader::Text { read: around.len(), window: around }
            }
        }
    }
}

impl Default for Vocabulary {
    /// Tokens that say nothing.
    fn default() -> Self {
        Self::new(Vec::new())
    }
}

impl fmt::Debug for Vocabulary {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match &self.0 {
            Meaning::Bytes { ends, .. } => f.debug_struct("Vocabulary").field("tokens", &ends.len()).finish(),
            Meaning::Text(_) => f.debug_struct("Vocabulary").finish_non_exhaustive(),
        }
    }
}

/// Tokens of a prompt that are read again with the first that follow: enough for whatever a decoder does where a text begins.
const TOKENS_BEFORE: usize = 5;

/// Tokens that may wait for a character to become whole. A character has four bytes, so more are no character.
const TOKENS_HELD: usize = 8;

/// Reads the tokens of one sequence as they come.
#[derive(Debug)]
pub(crate) enum Reader {
    Bytes(Utf8Assembler),
    /// Those that were passed on last, which the next are read with, and those that were not passed on yet.
    Text {
        window: Vec<u32>,
        read: usize,
    },
}

impl Reader {
    /// The whole characters that there are with one more token.
    pub(crate) fn push(&mut self, token: u32, vocabulary: &Vocabulary) -> String {
        match (self, &vocabulary.0) {
            (Self::Bytes(utf8), Meaning::Bytes { bytes, ends }) => utf8.push(bytes_of(bytes, ends, token)),
            (Self::Text { window, read }, Meaning::Text(decode)) => {
                window.push(token);
                let held = window.len() - *read;
                next_text(window, read, &**decode, held >= TOKENS_HELD)
            }
            // A reader is only used with the vocabulary that it comes from.
            _ => String::new(),
        }
    }

    /// What is left of a character that never became whole.
    pub(crate) fn flush(&mut self, vocabulary: &Vocabulary) -> String {
        match (self, &vocabulary.0) {
            (Self::Bytes(utf8), _) => utf8.flush(),
            (Self::Text { window, read }, Meaning::Text(decode)) if *read < window.len() => {
                next_text(window, read, &**decode, true)
            }
            _ => String::new(),
        }
    }
}

/// The text of `window` beyond that of its first `read` tokens, once it ends with a whole character or is taken `anyhow`.
fn next_text(window: &mut Vec<u32>, read: &mut usize, decode: &dyn Fn(&[u32]) -> String, anyhow: bool) -> String {
    let (before, now) = (decode(&window[..*read]), decode(window));
    let is_whole = !now.ends_with(char::REPLACEMENT_CHARACTER);
    // Where one token changes what those before it say, there is no more to pass on than what is new.
    let shared = before.char_indices().zip(now.chars()).take_while(|((_, a), b)| a == b);
    let start = shared.last().map_or(0, |((start, character), _)| start + character.len_utf8());
    if !anyhow && (!is_whole || now.len() <= before.len()) {
        return String::new();
    }
    let text = if now.len() > before.len() { now[start..].to_owned() } else { String::new() };
    window.drain(..*read);
    *read = window.len();
    text
}

/// What a token stands for; nothing where there is no such token, as where a model's vocabulary is padded.
fn bytes_of<'a>(bytes: &'a [u8], ends: &[usize], token: u32) -> &'a [u8] {
    let token = token as usize;
    let Some(end) = ends.get(token) else {
        return &[];
    };
    let start = token.checked_sub(1).map_or(0, |before| ends[before]);
    &bytes[start..*end]
}

/// Puts characters together from bytes that come in pieces. Bytes that are no UTF-8 become U+FFFD, as
/// [`String::from_utf8_lossy`] would have it of all of them at once.
#[derive(Debug, Default)]
pub(crate) struct Utf8Assembler {
    /// The beginning of a character.
    begun: Vec<u8>,
}

impl Utf8Assembler {
    /// The characters that are whole by now.
    pub(crate) fn push(&mut self, bytes: &[u8]) -> String {
        self.begun.extend_from_slice(bytes);
        let bytes = std::mem::take(&mut self.begun);
        let mut text = String::with_capacity(bytes.len());
        let mut rest = bytes.as_slice();
        loop {
            match std::str::from_utf8(rest) {
                Ok(valid) => {
                    text.push_str(valid);
                    return text;
                }
                Err(error) => {
                    let (valid, after) = rest.split_at(error.valid_up_to());
                    text.push_str(&String::from_utf8_lossy(valid));
                    let Some(invalid) = error.error_len() else {
                        self.begun = after.to_vec();
                        return text;
                    };
                    text.push(char::REPLACEMENT_CHARACTER);
                    rest = &after[invalid..];
                }
            }
        }
    }

    /// What is left of a character that never became whole.
    pub(crate) fn flush(&mut self) -> String {
        let begun = std::mem::take(&mut self.begun);
        String::from_utf8_lossy(&begun).into_owned()
    }
}

#[cfg(test)]
mod tests {
    use proptest::prelude::*;

    use super::*;

    #[test]
    fn a_vocabulary_keeps_each_tokens_bytes() {
        let vocabulary = Vocabulary::new(vec![b"ab".to_vec(), Vec::new(), b"\xff".to_vec()]);
        let Meaning::Bytes { bytes, ends } = vocabulary.0 else { panic!("tokens that stand for bytes") };
        let bytes = |token| bytes_of(&bytes, &ends, token);
        assert_eq!(bytes(0), b"ab");
        assert_eq!(bytes(1), b"");
        assert_eq!(bytes(2), b"\xff");
        assert_eq!(bytes(3), b"");
        assert_eq!(bytes(u32::MAX), b"");
    }

    #[test]
    fn a_character_is_passed_on_when_it_is_whole() {
        let mut utf8 = Utf8Assembler::default();
        let crab = "🦀".as_bytes();
        assert_eq!(utf8.push(&crab[..1]), "");
        assert_eq!(utf8.push(&crab[1..3]), "");
        assert_eq!(utf8.push(&[crab[3], b'!', 0xe2]), "🦀!");
        assert_eq!(utf8.flush(), "\u{fffd}");
        assert_eq!(utf8.flush(), "");
    }

    /// Letters, and two tokens that are one character together; read with a space between tokens where `spaced`.
    fn read_together(spaced: bool) -> Vocabulary {
        Vocabulary::decoded(move |tokens| {
            let mut bytes = Vec::new();
            for (index, token) in tokens.iter().enumerate() {
                if spaced && index > 0 {
                    bytes.push(b' ');
                }
                bytes.push(*token as u8);
            }
            String::from_utf8_lossy(&bytes).into_owned()
        })
    }

    #[test]
    fn tokens_that_are_read_together_are_passed_on_as_they_come() {
        let vocabulary = read_together(true);
        let mut reader = vocabulary.reader(&[u32::from(b'x')]);
        let said: Vec<String> = b"abc".iter().map(|token| reader.push(u32::from(*token), &vocabulary)).collect();
        assert_eq!(said, [" a", " b", " c"]);
        assert_eq!(reader.flush(&vocabulary), "");
        let mut reader = vocabulary.reader(&[]);
        assert_eq!(reader.push(u32::from(b'a'), &vocabulary), "a");
    }

    #[test]
    fn characters_of_tokens_that_are_read_together_come_whole() {
        let vocabulary = read_together(false);
        let mut reader = vocabulary.reader(&[u32::from(b'x'); 9]);
        let said: Vec<String> = "a🦀é".bytes().map(|byte| reader.push(byte.into(), &vocabulary)).collect();
        assert_eq!(said, ["a", "", "", "", "🦀", "", "é"]);
        assert_eq!(reader.push(0xe2, &vocabulary), "");
        assert_eq!(reader.flush(&vocabulary), "\u{fffd}");
        // Bytes that never become a character don't hold the text back for ever.
        let mut reader = vocabulary.reader(&[]);
        let said: String = (0..20).map(|_| reader.push(0xff, &vocabulary)).collect();
        let said = said + &reader.push(u32::from(b'a'), &vocabulary);
        assert!(said.starts_with('\u{fffd}') && said.ends_with('a'), "{said:?}");
    }

    proptest! {
        /// However the bytes are cut, the text is that of all of them; arbitrary bytes and cut characters both.
        #[test]
        fn pieces_make_the_text_of_the_whole(
            pieces in prop::collection::vec(
                prop_oneof![
                    prop::collection::vec(any::<u8>(), 0..4),
                    any::<char>().prop_map(|c| c.to_string().into_bytes()),
                    any::<char>().prop_map(|c| c.to_string().into_bytes()[..1].to_vec()),
                ],
                0..20,
            ),
            width in 1usize..5,
        ) {
            let whole = pieces.concat();
            let mut utf8 = Utf8Assembler::default();
            let mut text: String = whole.chunks(width).map(|piece| utf8.push(piece)).collect();
            text += &utf8.flush();
            prop_assert_eq!(text, String::from_utf8_lossy(&whole));
        }
    }
}
