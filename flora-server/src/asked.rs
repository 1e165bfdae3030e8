//! From what a client asks to the engine's requests, one for each choice.

use flora_engine::{AdapterChoice, AdapterSpans, Grammar, LogProbabilities, Request, Span, Spans, StopAt};

use crate::adapters::{Known, SpanField};
use crate::app::App;
use crate::chat::{Chat, Next};
use crate::completions::{Completions, Length, Prompt};
use crate::error::ApiError;
use crate::parameters::{MostTokens, Parameters};
use crate::text::Reader;

/// What is asked, before the model reads it.
pub(crate) enum Asked {
    Completions(Completions),
    Chat(Chat),
}

/// A choice that is to run.
pub(crate) struct Planned {
    pub(crate) request: Request,
    /// The prompt, where it is given back before the text.
    pub(crate) echo: Option<Echo>,
}

/// A prompt that is given back.
#[derive(Clone, Debug)]
pub(crate) struct Echo {
    pub(crate) text: String,
    /// Its first token, which has no log-probability.
    pub(crate) first: Option<u32>,
}

/// A prompt that was read.
struct ReadPrompt {
    tokens: Vec<u32>,
    adapters: AdapterSpans,
    echo: Option<Echo>,
}

impl Asked {
    /// The alternatives of each token whose log-probability is told.
    pub(crate) fn logprobs(&self) -> Option<u32> {
        match self {
            Self::Completions(completions) => completions.logprobs,
            Self::Chat(chat) => chat.logprobs,
        }
    }

    /// A request of the engine for each choice: those of the first prompt, then those of the next.
    pub(crate) fn requests(
        self,
        app: &App,
        parameters: &Parameters,
        grammar: Option<Grammar>,
    ) -> Result<Vec<Planned>, ApiError> {
        let (model, known) = (app.adapter(&parameters.model)?, Known::new(app));
        let own = match &parameters.adapter {
            None => model.map(AdapterChoice::from),
            Some(adapter) if model.is_none() => adapter.choice(&known)?,
            Some(_) => {
                let message = format!(
                    "adapter says what acts on the base model, and `model` names an adapter already; let it be `{}`",
                    app.model()
                );
                return Err(ApiError::invalid("adapter", message));
            }
        };
        let prompts = match &self {
            Self::Completions(completions) => completions.prompts.len(),
            Self::Chat(_) => 1,
        };
        let limits = app.options().limits;
        if prompts.saturating_mul(parameters.n) > limits.choices {
            let message = format!(
                "{prompts} prompts of {} choices each are more than the {} choices that are taken",
                parameters.n, limits.choices
            );
            return Err(ApiError::invalid("n", message));
        }
        let context = app.engine().limits().most_tokens();
        let mut requests = Vec::with_capacity(prompts * parameters.n);
        // A sum has no chat template of its own.
        let reader = app.text().reader(match &own {
            Some(AdapterChoice::Named(name)) => Some(name),
            Some(AdapterChoice::Composed(_)) | None => None,
        })?;
        let mut stop_tokens = if parameters.ignore_eos { Vec::new() } else { reader.stop_tokens() };
        stop_tokens.extend(&parameters.stop_tokens);
        let (length, log_probabilities) = self.told();
        let prompts = self.prompts(&known, &reader, own.as_ref())?;
        for ReadPrompt { tokens: prompt, adapters, echo } in prompts {
            // Room for one token at least, where one is generated.
            let room = context.saturating_sub(usize::from(length.is_some()));
            let (tokens, limit) = (prompt.len(), limits.prompt_tokens.min(room));
            if tokens > limit {
                return Err(ApiError::LongPrompt { tokens, limit });
            }
            let max_tokens = length.map_or(0, |most| most.within(context - tokens));
            requests.extend((0..parameters.n).map(|choice| {
                let request = Request {
                    prompt: prompt.clone(),
                    adapters: adapters.clone(),
                    sampling: parameters.draw.choice(choice),
                    rules: parameters.rules.clone(),
                    grammar: grammar.clone(),
                    stop: StopAt { max_tokens, strings: parameters.stop.clone(), tokens: stop_tokens.clone() },
                    log_probabilities,
                };
                Planned { request, echo: echo.clone() }
            }));
        }
        Ok(requests)
    }

