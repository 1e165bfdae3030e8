"""What is run, most important first: the budget may end before the list does."""

from __future__ import annotations

import shlex
import sys
from dataclasses import dataclass, replace
from fnmatch import fnmatchcase
from pathlib import Path

from sizes import Sizes

# Tests that say something within seconds: lowerings, splits, merging and empty batches in every type, and PEFT's outputs.
FIRST = ("formats::a_", "oracle::a_", "oracle::wrong", "golden::")
# (shape, dtype of the activations, format of the base weight or None for the dtype, which tokens, options of the peer
# or None for no peer). PyTorch has no such quantised weights; what it makes of f16 is in the f16 rows.
GOALS = (
    ("15b-query", "f16", None, "decode", ""),
    ("15b-query", "f16", None, "prefill", ""),
    ("15b-query", "bf16", None, "decode", ""),
    ("15b-query", "bf16", None, "prefill", ""),
    # The same once more with PyTorch's launches replayed as a CUDA graph: without its gaps between kernels.
    ("15b-query", "f16", None, "decode", "--graphs"),
    ("15b-key", "f16", None, "decode", ""),
    ("15b-key", "f16", None, "prefill", ""),
)
LAYERS = (
    ("15b-query", "f16", "q4_0", "decode", None),
    ("15b-query", "f16", "q8_0", "decode", None),
    ("15b-query", "f16", "int8", "decode", None),
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
    # Why it is left out at these sizes.
    left_out: str | None = None

    def matches(self, pattern: str) -> bool:
        return fnmatchcase(self.name, pattern)


def steps(folder: Path, device: str, budget: float, sizes: Sizes) -> list[Step]:
    """The steps, for the programs of `folder`, on `device`, within `budget` seconds."""
    flora, conformance, launches = (str(folder / "bin" / name) for name in ("flora", "conformance", "launches"))
    # The script is named relatively: the command for the peer is one string, which a blank of the folder would part.
    peer = [sys.executable, "peers/torch_lora.py", "--device", peer_device(device)]
    tune = (flora, "tune", "--device", device, "--quick", "--dtype", "f16,bf16", "--json")
    first = [
        Step("devices", (flora, "devices", "--json"), "devices", 60, needs=()),
        # The output that is shown lists what can't run here.
        Step("conformance-first", (conformance, *FIRST, "--show-output"), "tests", 0.25 * budget),
        # Launches by the driver alone: bits of flora's own launches, graphs, and what is wrong.
        Step("launches", (launches, "--show-output"), "tests", 0.15 * budget),
        Step("tune", tune, "json", 90, left_out=sizes.without_tuning),
        Step("peer-check", (*peer, "--check"), "text", 90, needs=("device", "peer")),
    ]
    goals = [layer(flora, device, peer, sizes, *row) for row in GOALS]
    # Every lowering in every dtype and weight format, by tensor cores and without, and whatever tests the others left.
    skipped = [word for test in FIRST for word in ("--skip", test)]
    formats = (conformance, "formats::", *skipped, "--show-output")
    rest = (conformance, "--skip", "formats::", *skipped, "--show-output")
    conformance_steps = [
        Step("conformance-formats", formats, "tests", 0.5 * budget, left_out=sizes.without_conformance),
        Step("conformance-rest", rest, "tests", 0.5 * budget, left_out=sizes.without_conformance),
    ]
    return (
        first
        + goals
        + conformance_steps
        + [serving(flora, device, sizes, *row) for row in sizes.serving]
        + [layer(flora, device, peer, sizes, *row) for row in LAYERS]
    )


def serving(flora: str, device: str, sizes: Sizes, model: str, requests: int) -> Step:
    """One call of `flora bench serving`, the paper's experiments (section 4.1)."""
    command = [flora, "bench", "serving", "--device", device, "--json", "--model", model, "--dtype", "f16"]
    command += ["--ranks", sizes.ranks, "--requests", str(requests), "--latency-requests", str(requests // 4)]
    command += ["--rate", "4"]
    return Step(f"serving-{model}", tuple(command), "json", 600, left_out=sizes.without_serving)


def layer(
    flora: str,
    device: str,
    peer: list[str],
    sizes: Sizes,
    shape: str,
    dtype: str,
    weight: str | None,
    regime: str,
    options: str | None,
) -> Step:
    """One call of `flora bench layers`."""
    command = [flora, "bench", "layers", "--device", device, "--json", "--shape", sizes.shapes[shape]]
    for tokens in sizes.tokens[regime]:
        command += ["--tokens", tokens]
    command += ["--ranks", sizes.ranks, "--dtype", dtype, *sizes.layer_options]
    if weight is not None:
        command += ["--weight", weight]
    if options is not None:
        command += ["--peer", shlex.join([*peer, *options.split()])]
    name = "-".join(part for part in (shape, dtype, weight, regime, (options or "").lstrip("-")) if part)
    left_out = "one of each kind is enough to try the script" if sizes.layers and name not in sizes.layers else None
    return Step(f"layers-{name}", tuple(command), "layers", sizes.layer_seconds, left_out=left_out)


def peer_device(device: str) -> str:
    """PyTorch's name for the kind of device that `device` is."""
    kind = device.partition(":")[0]
    return "cuda" if kind == "cuda" else "cpu"


def chosen(all_steps: list[Step], only: list[str]) -> list[Step]:
    """The steps whose names match one of the patterns, and always the first, on which the others depend.

    What is asked for by name runs, whatever it would be left out for.
    """
    if not only:
        return all_steps
    wanted = [replace(step, left_out=None) for step in all_steps[1:] if any(map(step.matches, only))]
    return [all_steps[0], *wanted]


def without_peer(command: tuple[str, ...]) -> tuple[str, ...]:
    """The command less its `--peer`."""
    if "--peer" not in command:
        return command
    at = command.index("--peer")
    return command[:at] + command[at + 2 :]
