"""Loads adapters that `flora train` wrote with PEFT, and compares greedy tokens with those of `flora generate`.

    venv/bin/python tests/golden/check_trained.py FLORA MODEL ADAPTERS PROMPT...

FLORA is the command, MODEL a Hugging Face folder with a tokenizer, ADAPTERS the folder that --out named. Kinds that PEFT doesn't have
are passed over by name. It writes nothing.
"""

import json
import subprocess
import sys
from pathlib import Path

import torch
from peft import PeftModel
from transformers import AutoModelForCausalLM, AutoTokenizer

TOKENS, LEAST_MARGIN = 12, 1e-3


@torch.no_grad()
def greedy(model, tokens):
    """Tokens, up to where the best logit is hardly above the second."""
    generated = []
    for _ in range(TOKENS):
        best = model(torch.tensor([tokens + generated])).logits[0, -1].topk(2)
        if best.values[0] - best.values[1] < LEAST_MARGIN:
            break
        generated.append(best.indices[0].item())
    return generated


if __name__ == "__main__":
    flora, path, adapters, *prompts = sys.argv[1:]
    tokenizer = AutoTokenizer.from_pretrained(path)
    base = AutoModelForCausalLM.from_pretrained(path, dtype=torch.float32).eval()
    prompts = {prompt: tokenizer(prompt)["input_ids"] for prompt in prompts}
    alone = {prompt: greedy(base, tokens) for prompt, tokens in prompts.items()}
    wrong = compared = changed = 0
    for folder in sorted(Path(adapters).glob("*/adapter_config.json")):
        name = folder.parent.name
        kind = json.loads(folder.read_text())["peft_type"]
        if kind == "FLORA":
            print(f"{name}: {kind} is not PEFT's")
            continue
        model = PeftModel.from_pretrained(base, folder.parent).eval()
        for prompt, tokens in prompts.items():
            expected = greedy(model, tokens)
            options = ["--adapters", adapters, "--adapter", name, "--prompt", prompt, "--max-tokens", str(TOKENS)]
            said = subprocess.run([flora, "generate", "--model", path, "--json", *options], capture_output=True, check=True)
            found = json.loads(said.stdout)["tokens"][: len(expected)]
            # An end of text ends flora's answer.
            same = found == expected[: len(found)] and found
            wrong, compared = wrong + (not same), compared + 1
            changed += expected != alone[prompt]
            print(f"{name} ({kind}) {prompt!r}: {'same' if same else 'DIFFERENT'} {found} {expected}, the base {alone[prompt]}")
        base = model.unload()
    print(f"{compared - wrong} of {compared} are the same, and {changed} not the base's")
    sys.exit(1 if wrong or not changed else 0)