    /// How much is generated, if anything is, and what is told of tokens.
    fn told(&self) -> (Option<MostTokens>, LogProbabilities) {
        let count = self.logprobs();
        let of_text = LogProbabilities { generated: count, prompt: None };
        match self {
            Self::Chat(chat) => (Some(chat.max_tokens.unwrap_or(MostTokens::Context)), of_text),
            Self::Completions(completions) => match completions.length {
                Length::Text(most) => (Some(most), of_text),
                Length::EchoAndText(most) => (Some(most), LogProbabilities { generated: count, prompt: count }),
                // The engine has to be asked for something.
                Length::Echo => (None, LogProbabilities { generated: None, prompt: Some(count.unwrap_or(0)) }),
            },
        }
    }

    /// The prompts as tokens, each with its adapters: `own` where it names no other.
    fn prompts(
        self,
        known: &Known<'_>,
        reader: &Reader<'_>,
        own: Option<&AdapterChoice>,
    ) -> Result<Vec<ReadPrompt>, ApiError> {
        match self {
            Self::Completions(Completions { prompts, spans, length, .. }) => {
                let gives_back = !matches!(length, Length::Text(_));
                let read = |prompt| {
                    let wrong = |error| ApiError::invalid("prompt", error);
                    let whole = || AdapterSpans::whole(own.cloned());
                    let (tokens, adapters, text) = match prompt {
                        Prompt::Text(said) if spans.is_empty() => {
                            (reader.prompt(&said).map_err(wrong)?, whole(), gives_back.then_some(said))
                        }
                        Prompt::Text(said) => {
                            let (tokens, characters) = reader.prompt_places(&said).map_err(wrong)?;
                            let length = ("characters", said.chars().count());
                            let token = |from: usize| characters.partition_point(|character| *character < from);
                            let adapters = SpanField::place(&spans, known, own.cloned(), length, token)?;
                            (tokens, adapters, gives_back.then_some(said))
                        }
                        Prompt::Tokens(tokens) => {
                            let length = ("tokens", tokens.len());
                            let adapters = SpanField::place(&spans, known, own.cloned(), length, |token| token)?;
                            let text = gives_back.then(|| reader.decode(&tokens));
                            (tokens, adapters, text)
                        }
                    };
                    let first = tokens.first().copied();
                    Ok(ReadPrompt { tokens, adapters, echo: text.map(|text| Echo { text, first }) })
                };
                prompts.into_iter().map(read).collect()
            }
            Self::Chat(Chat { conversation, adapters, .. }) => {
                let wrong = |error| ApiError::invalid("messages", error);
                if adapters.iter().all(Option::is_none) {
                    let tokens = reader.chat(&conversation).map_err(wrong)?;
                    return Ok(vec![ReadPrompt { tokens, adapters: AdapterSpans::whole(own.cloned()), echo: None }]);
                }
                let (tokens, places) = reader.chat_places(&conversation).map_err(wrong)?;
                let goes_on = |index: usize| conversation.next == Next::Rest && index + 1 == places.len();
                let mut spans = Vec::new();
                for (index, (adapter, place)) in adapters.iter().zip(&places).enumerate() {
                    let Some(adapter) = adapter else { continue };
                    let adapter = adapter.choice(known)?;
                    // What goes on with a message's words goes on with its adapter.
                    let end = if goes_on(index) { None } else { Some(place.end) };
                    if end.is_none_or(|end| place.start < end) {
                        spans.push(Span { start: place.start, end, adapter });
                    }
                }
                let adapters = Spans::new(own.cloned(), spans).map_err(|error| wrong(error.to_string()))?;
                Ok(vec![ReadPrompt { tokens, adapters, echo: None }])
            }
        }
    }
}
