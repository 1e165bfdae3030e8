//! Tokens to text: tokens stand for bytes, and what is passed on is whole characters.

/// The bytes that each token stands for.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct Vocabulary {
    bytes: Vec<u8>,
    /// Where each token's bytes end.
    ends: Vec<usize>,
}

impl Vocabulary {
    /// Of tokens 0, 1, …; special ones have no bytes.
    pub fn new(tokens: Vec<Vec<u8>>) -> Self {
        let ends = tokens.iter().scan(0, |end, token| {
            *end += token.len();
            Some(*end)
        });
        Self { ends: ends.collect(), bytes: tokens.concat() }
    }

    /// What a token stands for; nothing where there is no such token, as where a model's vocabulary is padded.
    pub fn bytes(&self, token: u32) -> &[u8] {
        let token = token as usize;
        let Some(end) = self.ends.get(token) else {
            return &[];
        };
        let start = token.checked_sub(1).map_or(0, |before| self.ends[before]);
        &self.bytes[start..*end]
    }
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
        assert_eq!(vocabulary.bytes(0), b"ab");
        assert_eq!(vocabulary.bytes(1), b"");
        assert_eq!(vocabulary.bytes(2), b"\xff");
        assert_eq!(vocabulary.bytes(3), b"");
        assert_eq!(vocabulary.bytes(u32::MAX), b"");
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
