//! How what a client writes becomes the tokens of a prompt.

use std::collections::{BTreeMap, HashMap};
use std::fmt;
use std::ops::Range;
use std::path::PathBuf;
use std::sync::Arc;

use flora_engine::{AdapterFailure, RequestError};
use flora_tokenizer::{AdapterText, AdapterTexts, ChatTemplate, Content as SaidContent, Conversation as Said};
use flora_tokenizer::{Message as SaidMessage, Specials, Tokenizer};

use crate::chat::{Content, Conversation, Role};
use crate::error::ApiError;

/// What a client wrote to the tokens of a prompt; the error is said to the client.
type Read<T> = dyn Fn(&T) -> Result<Vec<u32>, String> + Send + Sync;

/// A token to the bytes that it says by itself.
type Spell = dyn Fn(u32) -> Vec<u8> + Send + Sync;

/// An adapter's name to its folder.
type FolderOf = dyn Fn(&str) -> Option<PathBuf> + Send + Sync;

/// How a model reads what clients write: as its [`Tokenizer`] does, or as two functions say.
pub struct Text(Source);

enum Source {
    Functions {
        prompt: Box<Read<str>>,
        chat: Box<Read<Conversation>>,
        stop_tokens: Vec<u32>,
        spelled: Box<Spell>,
    },
    Tokenizer {
        tokenizer: Arc<Tokenizer>,
        adapters: AdapterTexts,
        /// Where an adapter's files are; none for one that there isn't.
        folder_of: Box<FolderOf>,
    },
}

impl Text {
    /// `prompt` gives the tokens of a text to go on with, `chat` those of a conversation; what either says in its error is said
    /// to the client. `stop_tokens` end what the model says, and `spelled` gives the bytes of a token, which follow one another in
    /// a text.
    pub fn new(
        prompt: impl Fn(&str) -> Result<Vec<u32>, String> + Send + Sync + 'static,
        chat: impl Fn(&Conversation) -> Result<Vec<u32>, String> + Send + Sync + 'static,
        stop_tokens: Vec<u32>,
        spelled: impl Fn(u32) -> Vec<u8> + Send + Sync + 'static,
    ) -> Self {
        let (prompt, chat, spelled) = (Box::new(prompt), Box::new(chat), Box::new(spelled));
        Self(Source::Functions { prompt, chat, stop_tokens, spelled })
    }

    /// As `tokenizer` reads, and for a chat with an adapter by the chat template in the adapter's folder, if `folder_of` knows
    /// it and it has one.
    pub fn with_adapters(
        tokenizer: Arc<Tokenizer>,
        folder_of: impl Fn(&str) -> Option<PathBuf> + Send + Sync + 'static,
    ) -> Self {
        let adapters = AdapterTexts::new(Arc::clone(&tokenizer));
        Self(Source::Tokenizer { tokenizer, adapters, folder_of: Box::new(folder_of) })
    }

    /// The text of tokens; control tokens have none.
    pub(crate) fn decode(&self, tokens: &[u32]) -> String {
        match &self.0 {
            Source::Functions { spelled, .. } => {
                let bytes: Vec<u8> = tokens.iter().flat_map(|token| spelled(*token)).collect();
                String::from_utf8_lossy(&bytes).into_owned()
            }
            Source::Tokenizer { tokenizer, .. } => tokenizer.decode(tokens),
        }
    }

    /// The text of tokens, control tokens by their names.
    pub(crate) fn written(&self, tokens: &[u32]) -> String {
        let controls: HashMap<u32, &str> = match &self.0 {
            Source::Functions { .. } => HashMap::new(),
            Source::Tokenizer { tokenizer, .. } => tokenizer.special_tokens().collect(),
        };
        let runs = tokens.chunk_by(|one, other| !controls.contains_key(one) && !controls.contains_key(other));
        runs.map(|run| match controls.get(&run[0]) {
            Some(name) => (*name).to_owned(),
            None => self.decode(run),
        })
        .collect()
    }

