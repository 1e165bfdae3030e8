//! What a client asks of `/v1/chat/completions`.

pub use flora_tokenizer::Next;
use serde::{Deserialize, Serialize};
use serde_json::{Map, Value};

use crate::adapters::AdapterField;
use crate::body::{Object, fields};
use crate::error::ApiError;
use crate::fields::check_chat;
use crate::parameters::{MostTokens, alternatives};

/// A conversation to go on with.
#[derive(Clone, Debug, PartialEq)]
pub(crate) struct Chat {
    pub(crate) conversation: Conversation,
    /// What acts on the words of each message, where that is said.
    pub(crate) adapters: Vec<Option<AdapterField>>,
    /// Where the request says so.
    pub(crate) max_tokens: Option<MostTokens>,
    /// Alternatives of each token whose log-probability is told.
    pub(crate) logprobs: Option<u32>,
}

/// What was said, and what is to come.
#[derive(Clone, Debug, PartialEq)]
pub struct Conversation {
    /// At least one.
    pub messages: Vec<Message>,
    /// How it goes on.
    pub next: Next,
    /// Further variables of the model's chat template.
    pub variables: Map<String, Value>,
}

/// What someone said.
#[derive(Clone, Debug, PartialEq)]
pub struct Message {
    /// Who.
    pub role: Role,
    /// The words.
    pub content: Content,
    /// Who of several with the same role.
    pub name: Option<String>,
    /// The tools that an assistant calls, their arguments as objects.
    pub tool_calls: Option<Value>,
    /// The call that a tool answers.
    pub tool_call_id: Option<String>,
}

/// The words of a message.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum Content {
    /// None, where an assistant calls tools.
    None,
    /// As one text.
    Text(String),
    /// In parts.
    Parts(Vec<String>),
}

impl Content {
    /// All of it.
    pub fn joined(&self) -> String {
        match self {
            Self::None => String::new(),
            Self::Text(text) => text.clone(),
            Self::Parts(parts) => parts.concat(),
        }
    }
}

/// Who said it.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Deserialize)]
#[serde(rename_all = "lowercase")]
pub enum Role {
    /// Whoever set the conversation up; OpenAI's newer models call it the developer.
    #[serde(alias = "developer")]
    System,
    /// Who asks.
    User,
    /// The model.
    Assistant,
    /// A tool that the model called.
    Tool,
}

#[derive(Deserialize)]
struct Fields {
    messages: Vec<Object<MessageFields>>,
    add_generation_prompt: Option<bool>,
    continue_final_message: Option<bool>,
    chat_template_kwargs: Option<Map<String, Value>>,
    tools: Option<Vec<Object<Tool>>>,
    tool_choice: Option<String>,
}

#[derive(Deserialize)]
struct LengthFields {
    max_tokens: Option<i64>,
    max_completion_tokens: Option<i64>,
    logprobs: Option<bool>,
    top_logprobs: Option<i64>,
}

#[derive(Deserialize)]
struct MessageFields {
    role: Role,
    content: Option<ContentFields>,
    name: Option<String>,
    tool_calls: Option<Vec<Object<ToolCall>>>,
    tool_call_id: Option<String>,
}

/// A tool that may be called, or is; templates see all of it.
#[derive(Deserialize, Serialize)]
struct Tool {
    #[serde(rename = "type")]
    kind: ToolKind,
    function: Map<String, Value>,
}

#[derive(Deserialize, Serialize)]
#[serde(rename_all = "lowercase")]
enum ToolKind {
    Function,
}

#[derive(Deserialize, Serialize)]
struct ToolCall {
    #[serde(skip_serializing_if = "Option::is_none")]
    id: Option<String>,
    #[serde(flatten)]
    tool: Tool,
}

#[derive(Deserialize)]
#[serde(untagged, expecting = "expected a message's content as a string, or as parts of type `text`")]
enum ContentFields {
    Text(String),
    Parts(Vec<Part>),
}

#[derive(Deserialize)]
#[serde(tag = "type", rename_all = "lowercase")]
enum Part {
    Text { text: String },
}

