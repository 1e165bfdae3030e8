//! How what a client writes becomes the tokens of a prompt.

use std::fmt;
use std::sync::Arc;

use flora_tokenizer::{Specials, Tokenizer};

use crate::chat::{Message, Role};

/// What a client wrote to the tokens of a prompt; the error is said to the client.
type Read<T> = dyn Fn(&T) -> Result<Vec<u32>, String> + Send + Sync;

/// How a model reads what clients write: as its [`Tokenizer`] does, or as two functions say.
pub struct Text {
    prompt: Box<Read<str>>,
    chat: Box<Read<[Message]>>,
    stop_tokens: Vec<u32>,
}

impl Text {
    /// `prompt` gives the tokens of a text to go on with, `chat` those of a conversation; what either says in its error is said
    /// to the client. `stop_tokens` end what the model says.
    pub fn new(
        prompt: impl Fn(&str) -> Result<Vec<u32>, String> + Send + Sync + 'static,
        chat: impl Fn(&[Message]) -> Result<Vec<u32>, String> + Send + Sync + 'static,
        stop_tokens: Vec<u32>,
    ) -> Self {
        Self { prompt: Box::new(prompt), chat: Box::new(chat), stop_tokens }
    }

    pub(crate) fn prompt(&self, text: &str) -> Result<Vec<u32>, String> {
        (self.prompt)(text)
    }

    pub(crate) fn chat(&self, messages: &[Message]) -> Result<Vec<u32>, String> {
        (self.chat)(messages)
    }

    pub(crate) fn stop_tokens(&self) -> &[u32] {
        &self.stop_tokens
    }
}

impl From<Arc<Tokenizer>> for Text {
    fn from(tokenizer: Arc<Tokenizer>) -> Self {
        let stop_tokens = tokenizer.stop_tokens();
        let of_chats = Arc::clone(&tokenizer);
        Self::new(
            // Control tokens too: the whole prompt is one client's, and a conversation may be written out in it.
            move |text| tokenizer.prompt(text, Specials::Parse).map_err(|error| error.to_string()),
            move |messages| {
                let turns: Vec<_> = messages.iter().map(turn).collect();
                let text = of_chats.chat(&turns).map_err(|error| error.to_string())?;
                of_chats.encode(&text, Specials::Parse).map_err(|error| error.to_string())
            },
            stop_tokens,
        )
    }
}

fn turn(message: &Message) -> flora_tokenizer::Message<'_> {
    let role = match message.role {
        Role::System => "system",
        Role::User => "user",
        Role::Assistant => "assistant",
    };
    flora_tokenizer::Message { role, content: &message.content }
}

impl fmt::Debug for Text {
    fn fmt(&self, formatter: &mut fmt::Formatter<'_>) -> fmt::Result {
        formatter.debug_struct("Text").field("stop_tokens", &self.stop_tokens).finish_non_exhaustive()
    }
}

#[cfg(test)]
mod tests {
    use std::fs;

    use serde_json::{Map, json};

    use super::*;

    /// Letters as tokens 0 to 25, and the two that ChatML puts around a turn.
    fn letters(template: Option<&str>) -> Text {
        let vocabulary: Map<_, _> = ('a'..='z').map(String::from).zip((0..).map(|id: u32| json!(id))).collect();
        let special = |id: u32, content: &str| json!({"id": id, "content": content, "special": true});
        let tokenizer = json!({
            "model": {"type": "BPE", "vocab": vocabulary, "merges": []},
            "added_tokens": [special(26, "<|im_start|>"), special(27, "<|im_end|>")],
            "pre_tokenizer": {"type": "ByteLevel", "add_prefix_space": false, "use_regex": true},
            "decoder": {"type": "ByteLevel"},
        });
        let folder = tempfile::tempdir().unwrap();
        fs::write(folder.path().join("tokenizer.json"), tokenizer.to_string()).unwrap();
        let config = json!({"eos_token": "<|im_end|>", "chat_template": template});
        fs::write(folder.path().join("tokenizer_config.json"), config.to_string()).unwrap();
        Text::from(Arc::new(Tokenizer::open(folder.path()).unwrap()))
    }

    fn message(role: Role, content: &str) -> Message {
        Message { role, content: content.to_owned() }
    }

    #[test]
    fn a_conversation_is_what_the_template_makes_of_it() {
        let text = letters(Some(
            "{% for m in messages %}<|im_start|>{{ m.role[0] }}{{ m.content }}<|im_end|>{% endfor %}<|im_start|>a",
        ));
        let (u, a, s) = (20, 0, 18);
        let messages = [message(Role::System, "b"), message(Role::User, "cd"), message(Role::Assistant, "e")];
        let expected = [26, s, 1, 27, 26, u, 2, 3, 27, 26, a, 4, 27, 26, a];
        assert_eq!(text.chat(&messages).unwrap(), expected);
        assert_eq!(text.prompt("ab<|im_end|>").unwrap(), [0, 1, 27]);
        assert_eq!(text.stop_tokens(), [27]);
    }

    #[test]
    fn a_model_without_a_template_says_so() {
        let error = letters(None).chat(&[message(Role::User, "a")]).unwrap_err();
        assert!(error.contains("no chat template"), "{error}");
    }
}
