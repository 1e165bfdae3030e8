"""What the golden files of whole decoders have in common: how outputs are recorded.

Versions: Python 3.11, torch 2.9.1 (CPU), transformers 5.24.0, tokenizers 0.23.3, peft 0.21.2, gguf 0.19.0,
safetensors 0.8.0, numpy 2.4.6. README.md describes the files.
"""

import json

import torch
from safetensors.torch import save_file

# One thread, so that sums have one order.
torch.set_num_threads(1)


@torch.no_grad()
def record(model, prompt, vocabulary, steps, least_margin):
    """Runs a prompt; gives its tensors by name, and its line of the JSON file.

    Margins are best less second best logit. One below `least_margin` in the continuation would let another order of
    sums choose another token, so such a prompt is refused.
    """
    name, tokens = prompt["name"], prompt["tokens"]
    output = model(torch.tensor([tokens]), use_cache=True)
    logits = output.logits[0].float()
    tensors = {
        f"{name}.vocabulary": torch.tensor(vocabulary),
        f"{name}.logits": logits[:, vocabulary].contiguous(),
        f"{name}.argmax": logits.argmax(-1),
        f"{name}.margin": margins(logits),
    }
    continuation, least, last = [], float("inf"), logits[-1]
    while True:
        least = min(least, margins(last).item())
        continuation.append(last.argmax().item())
        if len(continuation) == steps:
            break
        output = model(torch.tensor([continuation[-1:]]), cache=output.cache, use_cache=True)
        last = output.logits[0, -1].float()
    if least < least_margin:
        raise SystemExit(f"{name}: the continuation has a margin of {least}; choose another prompt or seed")
    return tensors, prompt | {"continuation": continuation, "continuation_margin": round(least, 5)}


def margins(logits):
    best = logits.topk(2, dim=-1).values
    return best[..., 0] - best[..., 1]


def save_outputs(folder, name, recorded, **about):
    """Writes `NAME.safetensors` and `NAME.json` of what `record` gave for every prompt."""
    folder.mkdir(parents=True, exist_ok=True)
    tensors = {key: value for each, _ in recorded for key, value in each.items()}
    save_file(tensors, folder / f"{name}.safetensors", metadata={"format": "pt"})
    lines = [json.dumps(prompt, ensure_ascii=False) for _, prompt in recorded]
    head = "".join(f'"{key}": {json.dumps(value)},\n' for key, value in about.items())
    (folder / f"{name}.json").write_text("{\n" + head + '"prompts": [\n' + ",\n".join(lines) + "\n]\n}\n")
