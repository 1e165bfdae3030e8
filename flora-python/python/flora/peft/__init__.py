"""fLoRA in PEFT, and batches of mixed adapters of every kind.

Importing this module registers the method ``FLORA`` with PEFT, so that everything of PEFT's works with it: ``get_peft_model``, training
by ``transformers.Trainer``, saving, loading, merging, several adapters, ``adapter_names`` for a batch of mixed ones::

    import flora.peft
    from peft import get_peft_model

    model = get_peft_model(model, flora.peft.FloraConfig(r=4, target_modules=["q_proj", "v_proj"], task_type="CAUSAL_LM"))

What is saved is what ``flora serve`` reads. On the processor, layers run on flora's kernels; elsewhere, and where
:func:`use_kernels` says so, they are written in PyTorch's own operations.

:class:`MixedBatches` runs a model with adapters of any kinds and ranks in one batch, PEFT's own kinds included.
"""

from ._register import register
from .config import FloraConfig
from .layer import FloraLayer, FloraLinear, use_kernels
from .mixed import MixedBatches
from .model import FloraModel

__all__ = ["FloraConfig", "FloraLayer", "FloraLinear", "FloraModel", "MixedBatches", "use_kernels"]

register(FloraConfig, FloraModel)
