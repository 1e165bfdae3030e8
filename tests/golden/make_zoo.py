"""Makes the golden files of `zoo/`: adapters of PEFT's other kinds as PEFT saves them, and the outputs that PEFT computes with them.

    python -m venv venv && venv/bin/pip install torch==2.9.1 'peft==0.21.*'
    venv/bin/python tests/golden/make_zoo.py

The folders are those of `make_peft.py`, with the outputs of adapters as they are loaded; each kind has at least two, with other options. Sizes are odd, or multiples of 6 where blocks
have to divide them.
"""

import torch
from make_peft import Model, make
from peft import (
    AdaLoraConfig,
    BeftConfig,
    BOFTConfig,
    C3AConfig,
    DeloraConfig,
    GraloraConfig,
    HRAConfig,
    LoHaConfig,
    LoKrConfig,
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
)

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

if __name__ == "__main__":
    for seed, (name, (build, config)) in enumerate(CASES.items()):
        torch.manual_seed(seed)
        make(name, build, config, 100 + seed, folder="zoo", again=True)
