"""Makes starcoder.json: StarCoder's vocabulary, and the texts and tokens that llama.cpp tests its own tokenizer with.

    venv/bin/pip install gguf
    venv/bin/pip download --no-deps --no-binary :all: llama-cpp-python==0.3.36
    tar xzf llama_cpp_python-0.3.36.tar.gz --wildcards '*/models/ggml-vocab-starcoder.gguf*'
    venv/bin/python tests/golden/make_starcoder.py .../models/ggml-vocab-starcoder.gguf

Every token after the control tokens and the bytes is that of the merge in the same place, so only the merges are kept.
"""

import json
import sys
from pathlib import Path

from gguf import GGUFReader


def main():
    path = Path(sys.argv[1])
    fields = GGUFReader(path).fields
    tokens, merges, types = (fields[f"tokenizer.ggml.{name}"].contents() for name in ("tokens", "merges", "token_type"))
    first = len(tokens) - len(merges)
    assert tokens[first:] == [merge.replace(" ", "") for merge in merges]
    controls = types.count(3)
    assert types == [3] * controls + [1] * (len(tokens) - controls)
    texts = Path(f"{path}.inp").read_bytes().decode()
    lines = Path(f"{path}.out").read_text().split("\n")
    cases = [
        {"text": text, "tokens": [int(token) for token in line.split()]}
        for text, line in zip(texts.split("\n__ggml_vocab_test__\n"), lines, strict=True)
    ]
    target = Path(__file__).parent / "starcoder.json"
    golden = {"controls": tokens[:controls], "bytes": tokens[controls:first], "cases": cases, "merges": merges}
    target.write_text(json.dumps(golden, ensure_ascii=False, indent=0) + "\n")


if __name__ == "__main__":
    main()
