"""Kernels' machine code that a rehearsal keeps and a card's run finds, so that a card's minutes don't go to compiling.

A library in NVRTC's place answers for a kernel whose text was kept, and passes the others on to NVRTC. It writes a line
for each, so that a report says how many there were.
"""

from __future__ import annotations

from collections import Counter
from pathlib import Path

# The folder of machine code, and the library.
KEPT = "kernels"
LIBRARY = "lib/libnvrtc.so"


def how(device: str, keep: bool, compile_all: bool) -> str:
    """What is done with machine code on this device: "found" where it was kept, "kept", or "not used"."""
    kind = device.partition(":")[0]
    if kind == "cuda" and not compile_all:
        return "found"
    return "kept" if kind == "cuda-emulated" and keep else "not used"


def set_up(how_used: str, folder: Path, scratch: Path, real: str | None) -> tuple[dict, dict[str, str]]:
    """What the report says of it, and the environment of the steps."""
    kept = folder / KEPT
    report = {"use": how_used, "carried": number(folder)}
    if how_used == "kept":
        return report, {"FLORA_KERNELS": str(kept)}
    if how_used == "not used" or real is None or not report["carried"]:
        return report, {}
    # In the place of the link to NVRTC, which the library is told of.
    link = scratch / "lib64" / "libnvrtc.so"
    link.unlink(missing_ok=True)
    link.symlink_to(folder / LIBRARY)
    return report, {"FLORA_KERNELS": str(kept), "FLORA_NVRTC": real}


def number(folder: Path) -> int:
    """How many kernels the folder has."""
    return len(list((folder / KEPT).glob("*.cubin")))


def counts(log: Path) -> dict[str, int] | None:
    """How many kernels a step found kept, and how many were compiled; `None` where nothing says so."""
    try:
        lines = log.read_text(errors="replace").splitlines()
    except OSError:
        return None
    found = Counter(line.partition(" ")[0] for line in lines)
    return {word: found[word] for word in ("kept", "compiled")}


def words(found: dict[str, int]) -> str:
    return ", ".join(f"{number} {word}" for word, number in found.items())
