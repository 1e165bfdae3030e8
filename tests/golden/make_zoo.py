"""Makes the golden files of `zoo/` and `mixed/`: adapters of PEFT's other kinds as PEFT saves them, and the outputs that PEFT computes
with them.

    python -m venv venv && venv/bin/pip install torch==2.9.1 'peft==0.21.*'
    venv/bin/python tests/golden/make_zoo.py

`mixed/` has an adapter of every kind for one model, and what PEFT computes of the same inputs with each of them. `peft_types.txt` lists the
kinds that PEFT has.

The folders of `zoo/` are those of `make_peft.py`, with the outputs of adapters as they are loaded; each kind has at least two, with other options. Sizes are odd, or multiples of 6 where blocks
have to divide them.
"""

import copy
import json
import shutil

import torch
from adapters import fill, save
from make_peft import HERE, Model, make
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
    PeftModel,
    PeftType,
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

QK = ["q_proj", "k_proj"]
UP_DOWN = ["up_proj", "down_proj"]


def odd(bias=False):
    return lambda: Model(bias=bias)


def blocked(bias=False):
    return lambda: Model(bias=bias, sizes=(30, 42, 18, 24))


CASES = {
    "loha": (odd(), LoHaConfig(r=3, alpha=7, target_modules=QK)),
    "loha_patterns": (
        odd(bias=True),
        LoHaConfig(
            r=2, alpha=5, init_weights=False, target_modules=UP_DOWN, rank_pattern={"up_proj": 4}, alpha_pattern={"down_proj": 3}
        ),
    ),
    "adalora": (odd(), AdaLoraConfig(init_r=5, target_r=3, lora_alpha=7, total_step=10, target_modules=QK)),
    "adalora_cut": (
        odd(bias=True),
        AdaLoraConfig(
            init_r=4,
            lora_alpha=3,
            total_step=10,
            target_modules=["down_proj"],
            rank_pattern={
                f"model.layers.{layer}.mlp.down_proj.lora_E": kept
                for layer, kept in enumerate([[True, False, True, True], [False, True, False, False]])
            },
        ),
    ),
    "vera": (odd(), VeraConfig(r=5, target_modules=QK)),
    "vera_wide": (odd(bias=True), VeraConfig(r=3, d_initial=0.5, projection_prng_key=7, target_modules=UP_DOWN)),
    "pvera": (odd(), PveraConfig(r=4, target_modules=QK)),
    "pvera_wide": (odd(bias=True), PveraConfig(r=2, target_modules=UP_DOWN)),
    "vblora": (blocked(), VBLoRAConfig(r=3, num_vectors=11, vector_length=6, topk=2, target_modules=QK)),
    "vblora_topk": (blocked(bias=True), VBLoRAConfig(r=2, num_vectors=5, vector_length=3, topk=4, target_modules=UP_DOWN)),
    "unilora": (odd(), UniLoraConfig(r=3, theta_d_length=41, save_indices=True, target_modules=QK)),
    "unilora_short": (odd(bias=True), UniLoraConfig(r=2, theta_d_length=7, save_indices=True, target_modules=UP_DOWN)),
    "tinylora": (odd(), TinyLoraConfig(r=3, u=5, weight_tying=1.0, target_modules=QK)),
    "tinylora_small": (odd(bias=True), TinyLoraConfig(r=13, u=2, weight_tying=1.0, target_modules=["k_proj", "up_proj"])),
    "delora": (odd(), DeloraConfig(r=3, target_modules=QK)),
    "delora_patterns": (
        odd(bias=True),
        DeloraConfig(r=2, delora_lambda=4, target_modules=UP_DOWN, rank_pattern={"up_proj": 5}, lambda_pattern={"down_proj": 2}),
    ),
    "miss": (odd(), MissConfig(r=5, target_modules=QK)),
    "miss_mini": (blocked(bias=True), MissConfig(r=4, mini_r=6, init_weights="mini", target_modules=UP_DOWN)),
    "gralora": (blocked(), GraloraConfig(r=4, alpha=7, gralora_k=2, target_modules=QK)),
    "gralora_hybrid": (blocked(bias=True), GraloraConfig(r=6, alpha=5, gralora_k=3, hybrid_r=2, target_modules=UP_DOWN)),
    "hra": (odd(), HRAConfig(r=5, target_modules=QK)),
    "hra_orthogonal": (odd(bias=True), HRAConfig(r=4, apply_GS=True, target_modules=UP_DOWN)),
    "beft": (odd(), BeftConfig(target_modules=QK)),
    "beft_bias": (odd(bias=True), BeftConfig(target_modules=["q_proj", "down_proj"])),
    "lokr": (blocked(), LoKrConfig(r=2, alpha=3, target_modules=QK)),
    "lokr_both": (
        blocked(bias=True),
        LoKrConfig(r=1, alpha=2, decompose_both=True, decompose_factor=6, target_modules=UP_DOWN, rank_pattern={"up_proj": 2}),
    ),
    "lokr_whole": (odd(), LoKrConfig(r=40, alpha=9, target_modules=["k_proj"])),
    "c3a": (blocked(), C3AConfig(block_size=6, target_modules=QK)),
    "c3a_pattern": (
        blocked(bias=True),
        C3AConfig(block_size=2, block_size_pattern={"up_proj": 3}, target_modules=UP_DOWN),
    ),
    "shira": (odd(), ShiraConfig(r=2, random_seed=3, target_modules=QK)),
    "shira_wide": (odd(bias=True), ShiraConfig(r=4, random_seed=1, target_modules=UP_DOWN)),
    "road": (blocked(), RoadConfig(group_size=6, target_modules=QK)),
    "road_2": (blocked(), RoadConfig(variant="road_2", group_size=2, target_modules=UP_DOWN)),
    "oft": (blocked(), OFTConfig(oft_block_size=6, target_modules=QK)),
    "oft_shared": (
        blocked(bias=True),
        OFTConfig(r=3, oft_block_size=0, block_share=True, num_cayley_neumann_terms=3, target_modules=UP_DOWN),
    ),
    "boft": (blocked(), BOFTConfig(boft_block_size=6, target_modules=QK)),
    "boft_blocks": (blocked(bias=True), BOFTConfig(boft_block_size=0, boft_block_num=6, target_modules=UP_DOWN)),
    "randlora": (odd(), RandLoraConfig(r=4, randlora_alpha=9, target_modules=QK)),
    "randlora_sparse": (odd(bias=True), RandLoraConfig(r=5, randlora_alpha=7, sparse=True, target_modules=UP_DOWN)),
    "road_4": (blocked(), RoadConfig(variant="road_4", group_size=6, target_modules=UP_DOWN)),
}