/// Variables of a chat template that have fields of their own.
const OWN_FIELDS: [&str; 6] =
    ["messages", "tools", "documents", "add_generation_prompt", "continue_final_message", "chat_template"];

impl Chat {
    /// What `body` asks.
    pub(crate) fn parse(body: &Value) -> Result<Self, ApiError> {
        check_chat(body)?;
        let conversation = Self::conversation(body)?;
        let fields: LengthFields = fields(body)?;
        // The older name, where both are there, yields.
        let max_tokens = match MostTokens::parse("max_completion_tokens", fields.max_completion_tokens)? {
            None => MostTokens::parse("max_tokens", fields.max_tokens)?,
            newer => newer,
        };
        let logprobs = match (fields.logprobs.unwrap_or(false), fields.top_logprobs) {
            (true, count) => Some(alternatives("top_logprobs", count.unwrap_or(0))?),
            (false, None | Some(0)) => None,
            (false, Some(_)) => {
                return Err(ApiError::invalid("top_logprobs", "top_logprobs needs logprobs to be true"));
            }
        };
        let adapters = (0..conversation.messages.len()).map(|index| message_adapter(index, body));
        let adapters = adapters.collect::<Result<_, _>>()?;
        Ok(Self { conversation, adapters, max_tokens, logprobs })
    }

    /// The conversation of a body whose fields are known.
    pub(crate) fn conversation(body: &Value) -> Result<Conversation, ApiError> {
        let fields: Fields = fields(body)?;
        if fields.messages.is_empty() {
            return Err(ApiError::invalid("messages", "messages is an empty array"));
        }
        let messages = fields.messages.into_iter().enumerate().map(|(index, Object(fields))| message(index, fields));
        let messages = messages.collect::<Result<_, _>>()?;
        let mut variables = variables(fields.chat_template_kwargs)?;
        if let Some(tools) = tools(fields.tools.unwrap_or_default(), fields.tool_choice.as_deref())? {
            variables.insert("tools".to_owned(), tools);
        }
        let next = next(fields.add_generation_prompt, fields.continue_final_message)?;
        Ok(Conversation { messages, next, variables })
    }
}

/// The adapter of a message, where it has one.
fn message_adapter(index: usize, body: &Value) -> Result<Option<AdapterField>, ApiError> {
    let message = &body["messages"][index];
    let param = format!("messages[{index}].adapter");
    let adapter = AdapterField::parse(&message["adapter"], &param)?;
    if adapter.is_some() && message["content"].is_null() {
        return Err(ApiError::invalid(&param, format!("{param} is of a message without content; leave it out")));
    }
    Ok(adapter)
}

fn message(index: usize, fields: MessageFields) -> Result<Message, ApiError> {
    let MessageFields { role, content, name, tool_calls, tool_call_id } = fields;
    let invalid = |field: &str, message: &str| {
        let param = format!("messages[{index}].{field}");
        ApiError::invalid(&param, format!("{param} {message}"))
    };
    let calls = tool_calls.unwrap_or_default();
    if !calls.is_empty() && role != Role::Assistant {
        return Err(invalid("tool_calls", "are an assistant's alone"));
    }
    if tool_call_id.is_some() && role != Role::Tool {
        return Err(invalid("tool_call_id", "is a tool's alone"));
    }
    let content = match content {
        None if calls.is_empty() => {
            return Err(invalid("content", "is missing, which only an assistant may leave out that calls tools"));
        }
        None => Content::None,
        Some(ContentFields::Text(text)) => Content::Text(text),
        Some(ContentFields::Parts(parts)) => {
            Content::Parts(parts.into_iter().map(|Part::Text { text }| text).collect())
        }
    };
    let calls: Vec<Value> = calls.into_iter().map(|Object(call)| called(call)).collect::<Result<_, _>>()?;
    let tool_calls = (!calls.is_empty()).then_some(Value::Array(calls));
    Ok(Message { role, content, name, tool_calls, tool_call_id })
}

