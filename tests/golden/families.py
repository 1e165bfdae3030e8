"""Makes families/: tiny seeded models of the families whose blocks are Llama's but for a few fields, and what transformers computes.

    venv/bin/python tests/golden/families.py          the environment is that of smollm2.py

Families share weights and adapters as far as they have the same tensors: a case is a config.json, in the form of transformers 4 or
5, and the outputs of transformers with it. Prompts go far beyond the original context of the scalings, and windows are shorter.
"""

import json
import shutil
from itertools import count
from pathlib import Path

import torch
from adapters import fill, save
from decoder import record, save_outputs
from peft import HiraConfig, IA3Config, LoraConfig, PeftModel, get_peft_model
from safetensors.torch import load_file, save_file
from transformers import AutoConfig, AutoModelForCausalLM

FOLDER = Path(__file__).parent / "families"
STEPS, LEAST_MARGIN = 12, 0.005
POSITIONS, ORIGINAL = 96, 32
PROJECTIONS = ["q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj"]

SIZES = {
    "vocab_size": 67,
    "hidden_size": 32,
    "intermediate_size": 40,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "head_dim": 12,
    "max_position_embeddings": POSITIONS,
    "rms_norm_eps": 1e-5,
    "tie_word_embeddings": False,
    "bos_token_id": 0,
    "eos_token_id": 0,
}
LLAMA = {"architectures": ["LlamaForCausalLM"], "model_type": "llama"} | SIZES
MISTRAL = {"architectures": ["MistralForCausalLM"], "model_type": "mistral"} | SIZES
QWEN2 = {"architectures": ["Qwen2ForCausalLM"], "model_type": "qwen2"} | SIZES
QWEN3 = {"architectures": ["Qwen3ForCausalLM"], "model_type": "qwen3"} | SIZES
THETA = 500.0
DEFAULT = {"rope_parameters": {"rope_type": "default", "rope_theta": THETA}}
LLAMA3 = {
    "rope_type": "llama3",
    "factor": 8.0,
    "low_freq_factor": 1.0,
    "high_freq_factor": 4.0,
    "original_max_position_embeddings": ORIGINAL,
}
YARN = {"rope_type": "yarn", "factor": 3.0, "original_max_position_embeddings": ORIGINAL, "rope_theta": THETA}
MSCALE = {"beta_fast": 4.0, "beta_slow": 0.5, "mscale": 2.0, "mscale_all_dim": 0.5, "truncate": False}

# Name: (weights, config, adapters, the name of the case that it must not compute the same as).
CASES = {
    "llama": ("plain", LLAMA | {"rope_theta": THETA}, ["lora"], None),
    # Version 4's places of the same settings: some folders have no θ but in `rope_scaling`.
    "llama3": ("plain", LLAMA | {"rope_theta": THETA, "rope_scaling": LLAMA3}, ["lora"], "llama"),
    "theta_inside": ("plain", LLAMA | {"rope_scaling": {"type": "linear", "factor": 2.5, "rope_theta": THETA}}, [], "llama"),
    "linear": ("plain", LLAMA | {"rope_parameters": {"rope_type": "linear", "factor": 4, "rope_theta": THETA}}, ["lora"], "llama"),
    "yarn": ("plain", LLAMA | {"rope_parameters": YARN}, ["lora"], "llama"),
    "yarn_mscale": ("plain", LLAMA | {"rope_parameters": YARN | MSCALE}, [], "yarn"),
    "mistral": ("plain", MISTRAL | DEFAULT | {"sliding_window": 20}, ["lora"], "llama"),
    "mistral_without_window": ("plain", MISTRAL | DEFAULT | {"sliding_window": None}, [], None),
    "qwen2": ("biases", QWEN2 | DEFAULT, ["lora", "dora"], "llama"),
    "qwen2_window": (
        "biases",
        QWEN2 | DEFAULT | {"use_sliding_window": True, "sliding_window": 9, "max_window_layers": 1},
        [],
        "qwen2",
    ),
    "qwen3": ("norms", QWEN3 | DEFAULT, ["lora", "dora", "ia3", "hira"], "llama"),
    "qwen3_tied": ("norms_tied", QWEN3 | DEFAULT | {"tie_word_embeddings": True, "use_sliding_window": False}, [], "qwen3"),
}
ADAPTERS = {
    "lora": LoraConfig(r=3, lora_alpha=5, target_modules=PROJECTIONS),
    "dora": LoraConfig(r=2, lora_alpha=3, target_modules=["q_proj", "v_proj", "down_proj"], use_dora=True),
    "ia3": IA3Config(target_modules=["k_proj", "v_proj", "down_proj"], feedforward_modules=["down_proj"]),
    "hira": HiraConfig(r=2, target_modules=PROJECTIONS),
}


