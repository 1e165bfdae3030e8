"""Makes llama_ends/: adapters of a tiny Llama's embedding, output matrix and biases, and what PEFT computes with them.

    venv/bin/python tests/golden/llama_ends.py          the environment is that of smollm2.py

`tied/` is a model whose embedding is its output matrix, `untied/` one with an output matrix of its own, and biases. What an
adapter does to one end of a tied model may or may not be done to the other, and what PEFT does is what counts: each adapter is
saved, loaded again into a model from disk, and run from there.
"""

import copy
import shutil
from pathlib import Path

import torch
from adapters import fill, save
from decoder import record, save_outputs
from peft import HiraConfig, IA3Config, LoraConfig, PeftModel, get_peft_model
from torch import nn
from transformers import LlamaConfig, LlamaForCausalLM

HERE = Path(__file__).parent / "llama_ends"
STEPS, LEAST_MARGIN, VOCABULARY, RESIZED = 12, 0.005, 45, 48


def config(tied):
    return LlamaConfig(
        vocab_size=VOCABULARY,
        hidden_size=24,
        intermediate_size=32,
        num_hidden_layers=2,
        num_attention_heads=3,
        num_key_value_heads=1,
        max_position_embeddings=48,
        rope_parameters={"rope_type": "default", "rope_theta": 5000.0},
        tie_word_embeddings=tied,
        attention_bias=not tied,
        bos_token_id=0,
        eos_token_id=0,
        attn_implementation="eager",
    )


QV = ["q_proj", "v_proj"]
# Name: the config, whether the vocabulary is resized before. Of both models unless it says another.
BOTH = {
    "head": LoraConfig(r=3, lora_alpha=4, target_modules=[*QV, "lm_head"]),
    "embedding": LoraConfig(r=3, lora_alpha=4, target_modules=[*QV, "embed_tokens"]),
    "embedding_dora": LoraConfig(r=2, lora_alpha=3, use_dora=True, target_modules=["v_proj", "embed_tokens"]),
    "embedding_hira": HiraConfig(r=2, target_modules=["q_proj", "embed_tokens"]),
    "saved": LoraConfig(r=2, lora_alpha=3, target_modules=QV, modules_to_save=["embed_tokens", "lm_head"]),
    "saved_embedding": LoraConfig(r=2, lora_alpha=3, target_modules=QV, modules_to_save=["embed_tokens"]),
    "saved_head": LoraConfig(r=2, lora_alpha=3, target_modules=QV, modules_to_save=["lm_head"]),
    "tokens": LoraConfig(r=2, lora_alpha=3, target_modules=QV, trainable_token_indices=[1, 7, 40]),
    "resized": LoraConfig(r=2, lora_alpha=3, target_modules=QV),
}
CASES = {
    "tied": BOTH
    | {
        "kept_tied": LoraConfig(r=3, lora_alpha=4, target_modules=["q_proj", "embed_tokens"], ensure_weight_tying=True),
        "saved_tied": LoraConfig(
            r=2, lora_alpha=3, target_modules=QV, modules_to_save=["embed_tokens"], ensure_weight_tying=True
        ),
    },
    "untied": BOTH
    | {
        "tokens_of_both": LoraConfig(
            r=2, lora_alpha=3, target_modules=QV, trainable_token_indices={"embed_tokens": [3, 9], "lm_head": [2, 9, 30]}
        ),
        "lora_bias": LoraConfig(r=2, lora_alpha=3, target_modules=[*QV, "o_proj"], lora_bias=True),
        "bias_lora_only": LoraConfig(r=2, lora_alpha=3, target_modules=[*QV, "o_proj"], bias="lora_only"),
        "ia3_bias": IA3Config(target_modules=["k_proj", "v_proj", "down_proj"], feedforward_modules=["down_proj"]),
    },
}


def fresh(folder):
    return LlamaForCausalLM.from_pretrained(folder, attn_implementation="eager").eval()


def train(adapted):
    """What training would change beside the factors."""
    fill(adapted, std=0.3)
    for key, parameter in adapted.named_parameters():
        if "modules_to_save" in key or "trainable_tokens_delta" in key:
            nn.init.normal_(parameter, std=0.4)
        elif key.endswith("lora_B.default.bias") or key.endswith("base_layer.bias") and parameter.requires_grad:
            nn.init.normal_(parameter, std=0.5)


def make(name, cases, seed):
    folder = HERE / name
    shutil.rmtree(folder, ignore_errors=True)
    torch.manual_seed(seed)
    model = LlamaForCausalLM(config(tied=name == "tied")).eval()
    for key, parameter in model.named_parameters():
        mean = 1.0 if "norm" in key else 0.0
        nn.init.normal_(parameter, mean=mean, std=0.1 if key.endswith("bias") else 0.6 if "embed" in key else 0.3)
    model.save_pretrained(folder / "model")
    prompts = [
        {"name": "few", "tokens": [1, 7, 3, 40, 9, 2, 30, 7]},
        {"name": "more", "tokens": torch.randint(VOCABULARY, (21,)).tolist()},
    ]

    base = outputs(fresh(folder / "model"), VOCABULARY, prompts)
    save_outputs(folder / "outputs", "base", base)
    for case in cases:
        make_adapter(folder, case, cases[case], prompts, base)


def outputs(model, vocabulary, prompts):
    return [record(model, prompt, list(range(vocabulary)), STEPS, LEAST_MARGIN) for prompt in prompts]


def make_adapter(folder, case, adapter, prompts, base):
    """Draws adapters until one leaves a margin to every choice."""
    while True:
        resized = RESIZED if case == "resized" else VOCABULARY
        own_prompts = prompts
        trained = fresh(folder / "model")
        if resized != VOCABULARY:
            trained.resize_token_embeddings(resized, mean_resizing=False)
            # The new rows are seen, and chosen.
            own_prompts = [*prompts, {"name": "new", "tokens": [46, 3, 45, 47, 8]}]
        trained = get_peft_model(trained, copy.deepcopy(adapter))
        train(trained)
        if resized != VOCABULARY:
            ends = {id(end.weight): end for end in (trained.get_input_embeddings(), trained.get_output_embeddings())}
            for end in ends.values():
                nn.init.normal_(end.weight, std=0.5)
        save(trained, folder / "adapters" / case, embeddings=resized != VOCABULARY or "auto")
        served = fresh(folder / "model")
        if resized != VOCABULARY:
            served.resize_token_embeddings(resized, mean_resizing=False)
        served = PeftModel.from_pretrained(served, folder / "adapters" / case).eval()
        try:
            recorded = outputs(served, resized, own_prompts)
        except SystemExit as narrow:
            print(case, narrow)
            continue
        save_outputs(folder / "outputs", case, recorded, adapter=case)
        for (before, _), (after, line) in zip(base, recorded):
            key = f"{line['name']}.logits"
            change = (after[key][:, :VOCABULARY] - before[key]).pow(2).mean().sqrt().item()
            print(folder.name, case, key, change, before[key].std().item())
        return


if __name__ == "__main__":
    for name, seed in [("tied", 0), ("untied", 1)]:
        make(name, CASES[name], seed)
