"""Makes gpt_bigcode/: a tiny seeded model of StarCoder's family, and what transformers computes with it.

    venv/bin/python tests/golden/gpt_bigcode.py          the environment is that of smollm2.py

Three heads of 16 share one key and one value head. The longest prompt and its continuation fill all positions.
"""

from pathlib import Path

from peft import LoraConfig
from tiny import make
from transformers import GPTBigCodeConfig, GPTBigCodeForCausalLM

CONFIG = GPTBigCodeConfig(
    vocab_size=211,
    n_positions=96,
    n_embd=48,
    n_layer=3,
    n_head=3,
    n_inner=104,
    activation_function="gelu_pytorch_tanh",
    multi_query=True,
    bos_token_id=0,
    eos_token_id=0,
)
ADAPTERS = {
    "lora": LoraConfig(r=3, lora_alpha=5, target_modules=["c_attn"]),
    # c_proj is the name of two modules: attention's and the MLP's.
    "lora_all": LoraConfig(r=2, lora_alpha=3, target_modules=["c_attn", "c_proj", "c_fc"]),
}

if __name__ == "__main__":
    folder = Path(__file__).parent / "gpt_bigcode"
    make(folder, GPTBigCodeForCausalLM, CONFIG, ADAPTERS, positions=CONFIG.n_positions, seed=0)
