"""How large everything is: on a card, and in a rehearsal without one."""

from __future__ import annotations

from dataclasses import dataclass


@dataclass(frozen=True)
class Sizes:
    """The sizes of the steps; a reason leaves a step out."""

    # Separated by commas.
    ranks: str
    # [d, k] by name.
    shapes: dict[str, str]
    # Segments x tokens of each, every segment with an adapter of its own.
    tokens: dict[str, tuple[str, ...]]
    # Options of every `flora bench layers`, and the most seconds that one may take.
    layer_options: tuple[str, ...]
    layer_seconds: float
    # Those of the layers that are measured, by name; all of them without one.
    layers: tuple[str, ...]
    # Models with random weights, and requests. Sixteen variants run them, one after the other.
    serving: tuple[tuple[str, int], ...]
    without_tuning: str | None = None
    without_conformance: str | None = None
    without_serving: str | None = None


# StarCoder's query and key projections, of 15B, 3B and 1B parameters.
CARD = Sizes(
    ranks="1,2,4,8,16",
    shapes={
        "15b-query": "6144,6144",
        "15b-key": "6144,128",
        "3b-query": "2816,2816",
        "3b-key": "2816,128",
        "1b-query": "2048,2048",
        "1b-key": "2048,128",
    },
    tokens={"decode": ("32x1", "128x1"), "prefill": ("4x512", "16x128")},
    layer_options=(),
    layer_seconds=90,
    layers=(),
    serving=(("starcoder-1b", 200), ("starcoder-3b", 100), ("starcoder-15b", 50)),
)

# What a report of a rehearsal is marked with.
REHEARSED = "A rehearsal: the processor played the card. No time in it says anything of a card."

# Few numbers, and as many rows as on a card: a kernel is made for a class of rows and not for a layer's extents, as long as these
# are multiples of what a load takes at once.
REHEARSAL = Sizes(
    ranks="1,16",
    shapes={name: "64,128" for name in CARD.shapes},
    tokens={"decode": ("32x1",), "prefill": ("4x512",)},
    layer_options=("--rounds", "1", "--calls", "1", "--bandwidth-bytes", "1048576"),
    layer_seconds=300,
    layers=("15b-query-f16-decode", "15b-query-f16-prefill", "15b-query-bf16-decode", "15b-query-f16-q4_0-decode"),
    serving=CARD.serving,
    without_tuning="an emulated card takes hours over the sizes that tuning measures",
    without_conformance="an emulated card takes a quarter of an hour; `FLORA_TEST_DEVICE` and bin/conformance run it",
    without_serving="an emulated card takes hours over a model",
)
