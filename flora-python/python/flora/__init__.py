"""Adapted layers on your tensors' own memory.

A layer holds one frozen base weight and adapters of any kind in numbered slots. One call computes a batch whose rows belong to
different adapters, of different kinds and ranks, with nothing padded::

    import numpy as np
    import flora

    layer = flora.AdaptedLinear(weight)                 # [out, in], as PyTorch has it
    layer.put(0, "lora", {"b": b, "a": a, "s": 2.0})    # b [in, r], a [r, out]
    layer.put(1, "ia3", {"l": scales})                  # [out]
    y = layer.forward(x, rows=np.array([0, 0, 1, -1]))  # -1 is the base

Nothing but Python is needed here. ``flora.torch`` brings the PyTorch operators, ``flora.peft`` the training with PEFT.
"""

from ._adapters import Adapter, adapter_layers, adapter_operands
from ._linear import AdaptedLinear
from ._native import ClosedError, __version__
from ._threads import get_num_threads, set_num_threads

__all__ = [
    "AdaptedLinear",
    "Adapter",
    "ClosedError",
    "__version__",
    "adapter_layers",
    "adapter_operands",
    "get_num_threads",
    "set_num_threads",
]
