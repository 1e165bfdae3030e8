"""Checks smollm2/ by a second implementation: the GGUF file in numpy, float64, with nothing of torch or transformers.

    venv/bin/pip install numpy safetensors gguf==0.19.0
    venv/bin/python tests/golden/check_smollm2.py MODEL.gguf          a minute

Weights stay in the file's order, in which neighbouring rows of a query or key head are rotated together. transformers
restores Hugging Face's order as it loads, so its undoing of the interleaving is checked as well. Adapters are folded
into weights. Prints, for each prompt, the largest and the root mean square distance of logits. `--weights`, which
needs torch and transformers, compares each weight that transformers reads, bit by bit.
"""

import json
import sys
from pathlib import Path

import numpy as np
from gguf import GGUFReader
from safetensors.numpy import load_file

HERE = Path(__file__).parent / "smollm2"
# About ten times what float32 is off by. The least slip that was tried, epsilon 1e-6 for 1e-5, is off by 0.013.
TOLERANCE = 5e-4

MODULES = {
    "attn_q": "self_attn.q_proj", "attn_k": "self_attn.k_proj", "attn_v": "self_attn.v_proj",
    "attn_output": "self_attn.o_proj",
    "ffn_gate": "mlp.gate_proj", "ffn_up": "mlp.up_proj", "ffn_down": "mlp.down_proj",
}  # fmt: skip


def decode(tensor):
    """ggml's formulas in float32: Q8_0 d·q, Q4_1 d·q + m, low nibbles first.

    d has 11 significant bits and q at most 8, so the product is exact and only the sum rounds, with an FMA or without.
    """
    shape = [int(size) for size in tensor.shape][::-1]
    kind = tensor.tensor_type.name
    if kind == "F32":
        return np.array(tensor.data, np.float32).reshape(shape)
    blocks = np.asarray(tensor.data).reshape(-1, {"Q8_0": 34, "Q4_1": 20}[kind])
    half = lambda at: blocks[:, at : at + 2].copy().view(np.float16).astype(np.float32)
    if kind == "Q8_0":
        return (half(0) * blocks[:, 2:].view(np.int8)).reshape(shape)
    nibbles = np.concatenate([blocks[:, 4:] & 15, blocks[:, 4:] >> 4], axis=1)
    return (half(0) * nibbles.astype(np.float32) + half(2)).reshape(shape)


