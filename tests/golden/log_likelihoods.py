"""Makes log_likelihoods/: how likely transformers and PEFT find the answers of two small tasks of multiple choice.

    venv/bin/python tests/golden/log_likelihoods.py [MODEL.gguf]        the environment is that of smollm2.py

`tiny/` is llama_tiny/'s model with an adapter of each of PEFT's kinds, and `smollm2/` is SmolLM2 with those of smollm2/. lm-eval asks
the same through the server, by `task.yaml`.
"""

import json
import random
from pathlib import Path

import torch
from peft import PeftModel
from smollm2 import gguf_file, load_tokenizer
from tokenizers import AddedToken, Tokenizer, decoders, models, pre_tokenizers
from transformers import AutoModelForCausalLM

HERE = Path(__file__).parent
FOLDER = HERE / "log_likelihoods"
TINY = HERE / "llama_tiny" / "model"
# How far a token's logit has to be from the best other one, so that another order of sums doesn't change which text is the greedy one.
LEAST_MARGIN = 0.0005

QUESTIONS = [
    ("The capital of France is", ["Paris.", "London.", "Rome.", "a large cat."]),
    ("Water is made of hydrogen and", ["oxygen.", "carbon.", "salt.", "the colour blue."]),
    ("The opposite of hot is", ["cold.", "warm.", "tall.", "a bicycle."]),
    ("A week has this many days:", ["seven.", "nine.", "two.", "yesterday."]),
    ("Cats like to chase", ["mice.", "planets.", "numbers.", "the law of gravity."]),
    ("To read a book you need", ["light.", "a hammer.", "an engine.", "seventeen horses."]),
]


def tiny_tokenizer():
    """A token for each printable character of ASCII, 26 letters and the end of a text first; words of others that no text has."""
    letters = [chr(code) for code in range(ord("a"), ord("z") + 1)]
    others = [chr(code) for code in range(32, 127) if chr(code) not in letters]
    words = [one + other for one in letters for other in letters]
    spelled = ["Ġ" if character == " " else character for character in others]
    vocabulary = {text: id for id, text in enumerate([*letters, "<|end|>", *spelled, *words][:173])}
    tokenizer = Tokenizer(models.BPE(vocab=vocabulary, merges=[]))
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel(add_prefix_space=False)
    return tokenizer


def tiny_items(encode, decode, model):
    """Questions without sense. One of the answers of each begins as the model itself goes on, where that can be written."""
    draw = random.Random(3)
    text = lambda length: "".join(draw.choice("abcdefghijklmnopqrstuvwxyzABCDEFGH,.?") for _ in range(length))
    items = []
    while len(items) < 8:
        context = text(draw.randint(3, 20))
        tokens = encode(context)
        for _ in range(2):
            tokens.append(model(torch.tensor([tokens])).logits[0, -1].argmax().item())
        greedy = decode(tokens[-2:])
        if encode(context + greedy) != tokens:
            continue
        choices = [text(draw.randint(1, 6)) for _ in range(3)]
        items.append({"context": context, "choices": [choices[0], greedy, *choices[1:]], "answer": draw.randrange(4)})
    return items


def scores(model, encode, items):
    """Of each answer of each item: the sum of its tokens' log-probabilities, and whether each is the likeliest."""
    return [[score(model, encode, item["context"], choice) for choice in item["choices"]] for item in items]


@torch.no_grad()
def score(model, encode, context, continuation):
    before, tokens = encode(context), encode(context + continuation)
    assert tokens[: len(before)] == before, (context, continuation)
    logits = model(torch.tensor([tokens])).logits[0, len(before) - 1 : -1].float()
    targets = torch.tensor(tokens[len(before) :])[:, None]
    target = logits.gather(-1, targets)
    lead = (target - logits.scatter(-1, targets, float("-inf")).max(-1, keepdim=True).values).squeeze(-1)
    assert lead.abs().min() > LEAST_MARGIN, (context, continuation)
    sums = logits.log_softmax(-1).gather(-1, targets).sum()
    return [round(sums.item(), 6), (lead > 0).all().item()]


def save(name, model, encode, items, adapters):
    folder = FOLDER / name
    folder.mkdir(parents=True, exist_ok=True)
    (folder / "items.jsonl").write_text("".join(json.dumps(item) + "\n" for item in items))
    lines = [f'"base": {json.dumps(scores(model, encode, items))}']
    for path in adapters:
        adapted = PeftModel.from_pretrained(model, path).eval()
        lines.append(f'"{path.name}": {json.dumps(scores(adapted, encode, items))}')
        model = adapted.unload()
    (folder / "log_likelihoods.json").write_text("{\n" + ",\n".join(lines) + "\n}\n")


if __name__ == "__main__":
    torch.set_num_threads(1)
    options = {"attn_implementation": "eager", "dtype": torch.float32}
    tokenizer = tiny_tokenizer()
    tokenizer.add_special_tokens([AddedToken("<|end|>", special=True, normalized=False)])
    FOLDER.mkdir(exist_ok=True)
    tokenizer.save(str(FOLDER / "tokenizer.json"))
    model = AutoModelForCausalLM.from_pretrained(TINY, **options).eval()
    encode = lambda text: tokenizer.encode(text).ids
    own = [HERE / "llama_tiny/adapters/lora", HERE / "llama_tiny/adapters/hira"]
    own += [HERE / "trained/adapters/dora", HERE / "trained/adapters/ia3"]
    zoo = sorted((HERE / "llama_zoo/adapters").iterdir())
    save("tiny", model, encode, tiny_items(encode, tokenizer.decode, model), own + zoo)

    path = gguf_file()
    tokenizer = load_tokenizer(path)
    model = AutoModelForCausalLM.from_pretrained(path.parent, gguf_file=path.name, **options).eval()
    items = [{"context": context, "choices": [f" {choice}" for choice in choices], "answer": 0} for context, choices in QUESTIONS]
    encode = lambda text: tokenizer.encode(text, add_special_tokens=False)
    save("smollm2", model, encode, items, sorted((HERE / "smollm2/adapters").iterdir()))