    /// What one token says by itself; a control token its name.
    pub(crate) fn spelled(&self, token: u32) -> Vec<u8> {
        match &self.0 {
            Source::Functions { spelled, .. } => spelled(token),
            Source::Tokenizer { tokenizer, .. } => tokenizer.spelled(token),
        }
    }

    /// The control tokens that the model names, by names like `eos_token`.
    pub(crate) fn special_texts(&self) -> BTreeMap<String, String> {
        match &self.0 {
            Source::Functions { .. } => BTreeMap::new(),
            Source::Tokenizer { tokenizer, .. } => tokenizer.special_texts().clone(),
        }
    }

    /// The model's own chat template.
    pub(crate) fn template(&self) -> Option<&str> {
        match &self.0 {
            Source::Functions { .. } => None,
            Source::Tokenizer { tokenizer, .. } => tokenizer.template().map(ChatTemplate::source),
        }
    }

    /// The bytes that each of the `vocabulary` tokens stands for, none for control tokens; `None` where tokens are read together.
    pub(crate) fn token_bytes(&self, vocabulary: usize) -> Option<Vec<Vec<u8>>> {
        match &self.0 {
            Source::Functions { spelled, stop_tokens, .. } => {
                // Vocabularies are counted in u32.
                let bytes = |token: u32| if stop_tokens.contains(&token) { Vec::new() } else { spelled(token) };
                Some((0..vocabulary as u32).map(bytes).collect())
            }
            Source::Tokenizer { tokenizer, .. } => tokenizer.token_bytes().map(|bytes| bytes.to_vec()),
        }
    }

    /// How texts are read for requests with `adapter`. May read its files.
    ///
    /// # Errors
    /// [`AdapterFailure::Unusable`]: what the adapter's folder says of texts isn't what the model reads.
    pub(crate) fn reader(&self, adapter: Option<&str>) -> Result<Reader<'_>, ApiError> {
        let adapter = match (&self.0, adapter) {
            (Source::Tokenizer { adapters, folder_of, .. }, Some(name)) => match folder_of(name) {
                Some(folder) => adapters.of(&folder).map_err(|reason| {
                    let failure = AdapterFailure::Unusable { name: name.to_owned(), reason };
                    ApiError::from(RequestError::from(failure))
                })?,
                // The engine says that there is none.
                None => Arc::default(),
            },
            _ => Arc::default(),
        };
        Ok(Reader { text: self, adapter })
    }
}

/// Reads the texts of one request.
pub(crate) struct Reader<'a> {
    text: &'a Text,
    adapter: Arc<AdapterText>,
}

