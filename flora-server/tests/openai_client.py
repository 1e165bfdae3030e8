"""Asks a server as OpenAI's own client does: openai_client.py URL KEY ADAPTER...

Holds for any model: what is expected of one answer is told by another. Ends with "passed: N", or fails.
"""

import asyncio
import json
import sys

import openai

PROMPT = "Once upon a time, there was"
MESSAGES = [
    {"role": "system", "content": "You are brief."},
    {"role": "user", "content": [{"type": "text", "text": "What is "}, {"type": "text", "text": "a parrot?"}]},
]
GREEDY = {"temperature": 0, "max_tokens": 12}


def completion(client, model):
    answer = client.completions.create(model=model, prompt=PROMPT, **GREEDY)
    [choice] = answer.choices
    assert answer.object == "text_completion" and answer.model == model
    assert choice.text and choice.finish_reason in ("length", "stop")
    assert answer.usage.prompt_tokens > 0
    assert 0 < answer.usage.completion_tokens <= 12
    assert answer.usage.total_tokens == answer.usage.prompt_tokens + answer.usage.completion_tokens


def completion_stream(client, model):
    whole = client.completions.create(model=model, prompt=PROMPT, **GREEDY)
    options = {"include_usage": True}
    chunks = list(client.completions.create(model=model, prompt=PROMPT, stream=True, stream_options=options, **GREEDY))
    assert "".join(chunk.choices[0].text for chunk in chunks[:-1]) == whole.choices[0].text
    assert chunks[-2].choices[0].finish_reason == whole.choices[0].finish_reason
    assert chunks[-1].choices == [] and chunks[-1].usage == whole.usage
    assert len({chunk.id for chunk in chunks}) == 1


def several_prompts(client, model):
    alone = [client.completions.create(model=model, prompt=prompt, **GREEDY) for prompt in ("one", "two")]
    both = client.completions.create(model=model, prompt=["one", "two"], n=2, **GREEDY)
    texts = [answer.choices[0].text for answer in alone]
    assert [choice.text for choice in both.choices] == [texts[0], texts[0], texts[1], texts[1]]
    assert [choice.index for choice in both.choices] == [0, 1, 2, 3]


def chat(client, model):
    answer = client.chat.completions.create(model=model, messages=MESSAGES, temperature=0, max_completion_tokens=12)
    [choice] = answer.choices
    assert answer.object == "chat.completion"
    assert choice.message.role == "assistant" and choice.message.content
    assert 0 < answer.usage.completion_tokens <= 12


def chat_stream(client, model):
    whole = client.chat.completions.create(model=model, messages=MESSAGES, **GREEDY)
    stream = client.chat.completions.create(model=model, messages=MESSAGES, stream=True, **GREEDY)
    deltas = [chunk.choices[0] for chunk in stream]
    assert deltas[0].delta.role == "assistant"
    assert "".join(choice.delta.content or "" for choice in deltas) == whole.choices[0].message.content
    assert deltas[-1].finish_reason == whole.choices[0].finish_reason


