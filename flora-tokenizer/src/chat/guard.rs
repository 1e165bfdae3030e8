//! Control tokens that are spelled in what people say: they stay text. Each is marked before a template sees it, so that it is found
//! in what the template makes of it, and the mark goes when control tokens have been told from text.

use super::{ChatError, Content, Conversation, Message};
use serde_json::{Map, Value};
use std::borrow::Cow;

/// Characters for private use.
const MARKS: std::ops::RangeInclusive<char> = '\u{10ff00}'..='\u{10fffd}';

/// Variables of a template that others may have written: descriptions of tools, and documents.
const SAID: [&str; 2] = ["tools", "documents"];

/// Marks control tokens in what is said.
pub(crate) struct Guard<'a> {
    /// How they are written.
    controls: Vec<&'a str>,
    /// Follows the first character of each.
    mark: char,
}

/// A message with marks.
struct Marked<'a> {
    message: &'a Message<'a>,
    text: Cow<'a, str>,
    parts: Vec<String>,
    name: Option<Cow<'a, str>>,
    tool_calls: Option<Value>,
    tool_call_id: Option<Cow<'a, str>>,
}

impl<'a> Guard<'a> {
    /// Of these control tokens, in `conversation`; `None` where it spells none.
    ///
    /// # Errors
    /// [`ChatError::Unmarkable`]
    pub(crate) fn of(
        controls: impl Iterator<Item = &'a str>,
        conversation: &Conversation<'_>,
    ) -> Result<Option<Self>, ChatError> {
        let controls: Vec<&str> = controls.filter(|control| !control.is_empty()).collect();
        let mut said = String::new();
        for message in conversation.messages {
            match message.content {
                Content::None => {}
                Content::Text(text) => said.push_str(text),
                Content::Parts(parts) => said.extend(parts.iter().map(String::as_str)),
            }
            said.push('\n');
            said.extend(message.name.into_iter().chain(message.tool_call_id));
            let calls = message.tool_calls.map(Value::to_string).unwrap_or_default();
            said.push_str(&calls);
            said.push('\n');
        }
        let variables = SAID.iter().filter_map(|name| conversation.variables.get(*name));
        said.extend(variables.map(Value::to_string));
        if !controls.iter().any(|control| said.contains(control)) {
            return Ok(None);
        }
        let mark = MARKS.rev().find(|mark| !said.contains(*mark)).ok_or(ChatError::Unmarkable)?;
        Ok(Some(Self { controls, mark }))
    }

    /// What is taken out of a text once its control tokens are known.
    pub(crate) fn mark(&self) -> char {
        self.mark
    }

