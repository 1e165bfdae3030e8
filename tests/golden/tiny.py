"""Makes the golden files of a tiny model with random weights: the saved model, its outputs, and those with adapters."""

import shutil

import torch
from adapters import fill, save
from decoder import record, save_outputs
from peft import get_peft_model
from torch import nn

STEPS, LEAST_MARGIN = 16, 0.005


def make(folder, build, config, adapters, positions, seed):
    """Fills `folder`. The longest prompt and its continuation take all `positions` that the model has."""
    shutil.rmtree(folder, ignore_errors=True)
    config._attn_implementation = "eager"
    torch.manual_seed(seed)
    model = build(config).eval()
    for key, parameter in model.named_parameters():
        # Norms near one and biases near zero, but not there: a forgotten one shows.
        is_norm = ("norm" in key or "ln_" in key) and key.endswith("weight")
        is_embedding = "wte" in key or "wpe" in key or "embed" in key
        mean = 1.0 if is_norm else 0.0
        std = 0.1 if key.endswith("bias") else 0.6 if is_embedding else 0.25
        nn.init.normal_(parameter, mean=mean, std=std)
    model.save_pretrained(folder / "model")

    vocabulary = list(range(config.vocab_size))
    prompts = [
        {"name": name, "tokens": torch.randint(config.vocab_size, (length,)).tolist()}
        # The last token of a continuation is never put in.
        for name, length in [("one", 1), ("few", 11), ("full", positions - STEPS + 1)]
    ]

    def outputs(model):
        return [record(model, prompt, vocabulary, STEPS, LEAST_MARGIN) for prompt in prompts]

    base = outputs(model)
    save_outputs(folder / "outputs", "base", base)
    for name, adapter in adapters.items():
        adapted = fill(get_peft_model(model, adapter), std=0.3)
        save(adapted, folder / "adapters" / name)
        recorded = outputs(adapted)
        save_outputs(folder / "outputs", name, recorded, adapter=name)
        for (before, _), (after, line) in zip(base, recorded):
            key = f"{line['name']}.logits"
            print(name, key, (after[key] - before[key]).pow(2).mean().sqrt().item(), before[key].std().item())
        model = adapted.unload()
