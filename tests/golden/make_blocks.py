"""Makes blocks.json: one or two blocks of every encoding of flora-checkpoint, and the numbers that the `gguf` package reads.

    venv/bin/pip install gguf
    venv/bin/python tests/golden/make_blocks.py

The bytes are random, so every bit of a block is used; its half-precision scales are then made small numbers.
"""

import json
from pathlib import Path

import numpy as np
from gguf import GGML_QUANT_SIZES, GGMLQuantizationType
from gguf.quants import dequantize

# Where the half-precision numbers of a block lie, in bytes.
SCALES = {
    "F16": [0], "BF16": [], "Q4_0": [0], "Q4_1": [0, 2], "Q5_0": [0], "Q5_1": [0, 2], "Q8_0": [0],
    "Q2_K": [80, 82], "Q3_K": [108], "Q4_K": [0, 2], "Q5_K": [0, 2], "Q6_K": [208], "IQ4_NL": [0], "IQ4_XS": [0],
    "MXFP4": [],
}


def make(name, offsets, random):
    kind = GGMLQuantizationType[name]
    _, size = GGML_QUANT_SIZES[kind]
    blocks = random.integers(0, 256, (2, size), dtype=np.uint8)
    if name == "BF16":
        blocks = (random.standard_normal(2).astype(np.float32).view(np.uint32) >> 16).astype(np.uint16).view(np.uint8)
    if name == "MXFP4":
        # Powers of two: the smallest, which is no normal number, and one near 1.
        blocks[:, 0] = 0, 124
    for block in blocks if offsets else []:
        for offset in offsets:
            block[offset : offset + 2] = np.array([random.standard_normal()], np.float16).view(np.uint8)
    flat = blocks.reshape(-1)
    values = flat.view(np.float16).astype(np.float32) if name == "F16" else dequantize(flat, kind)
    return {"blocks": flat.tobytes().hex(), "values": np.asarray(values, "<f4").tobytes().hex()}


if __name__ == "__main__":
    random = np.random.default_rng(1)
    golden = {name: make(name, offsets, random) for name, offsets in SCALES.items()}
    text = json.dumps(golden, indent=1)
    (Path(__file__).parent / "blocks.json").write_text(text + "\n")
