"""Makes llama_tiny/: a tiny seeded Llama as a Hugging Face folder, and what transformers computes with it.

    venv/bin/python tests/golden/llama_tiny.py          the environment is that of smollm2.py

Four query heads of 10 share two key and value heads, and the head has a weight of its own.
"""

from pathlib import Path

from peft import HiraConfig, LoraConfig
from tiny import make
from transformers import LlamaConfig, LlamaForCausalLM

CONFIG = LlamaConfig(
    vocab_size=173,
    hidden_size=40,
    intermediate_size=92,
    num_hidden_layers=3,
    num_attention_heads=4,
    num_key_value_heads=2,
    max_position_embeddings=96,
    rms_norm_eps=1e-5,
    rope_parameters={"rope_type": "default", "rope_theta": 5000.0},
    tie_word_embeddings=False,
    bos_token_id=0,
    eos_token_id=0,
)
PROJECTIONS = ["q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj"]
ADAPTERS = {
    "lora": LoraConfig(r=3, lora_alpha=5, target_modules=["q_proj", "k_proj"]),
    "hira": HiraConfig(r=2, target_modules=PROJECTIONS),
}

if __name__ == "__main__":
    folder = Path(__file__).parent / "llama_tiny"
    make(folder, LlamaForCausalLM, CONFIG, ADAPTERS, positions=CONFIG.max_position_embeddings, seed=2)
