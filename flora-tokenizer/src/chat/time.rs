//! Today's date as Python's `strftime` writes it.

use chrono::NaiveDateTime;
use chrono::format::{Item, StrftimeItems};
use minijinja::{Error, ErrorKind};
use std::fmt::Write;

/// The longest format, in bytes.
const FORMAT_LIMIT: usize = 1024;

/// `now` in `format`. The zone of a local time is empty, as Python has it; what is no specifier stays as it is.
pub(super) fn strftime(now: NaiveDateTime, format: &str) -> Result<String, Error> {
    if format.len() > FORMAT_LIMIT {
        let message = format!("strftime_now got a format of {} bytes; at most {FORMAT_LIMIT} are taken", format.len());
        return Err(Error::new(ErrorKind::InvalidOperation, message));
    }
    let mut text = String::new();
    let mut rest = format;
    while let Some(percent) = rest.find('%') {
        text.push_str(&rest[..percent]);
        let length = specifier(&rest[percent..]);
        let (specifier, after) = rest[percent..].split_at(length);
        rest = after;
        if matches!(specifier, "%Z" | "%z") {
            continue;
        }
        let items: Vec<Item<'_>> = StrftimeItems::new(specifier).collect();
        let is_known = !items.iter().any(|item| matches!(item, Item::Error));
        let before = text.len();
        if !is_known || write!(text, "{}", now.format_with_items(items.iter())).is_err() {
            text.truncate(before);
            text.push_str(specifier);
        }
    }
    text.push_str(rest);
    Ok(text)
}

/// How long the specifier at the start of `text` is: a percent sign, flags of padding, a letter.
fn specifier(text: &str) -> usize {
    let mut length = 0;
    for character in text.chars() {
        length += character.len_utf8();
        if length > 1 && !matches!(character, '-' | '_' | '0' | '^' | '#') {
            break;
        }
    }
    length
}

#[cfg(test)]
mod tests {
    use super::*;
    use chrono::NaiveDate;

    /// Expected values are those of Python 3.11 on Linux.
    #[test]
    fn dates_are_written_as_python_writes_them() {
        let now = NaiveDate::from_ymd_opt(2024, 7, 4).and_then(|day| day.and_hms_opt(9, 5, 3)).expect("a time");
        for (format, expected) in [
            ("%Y-%m-%d", "2024-07-04"),
            ("%d %b %Y", "04 Jul 2024"),
            ("%B %-d, %Y", "July 4, 2024"),
            ("%A, %e.%m.%y", "Thursday,  4.07.24"),
            ("%H:%M:%S %p %I %j", "09:05:03 AM 09 186"),
            ("100%% of %Y%Z%z|", "100% of 2024|"),
            ("%", "%"),
            ("no date", "no date"),
            ("%ä", "%ä"),
        ] {
            assert_eq!(strftime(now, format).expect("a text"), expected, "{format}");
        }
        assert!(strftime(now, &"%Y".repeat(600)).is_err());
    }
}
