"""Makes llama_alora/: what transformers and PEFT compute with llama_tiny/ and an activated LoRA (aLoRA).

    venv/bin/python tests/golden/llama_alora.py          the environment is that of smollm2.py, the model that of llama_tiny.py

The adapter acts from the last occurrence of its invocation in the prompt on, and where there is none not at all.
"""

import shutil
from pathlib import Path

import torch
from adapters import fill, save
from decoder import record, save_outputs
from llama_tiny import PROJECTIONS
from peft import LoraConfig, PeftModel, get_peft_model
from transformers import AutoModelForCausalLM

HERE = Path(__file__).parent
FOLDER = HERE / "llama_alora"
STEPS, LEAST_MARGIN = 8, 0.002
INVOCATION = [17, 101, 5]


class Generating:
    """Calls a model as PEFT's `generate` does: what the prompt invokes acts on all that is generated."""

    def __init__(self, model):
        self.model = model

    def __call__(self, ids, **options):
        tokens = ids[0].tolist()
        if options.get("cache") is None:
            starts = range(len(tokens) - len(INVOCATION) + 1)
            self.is_invoked = any(tokens[start : start + len(INVOCATION)] == INVOCATION for start in starts)
            return self.model(ids, **options)
        return self.model(ids, alora_offsets=[1 if self.is_invoked else None], **options)


if __name__ == "__main__":
    shutil.rmtree(FOLDER, ignore_errors=True)
    torch.manual_seed(24)
    model = AutoModelForCausalLM.from_pretrained(HERE / "llama_tiny" / "model", attn_implementation="eager").eval()

    def drawn(count):
        # Without the tokens of an invocation.
        return torch.randint(20, 100, (count,)).tolist()

    prompts = {
        "middle": drawn(37) + INVOCATION + drawn(9),
        "twice": drawn(11) + INVOCATION + drawn(40) + INVOCATION + drawn(4),
        "last": drawn(33) + INVOCATION,
        "first": INVOCATION + drawn(6),
        "never": drawn(40) + INVOCATION[:2],
    }
    config = LoraConfig(
        r=3, lora_alpha=5, target_modules=PROJECTIONS, task_type="CAUSAL_LM", alora_invocation_tokens=INVOCATION
    )
    adapted = fill(get_peft_model(model, config), std=0.2)
    save(adapted, FOLDER / "adapters" / "alora")
    model = adapted.unload()
    adapted = PeftModel.from_pretrained(model, FOLDER / "adapters" / "alora").eval()
    vocabulary = list(range(model.config.vocab_size))
    recorded = [
        record(Generating(adapted), {"name": name, "tokens": tokens}, vocabulary, STEPS, LEAST_MARGIN)
        for name, tokens in prompts.items()
    ]
    save_outputs(FOLDER / "outputs", "alora", recorded, adapter="alora")
    with adapted.disable_adapter():
        for (tensors, line) in recorded:
            base = adapted.base_model(torch.tensor([line["tokens"]])).logits[0]
            differs = (tensors[f"{line['name']}.logits"] - base).abs().amax(-1) > 1e-3
            print(line["name"], "differs from the base model at", differs.nonzero().flatten().tolist()[:3], "…")
