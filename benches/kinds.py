"""Makes a model of one projection and an adapter of each of PEFT's kinds for it, for `flora bench kinds`.

    python -m venv venv && venv/bin/pip install torch==2.9.1 'peft==0.21.*'
    venv/bin/python benches/kinds.py FOLDER
    flora bench kinds --model FOLDER/base.safetensors --adapters FOLDER/adapters
"""

import argparse
import copy
import sys
from pathlib import Path

import torch
from peft import (
    AdaLoraConfig,
    BeftConfig,
    BOFTConfig,
    C3AConfig,
    DeloraConfig,
    GraloraConfig,
    HiraConfig,
    HRAConfig,
    IA3Config,
    LoHaConfig,
    LoKrConfig,
    LoraConfig,
    MissConfig,
    OFTConfig,
    PveraConfig,
    RandLoraConfig,
    RoadConfig,
    ShiraConfig,
    TinyLoraConfig,
    UniLoraConfig,
    VBLoRAConfig,
    VeraConfig,
    get_peft_model,
)
from safetensors.torch import save_file
from torch import nn

sys.path.insert(0, str(Path(__file__).resolve().parents[1] / "tests" / "golden"))
from adapters import fill, save  # noqa: E402


def configs(rank, block):
    """The kinds by their usual options; `rank` components where a kind has ranks, but LoHa's square root of it."""
    return {
        "lora": LoraConfig(r=rank),
        "dora": LoraConfig(r=rank, use_dora=True),
        "ia3": IA3Config(feedforward_modules=[]),
        "hira": HiraConfig(r=rank),
        "adalora": AdaLoraConfig(init_r=rank, target_r=rank, total_step=10),
        "beft": BeftConfig(),
        "boft": BOFTConfig(boft_block_size=block),
        "c3a": C3AConfig(block_size=block),
        "delora": DeloraConfig(r=rank),
        "gralora": GraloraConfig(r=rank, gralora_k=2),
        "hra": HRAConfig(r=rank),
        "loha": LoHaConfig(r=int(rank**0.5)),
        "lokr": LoKrConfig(r=rank),
        "miss": MissConfig(r=rank),
        "oft": OFTConfig(oft_block_size=block),
        "pvera": PveraConfig(r=rank),
        "randlora": RandLoraConfig(r=rank),
        "road": RoadConfig(group_size=block),
        "shira": ShiraConfig(r=rank),
        "tinylora": TinyLoraConfig(r=rank, weight_tying=1.0),
        "unilora": UniLoraConfig(r=rank, theta_d_length=256, save_indices=True),
        "vblora": VBLoRAConfig(r=rank, num_vectors=64, vector_length=block, topk=2),
        "vera": VeraConfig(r=rank),
    }


class Model(nn.Module):
    def __init__(self, size):
        super().__init__()
        self.config = {"model_type": "one_projection", "tie_word_embeddings": False}
        self.q_proj = nn.Linear(size, size, bias=False)
        nn.init.normal_(self.q_proj.weight, std=size**-0.5)

    def forward(self, x):
        return self.q_proj(x)


def main():
    arguments = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    arguments.add_argument("folder", type=Path)
    arguments.add_argument("--size", type=int, default=1024, help="inputs and outputs")
    arguments.add_argument("--rank", type=int, default=16)
    arguments.add_argument("--block", type=int, default=32, help="of kinds with blocks")
    given = arguments.parse_args()
    torch.manual_seed(1)
    model = Model(given.size)
    given.folder.mkdir(parents=True, exist_ok=True)
    save_file({"q_proj.weight": model.q_proj.weight.detach()}, given.folder / "base.safetensors")
    for name, config in configs(given.rank, given.block).items():
        config.target_modules = ["q_proj"]
        save(fill(get_peft_model(copy.deepcopy(model), config), std=0.02), given.folder / "adapters" / name)


if __name__ == "__main__":
    main()