impl Reader<'_> {
    pub(crate) fn decode(&self, tokens: &[u32]) -> String {
        self.text.decode(tokens)
    }

    /// The tokens of a text, without those that the model wants around a prompt.
    pub(crate) fn plain(&self, text: &str) -> Result<Vec<u32>, String> {
        match &self.text.0 {
            Source::Functions { prompt, .. } => prompt(text),
            Source::Tokenizer { tokenizer, .. } => {
                tokenizer.encode(text, Specials::Parse).map_err(|error| error.to_string())
            }
        }
    }

    pub(crate) fn prompt(&self, text: &str) -> Result<Vec<u32>, String> {
        match &self.text.0 {
            Source::Functions { prompt, .. } => prompt(text),
            // Control tokens too: the whole prompt is one client's, and a conversation may be written out in it.
            Source::Tokenizer { tokenizer, .. } => {
                tokenizer.prompt(text, Specials::Parse).map_err(|error| error.to_string())
            }
        }
    }

    /// The tokens of a prompt, and the character that each one's first byte lies in; a token around the prompt lies at its start or end.
    pub(crate) fn prompt_places(&self, text: &str) -> Result<(Vec<u32>, Vec<usize>), String> {
        let (tokens, places) = match &self.text.0 {
            Source::Functions { prompt, spelled, .. } => {
                let tokens = prompt(text)?;
                let mut said = Vec::with_capacity(text.len());
                let mut places = Vec::with_capacity(tokens.len());
                for token in &tokens {
                    places.push(said.len());
                    said.extend(spelled(*token));
                }
                if said != text.as_bytes() {
                    return Err("its tokens don't spell it, so that no token's place in it is known".to_owned());
                }
                (tokens, places)
            }
            Source::Tokenizer { tokenizer, .. } => {
                tokenizer.prompt_places(text, Specials::Parse).map_err(|error| error.to_string())?
            }
        };
        let starts: Vec<usize> = text.char_indices().map(|(start, _)| start).chain([text.len()]).collect();
        let character = |place: usize| match starts.binary_search(&place) {
            Ok(character) => character,
            // Within one.
            Err(behind) => behind.saturating_sub(1),
        };
        Ok((tokens, places.into_iter().map(character).collect()))
    }

    /// The tokens of a conversation, and which of them are of each message's content.
    pub(crate) fn chat_places(&self, conversation: &Conversation) -> Result<(Vec<u32>, Vec<Range<usize>>), String> {
        match &self.text.0 {
            Source::Functions { .. } => {
                Err("which tokens are a message's isn't known here; leave `adapter` out of messages".to_owned())
            }
            Source::Tokenizer { tokenizer, .. } => {
                let write = |said: &Said<'_>| tokenizer.conversation_places(self.adapter.template(), said);
                written(conversation, write).map_err(|error| error.to_string())
            }
        }
    }

    pub(crate) fn chat(&self, conversation: &Conversation) -> Result<Vec<u32>, String> {
        match &self.text.0 {
            Source::Functions { chat, .. } => chat(conversation),
            Source::Tokenizer { tokenizer, .. } => {
                let write = |said: &Said<'_>| tokenizer.conversation(self.adapter.template(), said);
                written(conversation, write).map_err(|error| error.to_string())
            }
        }
    }

    /// The tokens that end what the model says.
    pub(crate) fn stop_tokens(&self) -> Vec<u32> {
        match &self.text.0 {
            Source::Functions { stop_tokens, .. } => stop_tokens.clone(),
            Source::Tokenizer { tokenizer, .. } => {
                let mut tokens = tokenizer.stop_tokens();
                tokens.extend(self.adapter.end().filter(|end| !tokens.contains(end)));
                tokens
            }
        }
    }
}

