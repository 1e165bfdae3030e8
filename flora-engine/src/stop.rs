//! Stop strings in text that comes in pieces: what may still become one is held back until it is known.

/// Looks for stop strings.
#[derive(Debug)]
pub(crate) struct StopStrings {
    strings: Vec<String>,
    /// Text that was held back: the beginning of some stop string.
    held: String,
}

/// What a piece of text came to.
#[derive(Debug, PartialEq, Eq)]
pub(crate) enum Found {
    /// No stop string so far; this much may be passed on.
    Text(String),
    /// A stop string; this is what was before it.
    Stop(String),
}

impl StopStrings {
    pub(crate) fn new(strings: Vec<String>) -> Self {
        Self { strings, held: String::new() }
    }

    /// The stop string that ends first counts, of those the one that begins first: what would be found if the text came
    /// character by character, so that it doesn't matter how tokens cut it.
    pub(crate) fn push(&mut self, text: &str) -> Found {
        self.held.push_str(text);
        let occurrences =
            self.strings.iter().filter_map(|string| self.held.find(string).map(|start| (start + string.len(), start)));
        if let Some((_, start)) = occurrences.min() {
            let mut before = std::mem::take(&mut self.held);
            before.truncate(start);
            return Found::Stop(before);
        }
        let kept = self.held.split_off(self.undecided_from());
        Found::Text(std::mem::replace(&mut self.held, kept))
    }

    /// Text in which no stop string is looked for, or begun: it is passed on with what was held back.
    pub(crate) fn pass(&mut self, text: &str) -> String {
        let mut passed = std::mem::take(&mut self.held);
        passed.push_str(text);
        passed
    }

    /// What was held back and became nothing.
    pub(crate) fn flush(&mut self) -> String {
        std::mem::take(&mut self.held)
    }

    /// Where the longest end of the text begins that some stop string begins with.
    fn undecided_from(&self) -> usize {
        let longest = self.strings.iter().map(String::len).max().unwrap_or(0);
        let earliest = self.held.len().saturating_sub(longest);
        (earliest..self.held.len())
            .filter(|start| self.held.is_char_boundary(*start))
            .find(|start| self.strings.iter().any(|string| string.starts_with(&self.held[*start..])))
            .unwrap_or(self.held.len())
    }
}

#[cfg(test)]
mod tests {
    use proptest::prelude::*;

    use super::*;

    fn stops(strings: &[&str]) -> StopStrings {
        StopStrings::new(strings.iter().map(|string| (*string).to_string()).collect())
    }

    fn text(text: &str) -> Found {
        Found::Text(text.into())
    }

    #[test]
    fn a_string_may_span_pieces() {
        let mut stop = stops(&["\nUser:"]);
        assert_eq!(stop.push("Hello\n"), text("Hello"));
        assert_eq!(stop.push("Us"), text(""));
        assert_eq!(stop.push("er: more"), Found::Stop(String::new()));
    }

    #[test]
    fn what_becomes_no_stop_string_is_passed_on() {
        let mut stop = stops(&["aab"]);
        assert_eq!(stop.push("aa"), text(""));
        assert_eq!(stop.push("a"), text("a"), "the last two may still begin it");
        assert_eq!(stop.push("c"), text("aac"));
        assert_eq!(stop.push("a"), text(""));
        assert_eq!(stop.flush(), "a");
    }

    #[test]
    fn the_string_that_ends_first_counts() {
        assert_eq!(stops(&["abcd", "bc"]).push("xabcd"), Found::Stop("xa".into()));
        assert_eq!(stops(&["bc", "abc"]).push("xabc"), Found::Stop("x".into()));
    }

    #[test]
    fn characters_stay_whole() {
        let mut stop = stops(&["éa"]);
        assert_eq!(stop.push("xé"), text("x"));
        assert_eq!(stop.push("é"), text("é"));
        assert_eq!(stop.push("a"), Found::Stop(String::new()));
    }

    /// What was passed on, and whether a stop string was found.
    fn run(strings: &[String], pieces: &[String]) -> (String, bool) {
        let mut stop = StopStrings::new(strings.to_vec());
        let mut passed = String::new();
        for piece in pieces {
            match stop.push(piece) {
                Found::Text(text) => passed += &text,
                Found::Stop(text) => return (passed + &text, true),
            }
        }
        (passed + &stop.flush(), false)
    }

    proptest! {
        #[test]
        fn cuts_do_not_matter(
            strings in prop::collection::vec("[abé]{1,4}", 0..4),
            pieces in prop::collection::vec("[abéc]{0,5}", 0..8),
        ) {
            let whole = pieces.concat();
            let characters: Vec<String> = whole.chars().map(String::from).collect();
            let found = run(&strings, &pieces);
            prop_assert_eq!(&found, &run(&strings, &characters));
            prop_assert_eq!(found.1, strings.iter().any(|string| whole.contains(string)));
            prop_assert!(whole.starts_with(&found.0));
            prop_assert!(!strings.iter().any(|string| found.0.contains(string)));
            prop_assert!(found.1 || found.0 == whole);
        }
    }
}
