"""What PEFT is told of an fLoRA adapter."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Literal, Optional, Union

from peft.config import PeftConfig

from ._register import NAME


@dataclass
class FloraConfig(PeftConfig):
    """The configuration of an fLoRA adapter: ``y = x @ (W0 * (B @ A))``, elementwise, with ``B [in, r]`` and ``A [r, out]``.

    Args:
        r: the rank.
        reduce: ``"sum"`` over the rank, or ``"mean"`` as in the listing of the paper's section 3.1.
        init: ``"identity"``: the adapted layer starts as the base layer, and its components differ; ``"ones"``: all factors are 1, as in
            the paper's listing, which takes ``reduce="mean"``.
        target_modules: names of modules, or a regular expression, or ``"all-linear"``, as in PEFT's other methods.
        exclude_modules: the same for modules that are left out.
        rank_pattern: other ranks for some modules, by their names or regular expressions.
        layers_to_transform: indices of the layers that are adapted; None is all.
        layers_pattern: what the list of layers is called, with ``layers_to_transform``.
        fan_in_fan_out: whether weights are ``[in, out]``, as GPT-2's are.
        modules_to_save: modules that are trained and saved as a whole.
    """

    r: int = field(default=4, metadata={"help": "The rank"})
    reduce: Literal["sum", "mean"] = field(default="sum", metadata={"help": "What is done over the rank"})
    init: Literal["identity", "ones"] = field(default="identity", metadata={"help": "What training starts from"})
    target_modules: Optional[Union[list[str], str]] = field(default=None, metadata={"help": "Which modules are adapted"})
    exclude_modules: Optional[Union[list[str], str]] = field(default=None, metadata={"help": "Which modules are not"})
    rank_pattern: Optional[dict] = field(default_factory=dict, metadata={"help": "Other ranks for some modules"})
    layers_to_transform: Optional[Union[list[int], int]] = field(default=None, metadata={"help": "Which layers"})
    layers_pattern: Optional[Union[list[str], str]] = field(default=None, metadata={"help": "Where layers are listed"})
    fan_in_fan_out: bool = field(default=False, metadata={"help": "Whether weights are [in, out]"})
    modules_to_save: Optional[list[str]] = field(default=None, metadata={"help": "Modules that are trained as a whole"})

    def __post_init__(self) -> None:
        super().__post_init__()
        self.peft_type = NAME
        if not isinstance(self.r, int) or self.r < 1:
            raise ValueError(f"r is {self.r!r}; a rank is a whole number from 1 on")
        if self.reduce not in ("sum", "mean"):
            raise ValueError(f"reduce is {self.reduce!r}; it is \"sum\" or \"mean\"")
        if self.init not in ("identity", "ones"):
            raise ValueError(f"init is {self.init!r}; it is \"identity\" or \"ones\"")
        if self.init == "ones" and self.reduce == "sum":
            raise ValueError('init="ones" starts from the base layer with reduce="mean" alone; a sum of ones is r times as much')
        if isinstance(self.target_modules, list):
            self.target_modules = set(self.target_modules)
        if isinstance(self.exclude_modules, list):
            self.exclude_modules = set(self.exclude_modules)
        if isinstance(self.target_modules, str) and self.target_modules != "all-linear":
            for option in ("layers_to_transform", "layers_pattern"):
                if getattr(self, option) is not None:
                    raise ValueError(f"`{option}` can't be used when `target_modules` is a regular expression")
        if self.layers_pattern and not self.layers_to_transform and self.layers_to_transform != 0:
            raise ValueError("`layers_pattern` says where the layers of `layers_to_transform` are, which is not given")
