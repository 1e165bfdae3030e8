//! What is encoded and decoded is what it was, all at once or token by token.

use crate::files::{Source, both, smollm2};
use crate::mutation::settings;
use flora_tokenizer::{Specials, Tokenizer};
use proptest::prelude::*;
use std::collections::HashSet;
use std::sync::LazyLock;

static SMALL: LazyLock<[Tokenizer; 2]> = LazyLock::new(|| both(&Source::small()));
static SMOLLM2: LazyLock<Option<Tokenizer>> = LazyLock::new(smollm2);

/// What a client sees who gets the bytes of one token after another and prints whole characters only.
fn streamed(tokenizer: &Tokenizer, tokens: &[u32]) -> String {
    let bytes = tokenizer.token_bytes().expect("a byte-level vocabulary");
    let (mut text, mut waiting) = (String::new(), Vec::new());
    for token in tokens {
        waiting.extend_from_slice(&bytes[*token as usize]);
        let whole = std::str::from_utf8(&waiting).map_or_else(|error| error.valid_up_to(), str::len);
        text.push_str(std::str::from_utf8(&waiting[..whole]).expect("the valid part"));
        waiting.drain(..whole);
    }
    assert!(waiting.is_empty(), "{waiting:?}");
    text
}

fn check(tokenizer: &Tokenizer, text: &str) -> Result<(), TestCaseError> {
    let tokens = tokenizer.encode(text, Specials::Plain).expect("tokens");
    prop_assert_eq!(tokenizer.decode(&tokens), text);
    prop_assert_eq!(streamed(tokenizer, &tokens), text);
    let control: HashSet<u32> = tokenizer.special_tokens().map(|(id, _)| id).collect();
    prop_assert!(tokens.iter().all(|token| !control.contains(token)), "{:?}", tokens);
    Ok(())
}

/// Strings of any characters, and strings like those that people write.
fn texts() -> impl Strategy<Value = String> {
    let pieces =
        ["hello", " ", "  ", "\n", "'ll", "12", "ä", "<|end|>", "<|im_end|>", "<|", "日", "👍🏽", "\u{301}", "\r"];
    prop_oneof![
        ".{0,40}",
        prop::collection::vec(any::<char>(), 0..40).prop_map(String::from_iter),
        prop::collection::vec(prop::sample::select(pieces.to_vec()), 0..30).prop_map(|pieces| pieces.concat()),
    ]
}

proptest! {
    #![proptest_config(settings())]

    #[test]
    fn any_text_comes_back(text in texts()) {
        for tokenizer in &*SMALL {
            check(tokenizer, &text)?;
        }
    }

    #[test]
    fn both_kinds_of_files_give_the_same_tokens(text in texts()) {
        for specials in [Specials::Plain, Specials::Parse] {
            let [first, second] = &*SMALL;
            prop_assert_eq!(first.encode(&text, specials), second.encode(&text, specials));
        }
    }

    #[test]
    fn smollm2_gives_back_what_its_vocabulary_can_write(text in texts()) {
        if let Some(tokenizer) = &*SMOLLM2 {
            let bytes = tokenizer.token_bytes().expect("a byte-level vocabulary");
            let known: HashSet<u8> = bytes.iter().filter(|token| token.len() == 1).map(|token| token[0]).collect();
            let text: String =
                text.chars().filter(|c| c.encode_utf8(&mut [0; 4]).bytes().all(|byte| known.contains(&byte))).collect();
            check(tokenizer, &text)?;
        }
    }
}

#[test]
fn control_tokens_are_parsed_where_asked() {
    for tokenizer in &*SMALL {
        let text = "hello<|end|>hello <|start|>";
        let parsed = tokenizer.encode(text, Specials::Parse).expect("tokens");
        let hello = tokenizer.encode("hello", Specials::Plain).expect("tokens")[0];
        let space = tokenizer.encode(" ", Specials::Plain).expect("tokens")[0];
        assert_eq!(parsed, [hello, 0, hello, space, 1]);
        assert_eq!(tokenizer.decode(&parsed), "hellohello ");
        assert_eq!(tokenizer.stop_tokens(), [0]);
    }
}

#[test]
fn a_byte_without_a_token_is_left_out() {
    let mut source = Source::small();
    source.characters.retain(|character| character != "z");
    for tokenizer in both(&source) {
        assert_eq!(tokenizer.decode(&tokenizer.encode("azb", Specials::Plain).expect("tokens")), "ab");
    }
}

/// Texts on which a pattern that looks ahead, or a quadratic merge, would take for ever.
#[test]
fn long_texts_of_one_kind_are_encoded_whole() {
    let [tokenizer, _] = &*SMALL;
    for piece in [" ", "a", "\n", "1", "!", "日", "  x"] {
        let text = piece.repeat(60_000 / piece.len()) + "x";
        assert_eq!(tokenizer.decode(&tokenizer.encode(&text, Specials::Plain).expect("tokens")), text);
    }
    let too_long = " ".repeat((2 << 20) + 1);
    let error = tokenizer.encode(&too_long, Specials::Plain).expect_err("too long").to_string();
    assert!(error.contains("has 2097153 bytes; at most 2097152"), "{error}");
}
