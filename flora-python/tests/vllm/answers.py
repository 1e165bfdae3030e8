"""What PEFT says: greedy tokens of a request, and their log-probabilities in f64 and in the engine's type.

FLORA isn't PEFT's; its weights are multiplied out here, W0 * (b a), which is its definition.
"""

from __future__ import annotations

import hashlib
import json
from dataclasses import dataclass
from typing import Optional

import torch
from folders import KINDS, folder
from models import TYPES, cache, model
from peft import PeftModel
from safetensors.torch import load_file
from transformers import AutoModelForCausalLM, AutoTokenizer


@dataclass(frozen=True)
class Reference:
    """The greedy continuation of a prompt."""

    prompt: list[int]
    tokens: list[int]
    #: Of each token, in f64 and in the type that it was generated in.
    exact: list[float]
    rounded: list[float]
    #: By how much each token is ahead of the next best one.
    margin: list[float]


def adapted(name: Optional[str], seed: int, dtype: torch.dtype):
    """The model with an adapter."""
    base = AutoModelForCausalLM.from_pretrained(model("float32"), dtype=torch.float32)
    if name is None:
        return base.to(dtype).eval()
    path = folder(name, seed)
    if KINDS[name].flora is None:
        return PeftModel.from_pretrained(base, path, autocast_adapter_dtype=False).to(dtype).eval()
    factors = load_file(f"{path}/adapter_model.safetensors")
    with torch.no_grad():
        for module, layer in base.named_modules():
            b = factors.get(f"base_model.model.{module}.flora_B")
            if b is not None:
                a = factors[f"base_model.model.{module}.flora_A"]
                layer.weight.copy_(layer.weight.double() * (b.double() @ a.double()).T)
    return base.to(dtype).eval()


def reference(name: Optional[str], seed: int, prompt: str, count: int, dtype: str) -> Reference:
    """The continuation of a prompt by ``count`` tokens, computed once and kept."""
    key = hashlib.sha256(json.dumps([name, seed, prompt, count, dtype, 2]).encode()).hexdigest()[:20]
    kept = cache() / "reference" / f"{key}.json"
    if kept.exists():
        return Reference(**json.loads(kept.read_text()))
    ids = AutoTokenizer.from_pretrained(model("float32"))(prompt, return_tensors="pt").input_ids
    with torch.no_grad():
        network = adapted(name, seed, TYPES[dtype])
        generated = network.generate(
            input_ids=ids, max_new_tokens=count, min_new_tokens=count, do_sample=False, output_logits=True, return_dict_in_generate=True
        )
        tokens = generated.sequences[0, ids.shape[1] :]
        rounded = [torch.log_softmax(logits[0].double(), -1)[token].item() for logits, token in zip(generated.logits, tokens)]
        network = adapted(name, seed, torch.float64)
        logits = network(generated.sequences).logits[0, ids.shape[1] - 1 : -1]
        exact = torch.log_softmax(logits, -1)
        best = logits.topk(2, dim=-1).values
    made = Reference(
        ids[0].tolist(),
        tokens.tolist(),
        exact.gather(1, tokens.unsqueeze(1))[:, 0].tolist(),
        rounded,
        (best[:, 0] - best[:, 1]).tolist(),
    )
    kept.parent.mkdir(parents=True, exist_ok=True)
    kept.write_text(json.dumps(made.__dict__))
    return made