def stop_string(client, model):
    text = client.completions.create(model=model, prompt=PROMPT, **GREEDY).choices[0].text
    stop = text[len(text) // 2 :][:3]
    for stops in (stop, ["no such words", stop]):
        choice = client.completions.create(model=model, prompt=PROMPT, stop=stops, **GREEDY).choices[0]
        assert (choice.text, choice.finish_reason) == (text[: text.index(stop)], "stop"), choice


def seed(client, model):
    def drawn(seed):
        return client.completions.create(
            model=model, prompt="?", max_tokens=30, temperature=1.5, top_p=0.95, seed=seed
        ).choices[0].text

    assert drawn(7) == drawn(7)
    assert drawn(7) != drawn(8)


def log_probabilities(client, model):
    asked = {"model": model, "prompt": PROMPT, "logprobs": 2, "temperature": 0}
    [alone] = client.completions.create(**asked, max_tokens=3).choices
    [choice] = client.completions.create(**asked, max_tokens=3, echo=True).choices
    assert choice.text == PROMPT + alone.text
    told = choice.logprobs
    assert told.token_logprobs[0] is None and told.token_logprobs[-3:] == alone.logprobs.token_logprobs
    for own, likeliest in zip(told.token_logprobs[-3:], told.top_logprobs[-3:]):
        assert own == max(likeliest.values()) <= 0
    prompt = client.completions.create(**asked, max_tokens=0, echo=True).choices[0]
    assert prompt.text == PROMPT and prompt.logprobs.token_logprobs == told.token_logprobs[:-3]

    answer = client.chat.completions.create(model=model, messages=MESSAGES, logprobs=True, top_logprobs=2, **GREEDY)
    [choice] = answer.choices
    # The token that ends a text is among them.
    tokens = choice.logprobs.content[: -1 if choice.finish_reason == "stop" else None]
    assert b"".join(bytes(token.bytes) for token in tokens).decode(errors="replace") == choice.message.content
    assert all(token.logprob == token.top_logprobs[0].logprob for token in choice.logprobs.content)


def structured(client, model):
    schema = {
        "type": "object",
        "properties": {"name": {"type": "string", "maxLength": 8}, "kind": {"enum": ["bird", "other"]}},
        "required": ["name", "kind"],
        "additionalProperties": False,
    }
    form = {"type": "json_schema", "json_schema": {"name": "animal", "schema": schema, "strict": True}}
    asked = {"model": model, "messages": MESSAGES, "response_format": form, "temperature": 1, "seed": 3}
    [choice] = client.chat.completions.create(**asked, max_completion_tokens=400).choices
    assert choice.finish_reason == "stop", choice
    found = json.loads(choice.message.content)
    assert list(found) == ["name", "kind"] and len(found["name"]) <= 8 and found["kind"] in ("bird", "other"), found
    extra = {"structured_outputs": {"choice": ["a parrot", "a crow"]}}
    answer = client.completions.create(model=model, prompt=PROMPT, max_tokens=40, extra_body=extra)
    assert answer.choices[0].text in ("a parrot", "a crow"), answer
    schema["properties"]["kind"] = {"not": {}}
    error = with_error(openai.BadRequestError, lambda: client.chat.completions.create(**asked))
    assert error.param == "response_format.json_schema.schema" and "/properties/kind" in error.message, error


def models(client, model):
    listed = {listed.id: listed for listed in client.models.list()}
    assert model in listed and listed[model].object == "model"
    assert client.models.retrieve(model) == listed[model]


def unknown_models(client, _):
    for name in ("nobody", "../../etc/passwd", "a\0b", "x" * 10_000):
        with_error(openai.NotFoundError, lambda: client.completions.create(model=name, prompt=PROMPT))
        with_error(openai.NotFoundError, lambda: client.completions.create(model=name, prompt=PROMPT, stream=True))


def wrong_key(client, model):
    for key in ("wrong", client.api_key + "x"):
        other = client.with_options(api_key=key)
        with_error(openai.AuthenticationError, lambda: other.models.list())
        with_error(openai.AuthenticationError, lambda: other.completions.create(model=model, prompt=PROMPT))


def bad_requests(client, model):
    for wrong in (
        {"stop": ["a", "b", "c", "d", "e"]},
        {"stop": ["a"] * 1000},
        {"temperature": 3},
        {"logprobs": 50},
        {"best_of": 3},
        {"max_tokens": 0},
        {"extra_body": {"n": "many"}},
    ):
        error = with_error(
            openai.BadRequestError, lambda: client.completions.create(model=model, prompt=PROMPT, **wrong)
        )
        assert error.type == "invalid_request_error" and error.param, error


def left_streams(client, model):
    for _ in range(4):
        with client.completions.create(model=model, prompt=PROMPT, max_tokens=1000, stream=True) as stream:
            next(iter(stream))


def with_error(kind, ask):
    try:
        ask()
    except kind as error:
        return error
    raise AssertionError(f"no {kind.__name__}")


async def together(url, key, names):
    """32 requests at once, each of another adapter as far as there are that many, say what each says alone."""
    async with openai.AsyncOpenAI(base_url=url, api_key=key, max_retries=0) as client:

        async def ask(number, stream):
            asked = {"model": names[number % len(names)], "prompt": f"{number}: {PROMPT}", **GREEDY}
            if not stream:
                return (await client.completions.create(**asked)).choices[0].text
            return "".join([chunk.choices[0].text async for chunk in await client.completions.create(**asked, stream=True)])

        alone = [await ask(number, False) for number in range(32)]
        crowd = await asyncio.gather(*(ask(number, number % 2 == 0) for number in range(32)))
        assert crowd == alone


def main():
    url, key, *adapters = sys.argv[1:]
    client = openai.OpenAI(base_url=url, api_key=key, max_retries=0)
    [base] = [model.id for model in client.models.list() if model.model_extra["parent"] is None]
    checks = (completion, completion_stream, several_prompts, chat, chat_stream, stop_string, seed, log_probabilities)
    checks += (structured, models, unknown_models, wrong_key, bad_requests, left_streams)
    for check in checks:
        for model in (base, *adapters[:1]):
            print(f"{check.__name__} ({model})", flush=True)
            check(client, model)
    print("together", flush=True)
    asyncio.run(together(url, key, [base, *adapters]))
    print(f"passed: {len(checks) + 1}")


main()
