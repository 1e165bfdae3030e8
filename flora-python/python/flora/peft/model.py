"""A model with fLoRA adapters, as PEFT makes it."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from functools import partial
from typing import Any, Optional

from peft.tuners.tuners_utils import BaseTuner
from peft.utils import TRANSFORMERS_MODELS_TO_LORA_TARGET_MODULES_MAPPING
from peft.utils.other import AuxiliaryTrainingWrapper, get_pattern_key
from torch import nn

from .config import FloraConfig
from .layer import FloraLayer, FloraLinear


class FloraModel(BaseTuner):
    """A model with fLoRA adapters in place of the linear layers that its config targets."""

    prefix = "flora_"
    tuner_layer_cls = FloraLayer
    target_module_mapping = TRANSFORMERS_MODELS_TO_LORA_TARGET_MODULES_MAPPING

    def _create_and_replace(
        self,
        config: FloraConfig,
        adapter_name: str,
        target: nn.Module,
        target_name: str,
        parent: nn.Module,
        current_key: str,
        parameter_name: Optional[str] = None,
    ) -> None:
        r = config.rank_pattern.get(get_pattern_key(config.rank_pattern.keys(), current_key), config.r)
        if isinstance(target, FloraLayer):
            target.update_layer(adapter_name, r, config)
            return
        base = target.get_base_layer() if hasattr(target, "get_base_layer") else target
        is_conv1d = type(base).__name__ == "Conv1D" and hasattr(base, "nf")
        if not (is_conv1d or isinstance(base, nn.Linear)):
            raise ValueError(f"`{current_key}` is a {type(base).__name__}; fLoRA adapts torch.nn.Linear and transformers' Conv1D")
        if is_conv1d != config.fan_in_fan_out:
            raise ValueError(f"`{current_key}` is a {type(base).__name__}; set fan_in_fan_out={is_conv1d} for it")
        module = FloraLinear(target, adapter_name, r, config)
        if adapter_name not in self.active_adapters:
            # One that is added to others isn't trained until it is activated.
            module.requires_grad_(False)
        self._replace_module(parent, target_name, module, target)

    @contextmanager
    def _enable_peft_forward_hooks(self, *args: Any, **kwargs: Any) -> Iterator[None]:
        """Hands ``adapter_names`` to the layers: the adapter of each sequence, ``"__base__"`` for none."""
        adapter_names = kwargs.pop("adapter_names", None)
        if adapter_names is None:
            yield
            return
        known = set(self.peft_config) | {"__base__"}
        unknown = sorted(set(adapter_names) - known)
        if unknown:
            raise ValueError(f"no adapter is called {', '.join(unknown)}; there are {', '.join(sorted(self.peft_config))}")
        # Beams of a sequence follow one another.
        beams = kwargs.get("num_beams")
        if isinstance(beams, int) and beams > 1:
            adapter_names = [name for name in adapter_names for _ in range(beams)]
        layers = [module for module in self.modules() if isinstance(module, (FloraLayer, AuxiliaryTrainingWrapper))]
        hand_over = partial(_hand_over, adapter_names=adapter_names)
        hooks = [layer.register_forward_pre_hook(hand_over, with_kwargs=True) for layer in layers]
        try:
            yield
        finally:
            for hook in hooks:
                hook.remove()


def _hand_over(module: nn.Module, args: Any, kwargs: Any, adapter_names: list[str]) -> tuple[Any, Any]:
    return args, {**kwargs, "adapter_names": adapter_names}
