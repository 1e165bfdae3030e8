"""Makes the golden files of this folder: adapters as PEFT saves them, and the outputs that PEFT computes with them.

    python -m venv venv && venv/bin/pip install torch==2.9.1 'peft==0.21.*'
    venv/bin/python tests/golden/make_peft.py

Every case is a folder `peft/NAME` with `adapter/` (what save_pretrained wrote), `base.safetensors` (the weights of the model,
without adapter; `config.json` beside it says which model stores them), `inputs.safetensors` and `outputs.safetensors` (one [rows, d] and [rows, k] tensor per module path). The sizes
are odd on purpose. PEFT's adapters start as the identity, so they are filled with random numbers before anything is computed.
"""

import json
import shutil
from pathlib import Path

import torch
from adapters import fill, save
from peft import HiraConfig, IA3Config, LoraConfig, PeftModel, get_peft_model
from safetensors.torch import save_file
from torch import nn
from transformers.pytorch_utils import Conv1D

HERE = Path(__file__).parent
D, HEADS, KEYS, HIDDEN, ROWS = 37, 29, 11, 19, 3


class Attention(nn.Module):
    def __init__(self, bias, d, heads, keys):
        super().__init__()
        self.q_proj = nn.Linear(d, heads, bias=bias)
        self.k_proj = nn.Linear(d, keys, bias=bias)


class Mlp(nn.Module):
    def __init__(self, bias, d, hidden):
        super().__init__()
        self.up_proj = nn.Linear(d, hidden, bias=bias)
        self.down_proj = nn.Linear(hidden, d, bias=bias)


class Layer(nn.Module):
    def __init__(self, bias, sizes):
        super().__init__()
        d, heads, keys, hidden = sizes
        self.self_attn = Attention(bias, d, heads, keys)
        self.mlp = Mlp(bias, d, hidden)


class Model(nn.Module):
    """Two layers under Llama's names; `model` and `layers` give the usual paths."""

    model_type = "llama"

    def __init__(self, bias=False, sizes=(D, HEADS, KEYS, HIDDEN)):
        super().__init__()
        self.model = nn.Module()
        self.model.layers = nn.ModuleList(Layer(bias, sizes) for _ in range(2))


class Block(nn.Module):
    def __init__(self):
        super().__init__()
        self.c_attn = Conv1D(HEADS, D)
        self.c_fc = Conv1D(HIDDEN, D)


class Conv1DModel(nn.Module):
    """GPT-2's modules, whose weights are [d, k]."""

    model_type = "gpt2"

    def __init__(self):
        super().__init__()
        self.h = nn.ModuleList([Block()])


QK = ["q_proj", "k_proj"]
CASES = {
    "lora": (Model, LoraConfig(r=3, lora_alpha=7, target_modules=QK)),
    "lora_bias": (lambda: Model(bias=True), LoraConfig(r=2, lora_alpha=5, target_modules=QK)),
    "rslora": (Model, LoraConfig(r=5, lora_alpha=4, use_rslora=True, target_modules=QK)),
    "patterns": (
        Model,
        LoraConfig(
            r=2,
            lora_alpha=3,
            target_modules=r".*\.(q_proj|k_proj|up_proj)",
            # In the order of the alphabet: PEFT saves the keys sorted, and of several matches the first holds.
            rank_pattern={"^model.layers.1.self_attn.k_proj": 4, "k_proj": 1, r"layers\.0\..*q_proj": 5},
            alpha_pattern={"up_proj": 11, r"model\.layers\.1\.self_attn\.(?!q)\w+": 6},
        ),
    ),
    "conv1d": (Conv1DModel, LoraConfig(r=3, lora_alpha=5, fan_in_fan_out=True, target_modules=["c_attn", "c_fc"])),
    "dora": (lambda: Model(bias=True), LoraConfig(r=3, lora_alpha=5, use_dora=True, target_modules=QK)),
    "dora_conv1d": (Conv1DModel, LoraConfig(r=2, lora_alpha=3, use_dora=True, fan_in_fan_out=True, target_modules=["c_fc"])),
    "ia3": (Model, IA3Config(target_modules=["k_proj", "down_proj"], feedforward_modules=["down_proj"])),
    "ia3_bias": (lambda: Model(bias=True), IA3Config(target_modules=["q_proj", "up_proj"], feedforward_modules=["up_proj"])),
    "hira": (Model, HiraConfig(r=3, target_modules=QK)),
    "hira_conv1d": (Conv1DModel, HiraConfig(r=2, fan_in_fan_out=True, target_modules=["c_fc"])),
}


def make(name, build, config, seed, folder="peft", again=False):
    """One case; with `again`, the outputs are those of the adapter as it is loaded from its folder."""
    torch.manual_seed(seed)
    model = build()
    for parameter in model.parameters():
        nn.init.normal_(parameter, std=0.5)
    base = {key: value.detach().clone() for key, value in model.state_dict().items()}
    model = fill(get_peft_model(model, config), std=0.3 if isinstance(config, IA3Config) else 0.5)

    folder = HERE / folder / name
    shutil.rmtree(folder, ignore_errors=True)
    save(model, folder / "adapter")

    if again:
        plain = build()
        plain.load_state_dict(base)
        model = PeftModel.from_pretrained(plain, folder / "adapter").eval()

    inputs, outputs = {}, {}
    with torch.no_grad():
        for path, module in model.base_model.model.named_modules():
            if hasattr(module, "base_layer"):
                weight = module.get_base_layer().weight
                d = weight.shape[0] if isinstance(module.get_base_layer(), Conv1D) else weight.shape[1]
                inputs[path] = torch.randn(ROWS, d)
                outputs[path] = module(inputs[path]).contiguous()
    adapted = {key: base[key] for key in base if key.rpartition(".")[0] in inputs}
    (folder / "config.json").write_text(json.dumps({"model_type": build().model_type}) + "\n")
    for file, tensors in [("base", adapted), ("inputs", inputs), ("outputs", outputs)]:
        save_file(tensors, folder / f"{file}.safetensors", metadata={"format": "pt"})


if __name__ == "__main__":
    for seed, (name, (build, config)) in enumerate(CASES.items()):
        make(name, build, config, seed)