/// A call as templates want it: with the object that OpenAI writes arguments as the text of.
fn called(mut call: ToolCall) -> Result<Value, ApiError> {
    if let Some(arguments) = call.tool.function.get_mut("arguments")
        && let Some(object) = arguments.as_str().and_then(|text| serde_json::from_str::<Map<String, Value>>(text).ok())
    {
        *arguments = Value::Object(object);
    }
    Ok(serde_json::to_value(call)?)
}

/// What the template is told of tools. Whether one is called, and how that is written, is the model's matter.
fn tools(tools: Vec<Object<Tool>>, choice: Option<&str>) -> Result<Option<Value>, ApiError> {
    match choice {
        None | Some("auto") => {}
        Some("none") => return Ok(None),
        Some(_) => {
            let message = "tool_choice may be \"auto\" or \"none\"; no tool can be asked for";
            return Err(ApiError::invalid("tool_choice", message));
        }
    }
    if tools.is_empty() {
        return Ok(None);
    }
    let tools: Vec<Tool> = tools.into_iter().map(|Object(tool)| tool).collect();
    Ok(Some(serde_json::to_value(tools)?))
}

/// As vLLM and transformers have it: the last message can't be gone on with after another was begun.
fn next(add_generation_prompt: Option<bool>, continue_final_message: Option<bool>) -> Result<Next, ApiError> {
    match (add_generation_prompt, continue_final_message.unwrap_or(false)) {
        (None | Some(true), false) => Ok(Next::Answer),
        (Some(false), false) => Ok(Next::Anything),
        (Some(false), true) => Ok(Next::Rest),
        (None | Some(true), true) => Err(ApiError::invalid(
            "continue_final_message",
            "continue_final_message needs add_generation_prompt to be false: either the last message goes on or another begins",
        )),
    }
}