def make_weights():
    """Writes the weights of all cases: those that several have are the same."""
    torch.manual_seed(0)
    config = AutoConfig.for_model(**QWEN2)
    tensors = AutoModelForCausalLM.from_config(config).state_dict()
    for layer in range(config.num_hidden_layers):
        for norm in ["q_norm", "k_norm"]:
            tensors[f"model.layers.{layer}.self_attn.{norm}.weight"] = torch.empty(config.head_dim)
    for name in sorted(tensors):
        # Norms near one and biases near zero, but not there: a forgotten one shows.
        is_norm, is_bias, is_embedding = "norm" in name, name.endswith("bias"), "embed" in name
        mean, std = 1.0 if is_norm else 0.0, 0.4 if is_bias else 0.6 if is_embedding else 0.25
        tensors[name] = torch.empty(tensors[name].shape).normal_(mean, std)
    folder = FOLDER / "weights"
    folder.mkdir(parents=True)
    without = {
        "plain": ["bias", "q_norm", "k_norm"],
        "biases": ["q_norm", "k_norm"],
        "norms": ["bias"],
        "norms_tied": ["bias", "lm_head"],
    }
    for name, parts in without.items():
        kept = {key: value for key, value in tensors.items() if not any(part in key for part in parts)}
        save_file(kept, folder / f"{name}.safetensors", metadata={"format": "pt"})


def load(case):
    """The model of a case, as transformers makes it from the files."""
    weights = CASES[case][0]
    folder = FOLDER / case
    config = AutoConfig.from_pretrained(folder)
    config._attn_implementation = "eager"
    model = AutoModelForCausalLM.from_config(config, attn_implementation="eager").eval()
    missing, unexpected = model.load_state_dict(load_file(FOLDER / "weights" / f"{weights}.safetensors"), strict=False)
    assert not unexpected and set(missing) <= {"lm_head.weight"}, (missing, unexpected)
    model.tie_weights()
    return model


def outputs(model, adapters, prompts, vocabulary):
    """What every prompt gives, without adapter and with each."""

    def run(model):
        return [record(model, prompt, vocabulary, STEPS, LEAST_MARGIN) for prompt in prompts]

    found = {"base": run(model)}
    for name in adapters:
        adapted = PeftModel.from_pretrained(model, FOLDER / "adapters" / name).eval()
        found[name] = run(adapted)
        model = adapted.unload()
    return found


def main():
    shutil.rmtree(FOLDER, ignore_errors=True)
    make_weights()
    for case, (_, config, _, _) in CASES.items():
        (FOLDER / case).mkdir()
        (FOLDER / case / "config.json").write_text(json.dumps(config, indent=1) + "\n")
    for name, config in ADAPTERS.items():
        torch.manual_seed(1)
        save(fill(get_peft_model(load("qwen3"), config), std=0.3), FOLDER / "adapters" / name)
    vocabulary = list(range(0, SIZES["vocab_size"], 3))
    full = {}
    for case, (_, _, adapters, other) in CASES.items():
        for seed in count():
            # Another seed where two tokens are about as likely: another order of sums would choose the other.
            torch.manual_seed(seed)
            lengths = [("one", 1), ("few", 11), ("full", POSITIONS - STEPS + 1)]
            prompts = [
                {"name": name, "tokens": torch.randint(SIZES["vocab_size"], (length,)).tolist()} for name, length in lengths
            ]
            try:
                found = outputs(load(case), adapters, prompts, vocabulary)
            except SystemExit:
                continue
            break
        for name, recorded in found.items():
            about = {} if name == "base" else {"adapter": name}
            save_outputs(FOLDER / case / "outputs", name, recorded, **about)
        tokens = torch.tensor([prompts[-1]["tokens"]])
        full[case] = (seed, load(case)(tokens).logits.detach())
        if other:
            theirs = load(other)(tokens).logits.detach()
            change = (full[case][1] - theirs).pow(2).mean().sqrt() / theirs.std()
            print(f"{case}: seed {seed}, differs from {other} by {change:.2f} of the logits' deviation")
            assert change > 0.05, f"{case} computes what {other} does"


if __name__ == "__main__":
    main()
