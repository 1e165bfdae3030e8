"""How many threads layers compute with.

They are a pool of this library's own. Beside PyTorch's it would be one too many where both compute at once; a call waits for its pool
and PyTorch's threads wait meanwhile, so a pool as large as PyTorch's is right. It is made so when PyTorch was imported first.
"""

from __future__ import annotations

import os
import sys

from . import _native

_chosen = False


def set_num_threads(count: int) -> None:
    """Compute with ``count`` threads from now on. Calls that are running end with those that they have."""
    global _chosen
    _native.set_num_threads(count)
    _chosen = True


def get_num_threads() -> int:
    """How many threads layers compute with."""
    choose()
    return _native.get_num_threads()


def choose() -> None:
    """As many threads as PyTorch has, where it is there and nobody chose."""
    global _chosen
    if _chosen:
        return
    _chosen = True
    torch = sys.modules.get("torch")
    if "FLORA_NUM_THREADS" not in os.environ and hasattr(torch, "get_num_threads"):
        _native.set_num_threads(torch.get_num_threads())