fn variables(given: Option<Map<String, Value>>) -> Result<Map<String, Value>, ApiError> {
    let given = given.unwrap_or_default();
    match OWN_FIELDS.iter().find(|name| given.contains_key(**name)) {
        Some(name) => {
            let param = format!("chat_template_kwargs.{name}");
            let message = format!("{param} is not taken here: it is a field of the request itself");
            Err(ApiError::invalid(&param, message))
        }
        None => Ok(given),
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use serde_json::json;

    #[test]
    fn contents_are_strings_or_parts_of_text() {
        let body = json!({"messages": [
            {"role": "system", "content": "be kind"},
            {"role": "developer", "content": "be brief", "name": "d"},
            {"role": "user", "content": [{"type": "text", "text": "he"}, {"type": "text", "text": "llo"}]},
            {"role": "assistant", "content": ""},
        ]});
        let messages = Chat::parse(&body).unwrap().conversation.messages;
        let said: Vec<_> = messages.iter().map(|message| (message.role, message.content.joined())).collect();
        let expected =
            [(Role::System, "be kind"), (Role::System, "be brief"), (Role::User, "hello"), (Role::Assistant, "")];
        assert_eq!(said, expected.map(|(role, text)| (role, text.to_owned())));
        assert_eq!(messages[1].name.as_deref(), Some("d"));
    }

    #[test]
    fn other_messages_are_refused() {
        for messages in [
            json!(null),
            json!([]),
            json!("hello"),
            json!([["user", "hello"]]),
            json!([{"role": "user"}]),
            json!([{"content": "hello"}]),
            json!([{"role": "user", "content": null}]),
            json!([{"role": "user", "content": "a", "tool_calls": [{"type": "function", "function": {"name": "f"}}]}]),
            json!([{"role": "assistant", "content": "a", "tool_call_id": "1"}]),
            json!([{"role": "assistant", "content": null, "tool_calls": []}]),
            json!([{"role": "assistant", "tool_calls": [{"type": "custom", "function": {}}]}]),
            json!([{"role": "function", "content": "42"}]),
            json!([{"role": "user", "content": [{"type": "image_url", "image_url": {"url": "x"}}]}]),
        ] {
            let error = Chat::parse(&json!({"messages": messages})).unwrap_err();
            let named = matches!(&error, ApiError::Invalid { param: Some(param), .. } if param.starts_with("messages"));
            assert!(named, "{error:?}");
        }
    }

    #[test]
    fn a_conversation_goes_on_in_three_ways() {
        let chat = |fields: Value| {
            let mut body = json!({"messages": [{"role": "user", "content": "hello"}]});
            body.as_object_mut().unwrap().extend(fields.as_object().unwrap().clone());
            Chat::parse(&body).map(|chat| chat.conversation)
        };
        let next = |fields: Value| chat(fields).map(|conversation| conversation.next);
        assert_eq!(next(json!({})).unwrap(), Next::Answer);
        assert_eq!(
            next(json!({"add_generation_prompt": true, "continue_final_message": false})).unwrap(),
            Next::Answer
        );
        assert_eq!(next(json!({"add_generation_prompt": false})).unwrap(), Next::Anything);
        assert_eq!(next(json!({"add_generation_prompt": false, "continue_final_message": true})).unwrap(), Next::Rest);
        assert!(next(json!({"continue_final_message": true})).is_err());
        assert!(next(json!({"continue_final_message": "content"})).is_err());
        let variables = chat(json!({"chat_template_kwargs": {"enable_thinking": false}})).unwrap().variables;
        assert_eq!(variables["enable_thinking"], json!(false));
        assert!(chat(json!({"chat_template_kwargs": {"messages": []}})).is_err());
        assert!(chat(json!({"chat_template_kwargs": []})).is_err());
    }

    #[test]
    fn the_newer_name_of_max_tokens_goes_first() {
        let chat = |limits: Value| {
            let mut body = json!({"messages": [{"role": "user", "content": "hello"}]});
            body.as_object_mut().unwrap().extend(limits.as_object().unwrap().clone());
            Chat::parse(&body).map(|chat| chat.max_tokens)
        };
        assert_eq!(chat(json!({})).unwrap(), None);
        assert_eq!(chat(json!({"max_tokens": 5})).unwrap(), Some(MostTokens::Count(5)));
        assert_eq!(chat(json!({"max_tokens": -1})).unwrap(), Some(MostTokens::Context));
        assert_eq!(chat(json!({"max_tokens": 5, "max_completion_tokens": 3})).unwrap(), Some(MostTokens::Count(3)));
        assert!(chat(json!({"max_completion_tokens": 0})).is_err());
        for (field, value) in [
            ("logprobs", json!(1)),
            ("top_logprobs", json!(1)),
            ("tools", json!([{"type": "function"}])),
            ("tools", json!([{"type": "web_search", "function": {}}])),
            ("tool_choice", json!("required")),
            ("tool_choice", json!({"type": "function", "function": {"name": "f"}})),
            ("modalities", json!(["text", "audio"])),
        ] {
            assert!(chat(json!({field: value})).is_err(), "{field}");
        }
    }

    #[test]
    fn tools_are_the_templates_to_write() {
        let tool = json!({"type": "function", "function": {"name": "f", "parameters": {"type": "object"}}});
        let call =
            json!({"id": "1", "type": "function", "function": {"name": "f", "arguments": "{\"b\": 1, \"a\": [2]}"}});
        let mut body = json!({"tools": [tool], "messages": [
            {"role": "user", "content": "a"},
            {"role": "assistant", "content": null, "tool_calls": [call]},
            {"role": "tool", "tool_call_id": "1", "content": "42"},
        ]});
        let conversation = Chat::parse(&body).unwrap().conversation;
        assert_eq!(conversation.variables["tools"], json!([tool]));
        let [_, assistant, answer] = &conversation.messages[..] else { panic!("three messages") };
        let arguments = &assistant.tool_calls.as_ref().unwrap()[0]["function"]["arguments"];
        assert_eq!((&assistant.content, arguments), (&Content::None, &json!({"b": 1, "a": [2]})));
        assert_eq!((answer.role, answer.tool_call_id.as_deref()), (Role::Tool, Some("1")));
        body["tool_choice"] = json!("none");
        assert!(Chat::parse(&body).unwrap().conversation.variables.is_empty());
        body["messages"][1]["tool_calls"][0]["function"]["arguments"] = json!("no JSON");
        assert!(Chat::parse(&body).is_ok(), "what a model wrote is not the client's mistake");
    }
}
