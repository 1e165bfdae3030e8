//! GBNF, the notation of llama.cpp's grammars and of most that are written for vLLM, as Lark: other signs for the same rules.

use std::collections::HashMap;
use std::fmt::Write;
use std::iter::Peekable;
use std::str::Chars;

use serde_json::Value;

/// Whether a grammar is in GBNF: its rules are defined by `::=`.
pub(super) fn is_gbnf(grammar: &str) -> bool {
    let before_comment = |line: &str| line.split('#').next().is_some_and(|line| line.contains("::="));
    grammar.lines().any(before_comment)
}

/// The grammar in Lark.
///
/// # Errors
/// What is no GBNF, with its line.
pub(super) fn to_lark(grammar: &str) -> Result<String, String> {
    let signs = signs(grammar)?;
    let mut names = Names(HashMap::from([("root".to_owned(), "start".to_owned())]));
    let mut lark = String::new();
    for (index, sign) in signs.iter().enumerate() {
        match sign {
            Sign::Name(name) => {
                // A rule goes on to where the next one is defined, over lines.
                if signs.get(index + 1) == Some(&Sign::Defines) && index > 0 {
                    lark.push('\n');
                }
                lark += &names.lark(name);
            }
            Sign::Defines => lark.push(':'),
            // JSON leaves this one control character as it is, and Lark takes none.
            Sign::Text(text) => lark += &Value::from(&text[..]).to_string().replace('\u{7f}', "\\u007f"),
            Sign::Class(class) => {
                let _ = write!(lark, "/[{class}]/");
            }
            Sign::Any => lark += "/./s",
            Sign::Number(number) => lark += number,
            Sign::Other(other) => lark.push(*other),
        }
        if !matches!(signs.get(index + 1), Some(Sign::Other('*' | '+' | '?' | '{')))
            && !matches!(sign, Sign::Other('{'))
        {
            lark.push(' ');
        }
    }
    Ok(lark)
}

#[derive(Debug, PartialEq)]
enum Sign {
    Name(String),
    /// `::=`
    Defines,
    /// A quoted text, as it reads.
    Text(String),
    /// The inside of a class, as regular expressions have it.
    Class(String),
    Any,
    Number(String),
    Other(char),
}

/// Lark's names of rules, in small letters.
struct Names(HashMap<String, String>);

impl Names {
    fn lark(&mut self, name: &str) -> String {
        if let Some(known) = self.0.get(name) {
            return known.clone();
        }
        let small = name.to_lowercase();
        let mut lark = small.clone();
        let mut count = 1;
        while self.0.values().any(|taken| *taken == lark) {
            count += 1;
            lark = format!("{small}-{count}");
        }
        self.0.insert(name.to_owned(), lark.clone());
        lark
    }
}

fn signs(grammar: &str) -> Result<Vec<Sign>, String> {
    let mut signs = Vec::new();
    for (number, line) in (1..).zip(grammar.lines()) {
        let fault = |what: &str| format!("line {number} of the grammar {what}");
        let mut characters = line.chars().peekable();
        while let Some(character) = characters.next() {
            let sign = match character {
                '#' => break,
                character if character.is_whitespace() => continue,
                ':' if characters.next() == Some(':') && characters.next() == Some('=') => Sign::Defines,
                '"' => Sign::Text(text(&mut characters).ok_or_else(|| fault("has a text that doesn't end"))?),
                '[' => Sign::Class(class(&mut characters).ok_or_else(|| fault("has a class that isn't one"))?),
                '.' => Sign::Any,
                character if character.is_ascii_alphabetic() => {
                    let mut name = String::from(character);
                    while let Some(more) =
                        characters.next_if(|more| more.is_ascii_alphanumeric() || matches!(more, '-' | '_'))
                    {
                        name.push(more);
                    }
                    Sign::Name(name)
                }
                '0'..='9' => {
                    let mut number = String::from(character);
                    while let Some(more) = characters.next_if(char::is_ascii_digit) {
                        number.push(more);
                    }
                    Sign::Number(number)
                }
                '(' | ')' | '|' | '*' | '+' | '?' | '{' | '}' | ',' => Sign::Other(character),
                character => return Err(fault(&format!("has {character:?}, which GBNF doesn't"))),
            };
            signs.push(sign);
        }
    }
    Ok(signs)
}

/// What is quoted, up to the closing quote.
fn text(characters: &mut Peekable<Chars<'_>>) -> Option<String> {
    let mut text = String::new();
    loop {
        match characters.next()? {
            '"' => return Some(text),
            '\\' => text.push(escaped(characters)?),
            character => text.push(character),
        }
    }
}

/// A class up to its closing bracket, with its characters by their numbers.
fn class(characters: &mut Peekable<Chars<'_>>) -> Option<String> {
    let mut class = String::new();
    if characters.next_if_eq(&'^').is_some() {
        class.push('^');
    }
    let start = class.len();
    loop {
        match characters.next()? {
            ']' => return (class.len() > start).then_some(class),
            '-' if class.len() > start && characters.peek().is_some_and(|next| *next != ']') => class.push('-'),
            character => {
                let character = if character == '\\' { escaped(characters)? } else { character };
                let _ = write!(class, "\\x{{{:x}}}", u32::from(character));
            }
        }
    }
}

/// The character that an escape stands for.
fn escaped(characters: &mut Peekable<Chars<'_>>) -> Option<char> {
    let digits = match characters.next()? {
        'n' => return Some('\n'),
        't' => return Some('\t'),
        'r' => return Some('\r'),
        'x' => 2,
        'u' => 4,
        'U' => 8,
        character => return Some(character),
    };
    let number: String = characters.by_ref().take(digits).collect();
    char::from_u32(u32::from_str_radix(&number, 16).ok().filter(|_| number.len() == digits)?)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn rules_are_written_in_larks_signs() {
        let gbnf = r##"
            # An expression of digits.
            root  ::= Term ("+" Term)* # and so on
              | "none"
            Term ::= [0-9]{1,12} | "(" root ")" |
              [^a-z\]"\n-] . "\x41\"\u00e9"
            term ::= "x"?
        "##;
        assert!(is_gbnf(gbnf) && !is_gbnf("start: \"a\" # ::= is not here"));
        let expected = [
            r#"start : term ( "+" term )* | "none" "#,
            r#"term : /[\x{30}-\x{39}]/{1 , 12 } | "(" start ")" | /[^\x{61}-\x{7a}\x{5d}\x{22}\x{a}\x{2d}]/ /./s "A\"é" "#,
            r#"term-2 : "x"? "#,
        ];
        assert_eq!(to_lark(gbnf).unwrap(), expected.join("\n"));
    }

    #[test]
    fn what_is_no_gbnf_is_told_with_its_line() {
        for (grammar, line) in [
            ("root ::= \"a", "line 1"),
            ("root ::=\n [", "line 2"),
            ("root ::= []", "line 1"),
            ("root ::= \"\\x4\"", "line 1"),
            ("root ::= \"a\" :", "line 1"),
            ("root ::= \"a\"\n\n $", "line 3"),
        ] {
            let told = to_lark(grammar).unwrap_err();
            assert!(told.starts_with(line), "{told}");
        }
    }
}
