//! Where the content of each message lies in what a template writes of a conversation.
//!
//! A template may do anything with a message. So the conversation is written twice, with words of our own in place of the contents the
//! second time: what is between the words is the template's. That and the contents, put together again, have to be what was written the
//! first time.

use super::{ChatError, ChatTemplate, Content, Conversation, Message};
use std::ops::Range;

/// What stands for the content of a message: a word that no template changes.
fn word(message: usize) -> String {
    format!("FLORA_THE_CONTENT_OF_MESSAGE_{message}_IS_HERE")
}

impl ChatTemplate {
    /// [`render`](Self::render), and where in it the content of each message lies, in bytes; nowhere for a message without one.
    ///
    /// # Errors
    /// As [`render`](Self::render), and [`ChatError::Changed`].
    pub(crate) fn render_places(
        &self,
        conversation: &Conversation<'_>,
    ) -> Result<(String, Vec<Range<usize>>), ChatError> {
        let now = chrono::Local::now().naive_local();
        let text = self.render_at(conversation, now)?;
        let words: Vec<Vec<String>> = (0..conversation.messages.len()).map(|index| vec![word(index)]).collect();
        let messages: Vec<Message<'_>> = conversation
            .messages
            .iter()
            .zip(&words)
            .map(|(message, words)| Message {
                content: match message.content {
                    Content::None => Content::None,
                    Content::Text(_) => Content::Text(&words[0]),
                    Content::Parts(_) => Content::Parts(words),
                },
                ..*message
            })
            .collect();
        let frame = self.render_at(&Conversation { messages: &messages, ..*conversation }, now)?;
        let contents: Vec<Option<String>> = conversation.messages.iter().map(content).collect();
        let places = find(&text, &frame, &contents)?;
        Ok((text, places))
    }
}

fn content(message: &Message<'_>) -> Option<String> {
    match message.content {
        Content::None => None,
        Content::Text(text) => Some(text.to_owned()),
        Content::Parts(parts) => Some(parts.concat()),
    }
}

/// Where the contents lie in `text`, which is `frame` with them in place of the words.
fn find(text: &str, frame: &str, contents: &[Option<String>]) -> Result<Vec<Range<usize>>, ChatError> {
    let mut places = Vec::with_capacity(contents.len());
    let (mut at, mut rest) = (0, frame);
    let mut last = 0;
    for (index, content) in contents.iter().enumerate() {
        let Some(content) = content else {
            places.push(at..at);
            continue;
        };
        let changed = || ChatError::Changed(index);
        let (before, behind) = rest.split_once(&word(index)).ok_or_else(changed)?;
        at += text.get(at..).and_then(|text| text.strip_prefix(before)).map(|_| before.len()).ok_or_else(changed)?;
        // What follows, up to the next word.
        let next = (index + 1..contents.len()).find(|next| contents[*next].is_some());
        let after = next.map_or(Some(behind), |next| behind.split_once(&word(next)).map(|(after, _)| after));
        let after = after.ok_or(ChatError::Changed(next.unwrap_or(index)))?;
        let written = [content.as_str(), content.trim(), content.trim_end(), content.trim_start()];
        let fits = |written: &&str| {
            let left = text[at..].strip_prefix(*written);
            left.is_some_and(|left| if next.is_some() { left.starts_with(after) } else { left == after })
        };
        let written = written.into_iter().find(fits).ok_or_else(changed)?;
        places.push(at..at + written.len());
        at += written.len();
        (rest, last) = (behind, index);
    }
    match text.get(at..) == Some(rest) {
        true => Ok(places),
        false => Err(ChatError::Changed(last)),
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::chat::Next;
    use serde_json::Map;
    use std::collections::BTreeMap;

    fn places(source: &str, next: Next, contents: &[&str]) -> Result<Vec<String>, ChatError> {
        let template = ChatTemplate::new(source, BTreeMap::new());
        let messages: Vec<_> = contents.iter().map(|content| Message::text("user", content)).collect();
        let conversation = Conversation { messages: &messages, next, variables: &Map::new() };
        let (text, places) = template.render_places(&conversation)?;
        assert_eq!(text, template.render(&conversation).expect("it was written"));
        Ok(places.into_iter().map(|place| text[place].to_owned()).collect())
    }

    #[test]
    fn contents_are_found_where_the_template_puts_them() {
        let plain =
            "{% for m in messages %}<{{ m.role }}>{{ m.content }}</s>{% endfor %}{{ '<a>' if add_generation_prompt }}";
        let trims = "{% for m in messages %}<{{ m.role }}>{{ m.content | trim }}</s>{% endfor %}";
        // Contents that the template's own text holds too.
        let said = ["user", "</s>", " user> ", ""];
        assert_eq!(places(plain, Next::Answer, &said).expect("places"), said);
        assert_eq!(places(trims, Next::Anything, &said).expect("places"), said.map(str::trim));
        assert_eq!(places(plain, Next::Rest, &["a", "and then"]).expect("places"), ["a", "and then"]);
    }

    #[test]
    fn what_a_template_changes_is_not_guessed() {
        let upper = "{% for m in messages %}{{ m.content | upper }}{% endfor %}";
        assert!(matches!(places(upper, Next::Answer, &["a"]), Err(ChatError::Changed(0))));
        let first = "{{ messages[0].content }}!";
        assert!(matches!(places(first, Next::Answer, &["a", "b"]), Err(ChatError::Changed(1))));
        let depends = "{% for m in messages %}{% if 'x' in m.content %}?{% endif %}{{ m.content }}{% endfor %}";
        assert!(matches!(places(depends, Next::Answer, &["ax"]), Err(ChatError::Changed(0))));
        let swapped = "{{ messages[1].content }}{{ messages[0].content }}";
        assert!(matches!(places(swapped, Next::Answer, &["a", "b"]), Err(ChatError::Changed(_))));
    }
}