    /// Does something with the conversation whose messages are marked.
    pub(crate) fn with<T>(&self, conversation: &Conversation<'_>, work: impl FnOnce(&Conversation<'_>) -> T) -> T {
        let marked: Vec<Marked<'_>> = conversation.messages.iter().map(|message| self.message(message)).collect();
        let messages: Vec<Message<'_>> = marked
            .iter()
            .map(|Marked { message, text, parts, name, tool_calls, tool_call_id }| Message {
                role: message.role,
                content: match message.content {
                    Content::None => Content::None,
                    Content::Text(_) => Content::Text(text),
                    Content::Parts(_) => Content::Parts(parts),
                },
                name: name.as_deref(),
                tool_calls: tool_calls.as_ref(),
                tool_call_id: tool_call_id.as_deref(),
            })
            .collect();
        let mut variables = conversation.variables.clone();
        for (_, value) in variables.iter_mut().filter(|(name, _)| SAID.contains(&name.as_str())) {
            *value = self.value(value);
        }
        work(&Conversation { messages: &messages, next: conversation.next, variables: &variables })
    }

    fn message<'m>(&self, message: &'m Message<'m>) -> Marked<'m> {
        let (text, parts) = match message.content {
            Content::None => (Cow::Borrowed(""), Vec::new()),
            Content::Text(text) => (self.text(text), Vec::new()),
            Content::Parts(parts) => (Cow::Borrowed(""), self.parts(parts)),
        };
        let (name, tool_call_id) =
            (message.name.map(|name| self.text(name)), message.tool_call_id.map(|id| self.text(id)));
        let tool_calls = message.tool_calls.map(|calls| self.value(calls));
        Marked { message, text, parts, name, tool_calls, tool_call_id }
    }

    /// Places behind the first character of each control token.
    fn places(&self, text: &str) -> Vec<usize> {
        let of = |control: &&str| {
            let first = control.chars().next().map_or(0, char::len_utf8);
            text.match_indices(*control).map(move |(start, _)| start + first).collect::<Vec<_>>()
        };
        let mut places: Vec<usize> = self.controls.iter().flat_map(of).collect();
        places.sort_unstable();
        places.dedup();
        places
    }

    fn text<'t>(&self, text: &'t str) -> Cow<'t, str> {
        let places = self.places(text);
        if places.is_empty() { Cow::Borrowed(text) } else { Cow::Owned(self.marked(text, places.into_iter())) }
    }

    fn marked(&self, text: &str, places: impl Iterator<Item = usize>) -> String {
        let (mut marked, mut written) = (String::with_capacity(text.len() + 8), 0);
        for place in places {
            marked.push_str(&text[written..place]);
            marked.push(self.mark);
            written = place;
        }
        marked + &text[written..]
    }

    /// Parts that follow one another, which may spell a token together.
    fn parts(&self, parts: &[String]) -> Vec<String> {
        let places = self.places(&parts.concat());
        let mut start = 0;
        let mark = |part: &String| {
            let end = start + part.len();
            // A place at the end of a part is one at the start of the next.
            let own = places.iter().filter(|place| (start..end).contains(place)).map(|place| place - start);
            let marked = self.marked(part, own.collect::<Vec<_>>().into_iter());
            start = end;
            marked
        };
        parts.iter().map(mark).collect()
    }

    fn value(&self, value: &Value) -> Value {
        match value {
            Value::String(text) => Value::String(self.text(text).into_owned()),
            Value::Array(items) => items.iter().map(|item| self.value(item)).collect(),
            Value::Object(entries) => {
                let entries = entries.iter().map(|(key, value)| (self.text(key).into_owned(), self.value(value)));
                Value::Object(entries.collect::<Map<_, _>>())
            }
            other => other.clone(),
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::chat::Next;
    use serde_json::json;

    #[test]
    fn what_is_said_is_marked_wherever_it_spells_a_control_token() {
        let parts = ["<|e".to_owned(), "nd|> ä<".to_owned(), String::new(), "s><".to_owned()];
        let calls = json!([{"function": {"name": "<s>", "arguments": {"<s>": ["a<|end|>"]}}}]);
        let messages = [
            Message { content: Content::Parts(&parts), ..Message::text("user", "") },
            Message { name: Some("<s>"), ..Message::text("user", "fine < s>") },
            Message { content: Content::None, tool_calls: Some(&calls), ..Message::text("assistant", "") },
        ];
        let variables = Map::from_iter([("tools".to_owned(), json!(["<s>"])), ("bos_token".to_owned(), json!("<s>"))]);
        let conversation = Conversation { messages: &messages, next: Next::Answer, variables: &variables };
        let guard =
            Guard::of(["<s>", "<|end|>", ""].into_iter(), &conversation).expect("a mark").expect("something to mark");
        let mark = guard.mark();
        guard.with(&conversation, |marked| {
            let Content::Parts(parts) = marked.messages[0].content else { panic!("parts") };
            assert_eq!(parts.concat(), format!("<{mark}|end|> ä<{mark}s><"));
            assert_eq!(parts.len(), 4);
            assert_eq!(marked.messages[1].content, Content::Text("fine < s>"));
            assert_eq!(marked.messages[1].name, Some(&*format!("<{mark}s>")));
            let s = format!("<{mark}s>");
            let expected = json!([{"function": {"name": s, "arguments": {s.clone(): [format!("a<{mark}|end|>")]}}}]);
            assert_eq!(marked.messages[2].tool_calls, Some(&expected));
            assert_eq!(marked.variables["tools"], json!([s]));
            assert_eq!(marked.variables["bos_token"], json!("<s>"));
        });
    }

    #[test]
    fn a_mark_is_no_character_of_the_conversation() {
        let text = format!("<s>{}", MARKS.rev().take(3).collect::<String>());
        let messages = [Message::text("user", &text)];
        let conversation = Conversation { messages: &messages, next: Next::Answer, variables: &Map::new() };
        let guard = Guard::of(["<s>"].into_iter(), &conversation).expect("a mark").expect("something to mark");
        assert!(!text.contains(guard.mark()));
        assert!(Guard::of(["<e>"].into_iter(), &conversation).expect("a mark").is_none());
    }
}