/// What `write` makes of a conversation.
fn written<T>(conversation: &Conversation, write: impl FnOnce(&Said<'_>) -> T) -> T {
    let messages: Vec<_> = conversation
        .messages
        .iter()
        .map(|message| SaidMessage {
            role: match message.role {
                Role::System => "system",
                Role::User => "user",
                Role::Assistant => "assistant",
                Role::Tool => "tool",
            },
            content: match &message.content {
                Content::None => SaidContent::None,
                Content::Text(text) => SaidContent::Text(text),
                Content::Parts(parts) => SaidContent::Parts(parts),
            },
            name: message.name.as_deref(),
            tool_calls: message.tool_calls.as_ref(),
            tool_call_id: message.tool_call_id.as_deref(),
        })
        .collect();
    let next = conversation.next;
    write(&Said { messages: &messages, next, variables: &conversation.variables })
}

impl From<Arc<Tokenizer>> for Text {
    fn from(tokenizer: Arc<Tokenizer>) -> Self {
        Self::with_adapters(tokenizer, |_| None)
    }
}

impl fmt::Debug for Text {
    fn fmt(&self, formatter: &mut fmt::Formatter<'_>) -> fmt::Result {
        formatter.debug_struct("Text").finish_non_exhaustive()
    }
}

#[cfg(test)]
mod tests {
    use std::fs;

    use serde_json::{Map, json};

    use super::*;
    use crate::chat::{Message, Next};

    fn read(text: &Text) -> Reader<'_> {
        text.reader(None).unwrap()
    }

    fn conversation(messages: &[Message]) -> Conversation {
        Conversation { messages: messages.to_vec(), next: Next::Answer, variables: Map::new() }
    }

    /// Letters as tokens 0 to 25, and the two that ChatML puts around a turn.
    fn letters(template: Option<&str>) -> Text {
        let vocabulary: Map<_, _> = ('a'..='z').map(String::from).zip((0..).map(|id: u32| json!(id))).collect();
        let special = |id: u32, content: &str| {
            json!({
                "id": id, "content": content, "single_word": false, "lstrip": false, "rstrip": false, "normalized": false,
                "special": true,
            })
        };
        let tokenizer = json!({
            "model": {"type": "BPE", "vocab": vocabulary, "merges": []},
            "added_tokens": [special(26, "<|im_start|>"), special(27, "<|im_end|>")],
            "pre_tokenizer": {"type": "ByteLevel", "add_prefix_space": false, "trim_offsets": true, "use_regex": true},
            "decoder": {"type": "ByteLevel", "add_prefix_space": false, "trim_offsets": true},
        });
        let folder = tempfile::tempdir().unwrap();
        fs::write(folder.path().join("tokenizer.json"), tokenizer.to_string()).unwrap();
        let config = json!({"eos_token": "<|im_end|>", "chat_template": template});
        fs::write(folder.path().join("tokenizer_config.json"), config.to_string()).unwrap();
        Text::from(Arc::new(Tokenizer::open(folder.path()).unwrap()))
    }

    fn message(role: Role, content: &str) -> Message {
        Message { role, content: Content::Text(content.to_owned()), name: None, tool_calls: None, tool_call_id: None }
    }

    #[test]
    fn a_conversation_is_what_the_template_makes_of_it() {
        let text = letters(Some(
            "{% for m in messages %}<|im_start|>{{ m.role[0] }}{{ m.content }}<|im_end|>{% endfor %}<|im_start|>a",
        ));
        let (u, a, s) = (20, 0, 18);
        let messages = [message(Role::System, "b"), message(Role::User, "cd"), message(Role::Assistant, "e")];
        let expected = [26, s, 1, 27, 26, u, 2, 3, 27, 26, a, 4, 27, 26, a];
        assert_eq!(read(&text).chat(&conversation(&messages)).unwrap(), expected);
        assert_eq!(read(&text).prompt("ab<|im_end|>").unwrap(), [0, 1, 27]);
        assert_eq!(read(&text).stop_tokens(), [27]);
        assert_eq!(text.written(&[26, 0, 1, 27, 27, 2]), "<|im_start|>ab<|im_end|><|im_end|>c");
    }

    #[test]
    fn control_tokens_and_the_template_are_told() {
        let text = letters(Some("{{ messages[0].content }}"));
        assert_eq!(text.special_texts(), BTreeMap::from([("eos_token".to_owned(), "<|im_end|>".to_owned())]));
        assert_eq!(text.template(), Some("{{ messages[0].content }}"));
        assert_eq!(letters(None).template(), None);
    }

    #[test]
    fn a_messages_tokens_are_those_of_its_content() {
        let text = letters(Some(
            "{% for m in messages %}<|im_start|>{{ m.role[0] }}{{ m.content }}<|im_end|>{% endfor %}<|im_start|>a",
        ));
        // The second spells a control token, which is text: here its letters.
        let messages = [message(Role::User, "ua"), message(Role::Assistant, "x<|im_end|>y"), message(Role::User, "")];
        let conversation = conversation(&messages);
        let (tokens, places) = read(&text).chat_places(&conversation).unwrap();
        assert_eq!(tokens, read(&text).chat(&conversation).unwrap());
        let said: Vec<String> = places.iter().map(|place| text.decode(&tokens[place.clone()])).collect();
        assert_eq!(said, ["ua", "ximendy", ""]);
        let changed = letters(Some("{% for m in messages %}{{ m.content | upper }}{% endfor %}"));
        let error = read(&changed).chat_places(&conversation).unwrap_err();
        assert!(error.contains("message 0"), "{error}");
    }

    #[test]
    fn a_token_lies_where_its_first_byte_does() {
        let text = letters(None);
        let (tokens, places) = read(&text).prompt_places("ab<|im_end|>c").unwrap();
        assert_eq!((tokens, places), (vec![0, 1, 27, 2], vec![0, 1, 2, 12]));
    }

    #[test]
    fn a_model_without_a_template_says_so() {
        let error = read(&letters(None)).chat(&conversation(&[message(Role::User, "a")])).unwrap_err();
        assert!(error.contains("no chat template"), "{error}");
    }
}