class Llama:
    def __init__(self, path):
        reader = GGUFReader(path)
        field = lambda key: reader.fields[f"llama.{key}"].contents()
        self.layers, self.heads = field("block_count"), field("attention.head_count")
        self.key_heads, self.base = field("attention.head_count_kv"), field("rope.freq_base")
        self.epsilon = field("attention.layer_norm_rms_epsilon")
        self.stored = {tensor.name: decode(tensor) for tensor in reader.tensors}
        self.weights = {name: weight.astype(np.float64) for name, weight in self.stored.items()}

    def order(self, name, rows):
        """Which row of Hugging Face's weight each row of the file's is: row 2j + s of a head is its row s·h/2 + j."""
        heads = {"attn_q": self.heads, "attn_k": self.key_heads}.get(name)
        return np.arange(rows) if heads is None else np.arange(rows).reshape(heads, 2, -1).swapaxes(1, 2).reshape(-1)

    def adapted(self, folder):
        """The same model with a PEFT adapter folded in."""
        config = json.loads((folder / "adapter_config.json").read_text())
        tensors = load_file(folder / "adapter_model.safetensors")
        copy = object.__new__(Llama)
        copy.__dict__ = self.__dict__ | {"weights": dict(self.weights)}
        used = 0
        for layer in range(self.layers):
            for name, module in MODULES.items():
                key, prefix = f"blk.{layer}.{name}.weight", f"base_model.model.model.layers.{layer}.{module}"
                names = [each for each in tensors if each.startswith(prefix)]
                mine = {each.removeprefix(prefix + "."): tensors[each].astype(np.float64) for each in names}
                if not mine:
                    continue
                used += len(mine)
                weight = self.weights[key]
                order = self.order(name, len(weight))
                if config["peft_type"] == "LORA":
                    scale = config["lora_alpha"] / config["r"]
                    weight = weight + scale * (mine["lora_B.weight"] @ mine["lora_A.weight"])[order]
                elif config["peft_type"] == "HIRA":
                    weight = weight * (1 + (mine["hira_B"] @ mine["hira_A"])[order])
                elif module.rpartition(".")[2] in config["feedforward_modules"]:
                    weight = weight * mine["ia3_l"].reshape(1, -1)
                else:
                    weight = weight * mine["ia3_l"].reshape(-1, 1)[order]
                copy.weights[key] = weight
        assert used == len(tensors), "a tensor of the adapter belongs to no weight"
        return copy

    def norm(self, x, weight):
        return x / np.sqrt((x * x).mean(-1, keepdims=True) + self.epsilon) * weight

    def rotate(self, x):
        size = x.shape[-1]
        angle = np.outer(np.arange(len(x)), self.base ** (-np.arange(0, size, 2) / size))[:, None]
        even, odd = x[..., ::2], x[..., 1::2]
        rotated = [even * np.cos(angle) - odd * np.sin(angle), even * np.sin(angle) + odd * np.cos(angle)]
        return np.stack(rotated, axis=-1).reshape(x.shape)

    def logits(self, tokens):
        x = self.weights["token_embd.weight"][tokens]
        rows, d = x.shape
        mask = np.triu(np.full((rows, rows), -np.inf), 1)
        for layer in range(self.layers):
            weight = lambda name: self.weights[f"blk.{layer}.{name}.weight"]
            y = self.norm(x, weight("attn_norm"))
            q, k, v = ((y @ weight(f"attn_{name}").T).reshape(rows, -1, d // self.heads) for name in "qkv")
            q = self.rotate(q)
            k, v = (np.repeat(each, self.heads // self.key_heads, axis=1) for each in (self.rotate(k), v))
            scores = np.einsum("thd,shd->hts", q, k) / np.sqrt(d // self.heads) + mask
            scores = np.exp(scores - scores.max(-1, keepdims=True))
            scores /= scores.sum(-1, keepdims=True)
            x = x + np.einsum("hts,shd->thd", scores, v).reshape(rows, d) @ weight("attn_output").T
            y = self.norm(x, weight("ffn_norm"))
            gate = y @ weight("ffn_gate").T
            x = x + (gate / (1 + np.exp(-gate)) * (y @ weight("ffn_up").T)) @ weight("ffn_down").T
        return self.norm(x, self.weights["output_norm.weight"]) @ self.weights["token_embd.weight"].T


def check(model, name):
    golden = load_file(HERE / "outputs" / f"{name}.safetensors")
    for prompt in json.loads((HERE / "outputs" / f"{name}.json").read_text())["prompts"]:
        tokens, continuation = prompt["tokens"], prompt["continuation"]
        # One pass over prompt and continuation: every token must be the best one after those before it.
        logits = model.logits(tokens + continuation[:-1])
        mine = {key: golden[f"{prompt['name']}.{key}"] for key in ("vocabulary", "logits", "argmax", "margin")}
        off = logits[: len(tokens), mine["vocabulary"]] - mine["logits"]
        sure = mine["margin"] > 2 * TOLERANCE
        assert np.abs(off).max() < TOLERANCE, np.abs(off).max()
        assert (logits[: len(tokens)].argmax(-1) == mine["argmax"])[sure].all()
        assert logits[len(tokens) - 1 :].argmax(-1).tolist() == continuation
        print(f"{name} {prompt['name']}: largest {np.abs(off).max():.1e}, rms {np.sqrt((off * off).mean()):.1e}")


def check_weights(model, path):
    import torch
    from transformers import AutoModelForCausalLM

    read = AutoModelForCausalLM.from_pretrained(path.parent, gguf_file=path.name, dtype=torch.float32).state_dict()
    for layer in range(model.layers):
        for name, module in MODULES.items():
            theirs = read[f"model.layers.{layer}.{module}.weight"].numpy()
            mine = model.stored[f"blk.{layer}.{name}.weight"]
            assert np.array_equal(theirs[model.order(name, len(theirs))], mine), (layer, name)
    assert np.array_equal(read["model.embed_tokens.weight"].numpy(), model.stored["token_embd.weight"])
    print("every weight has the same bits")


if __name__ == "__main__":
    path = Path(next(argument for argument in sys.argv[1:] if not argument.startswith("--")))
    model = Llama(path)
    if "--weights" in sys.argv:
        check_weights(model, path)
    check(model, "base")
    for folder in sorted((HERE / "adapters").iterdir()):
        check(model.adapted(folder), folder.name)
