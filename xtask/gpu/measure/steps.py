"""What is run, most important first: the budget may end before the list does."""

from __future__ import annotations

import shlex
import sys
from dataclasses import dataclass
from fnmatch import fnmatchcase
from pathlib import Path

RANKS = "1,2,4,8,16"
# StarCoder's query and key projections, [d, k]; of 15B, 3B and 1B parameters.
SHAPES = {
    "15b-query": "6144,6144",
    "15b-key": "6144,128",
    "3b-query": "2816,2816",
    "3b-key": "2816,128",
    "1b-query": "2048,2048",
    "1b-key": "2048,128",
}
# Segments x tokens of each, every segment with an adapter of its own.
TOKENS = {"decode": ("32x1", "128x1"), "prefill": ("4x512", "16x128")}
# (shape, dtype of the activations, format of the base weight or None for the dtype, which tokens, options of the peer
# or None for no peer). PyTorch has no such quantised weights; what it makes of f16 is in the f16 rows.
LAYERS = (
    ("15b-query", "f16", None, "decode", ""),
    ("15b-query", "f16", None, "prefill", ""),
    ("15b-query", "bf16", None, "decode", ""),
    ("15b-query", "bf16", None, "prefill", ""),
    # The same once more with PyTorch's launches replayed as a CUDA graph: without its gaps between kernels.
    ("15b-query", "f16", None, "decode", "--graphs"),
    ("15b-query", "f16", "q4_0", "decode", None),
    ("15b-query", "f16", "q8_0", "decode", None),
    ("15b-query", "f16", "int8", "decode", None),
    ("15b-key", "f16", None, "decode", ""),
    ("15b-key", "f16", None, "prefill", ""),
    ("3b-query", "f16", None, "decode", ""),
    ("3b-query", "f16", None, "prefill", ""),
    ("1b-query", "f16", None, "decode", ""),
    ("1b-query", "f16", None, "prefill", ""),
    ("15b-query", "f16", "q4_0", "prefill", None),
    ("15b-query", "f16", "q8_0", "prefill", None),
    ("15b-query", "f16", "int8", "prefill", None),
    ("15b-key", "bf16", None, "decode", ""),
    ("15b-key", "bf16", None, "prefill", ""),
    ("3b-query", "bf16", None, "decode", ""),
    ("3b-query", "bf16", None, "prefill", ""),
    ("1b-query", "bf16", None, "decode", ""),
    ("1b-query", "bf16", None, "prefill", ""),
    ("3b-key", "f16", None, "decode", ""),
    ("3b-key", "f16", None, "prefill", ""),
    ("1b-key", "f16", None, "decode", ""),
    ("1b-key", "f16", None, "prefill", ""),
)

# (model with random weights, requests). Sixteen variants run them, one after the other.
SERVING = (("starcoder-1b", 200), ("starcoder-3b", 100), ("starcoder-15b", 50))


@dataclass(frozen=True)
class Step:
    """One program to run, and how its output is read."""

    name: str
    command: tuple[str, ...]
    # What it prints: "text", "json", "devices" and "layers" (both JSON, with something required in it), "tests".
    prints: str
    # The most seconds it may take, whatever is left of the budget.
    limit: float
    # What it can't do without: the "device" under test, the "peer".
    needs: tuple[str, ...] = ("device",)

    def matches(self, pattern: str) -> bool:
        return fnmatchcase(self.name, pattern)


def steps(folder: Path, device: str, budget: float) -> list[Step]:
    """The steps, for the programs of `folder`, on `device`, within `budget` seconds."""
    flora, conformance = str(folder / "bin" / "flora"), str(folder / "bin" / "conformance")
    # The script is named relatively: the command for the peer is one string, which a blank of the folder would part.
    peer = [sys.executable, "peers/torch_lora.py", "--device", peer_device(device)]
    first = [
        Step("devices", (flora, "devices", "--json"), "devices", 60, needs=()),
        # Every lowering in every dtype and weight format, by tensor cores and without. The output that is shown lists
        # what can't run here.
        Step("conformance-formats", (conformance, "formats::", "--show-output"), "tests", 0.35 * budget),
        Step("conformance-rest", (conformance, "--skip", "formats::", "--show-output"), "tests", 0.25 * budget),
        Step("tune", (flora, "tune", "--device", device, "--quick", "--dtype", "f16,bf16", "--json"), "json", 90),
        Step("peer-check", (*peer, "--check"), "text", 90, needs=("device", "peer")),
    ]
    layers = [layer(flora, device, peer, *row) for row in LAYERS]
    # The whole model's rows come after the layers that its design goals are about.
    goals = sum(shape == "15b-query" and weight is None for shape, _, weight, _, _ in LAYERS)
    return first + layers[:goals] + [serving(flora, device, *row) for row in SERVING] + layers[goals:]


def serving(flora: str, device: str, model: str, requests: int) -> Step:
    """One call of `flora bench serving`, the paper's experiments (section 4.1)."""
    command = [flora, "bench", "serving", "--device", device, "--json", "--model", model, "--dtype", "f16"]
    command += ["--ranks", RANKS, "--requests", str(requests), "--latency-requests", str(requests // 4), "--rate", "4"]
    return Step(f"serving-{model}", tuple(command), "json", 600)


def layer(
    flora: str,
    device: str,
    peer: list[str],
    shape: str,
    dtype: str,
    weight: str | None,
    regime: str,
    options: str | None,
) -> Step:
    """One call of `flora bench layers`."""
    command = [flora, "bench", "layers", "--device", device, "--json", "--shape", SHAPES[shape]]
    for tokens in TOKENS[regime]:
        command += ["--tokens", tokens]
    command += ["--ranks", RANKS, "--dtype", dtype]
    if weight is not None:
        command += ["--weight", weight]
    if options is not None:
        command += ["--peer", shlex.join([*peer, *options.split()])]
    name = "-".join(part for part in ("layers", shape, dtype, weight, regime, (options or "").lstrip("-")) if part)
    return Step(name, tuple(command), "layers", 90)


def peer_device(device: str) -> str:
    """PyTorch's name for the kind of device that `device` is."""
    return "cuda" if device.startswith("cuda") else "cpu"


def chosen(all_steps: list[Step], only: list[str]) -> list[Step]:
    """The steps whose names match one of the patterns, and always the first, on which the others depend."""
    return [
        step for position, step in enumerate(all_steps) if position == 0 or not only or any(map(step.matches, only))
    ]


def without_peer(command: tuple[str, ...]) -> tuple[str, ...]:
    """The command less its `--peer`."""
    if "--peer" not in command:
        return command
    at = command.index("--peer")
    return command[:at] + command[at + 2 :]