# Those of `make_peft.py`, which share the batch.
OTHERS = {
    "lora": LoraConfig(r=3, lora_alpha=7),
    "dora": LoraConfig(r=2, lora_alpha=5, use_dora=True),
    "ia3": IA3Config(feedforward_modules=[]),
    "hira": HiraConfig(r=3),
}


def mixed(seed):
    torch.manual_seed(seed)
    model = blocked()()
    for parameter in model.parameters():
        nn.init.normal_(parameter, std=0.5)
    base = {key: value.detach().clone() for key, value in model.state_dict().items()}
    paths = [f"model.layers.{layer}.self_attn.q_proj" for layer in range(2)]
    inputs = {path: torch.randn(3, 30) for path in paths}
    folder = HERE / "mixed"
    shutil.rmtree(folder, ignore_errors=True)
    outputs = {}
    # A kind's first case is the one without further words in its name.
    firsts = {name: config for name, (_, config) in CASES.items() if "_" not in name}
    for name, config in (OTHERS | firsts).items():
        config = copy.deepcopy(config)
        config.target_modules = {"q_proj"}
        adapted = fill(get_peft_model(copy.deepcopy(model), config), std=0.3)
        save(adapted, folder / "adapters" / name)
        adapted = PeftModel.from_pretrained(copy.deepcopy(model), folder / "adapters" / name).eval()
        with torch.no_grad():
            for path in paths:
                outputs[f"{name}:{path}"] = adapted.base_model.model.get_submodule(path)(inputs[path]).contiguous()
    (folder / "config.json").write_text(json.dumps({"model_type": Model.model_type}) + "\n")
    kept = {f"{path}.weight": base[f"{path}.weight"] for path in paths}
    for file, tensors in [("base", kept), ("inputs", inputs), ("outputs", outputs)]:
        save_file(tensors, folder / f"{file}.safetensors", metadata={"format": "pt"})


if __name__ == "__main__":
    for seed, (name, (build, config)) in enumerate(CASES.items()):
        torch.manual_seed(seed)
        make(name, build, config, 100 + seed, folder="zoo", again=True)
    mixed(7)
    (HERE / "peft_types.txt").write_text("".join(f"{name}\n" for name in sorted(PeftType.__members__)))
