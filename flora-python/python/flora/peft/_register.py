"""Makes PEFT know the method ``FLORA``.

PEFT has ``register_peft_method`` for methods of others, but takes only names that its own list of methods has. A name that isn't there
is added to the list first.
"""

from __future__ import annotations

from peft.utils import PeftType, register_peft_method

NAME = "FLORA"


def register(config_cls: type, model_cls: type) -> None:
    """Registers the method, once."""
    from peft.mapping import PEFT_TYPE_TO_CONFIG_MAPPING

    member = _member()
    if member not in PEFT_TYPE_TO_CONFIG_MAPPING:
        register_peft_method(name=NAME.lower(), config_cls=config_cls, model_cls=model_cls)


def _member() -> PeftType:
    """The member of PEFT's list of methods."""
    known = PeftType.__members__.get(NAME)
    if known is not None:
        return known
    member = str.__new__(PeftType, NAME)
    member._name_ = NAME
    member._value_ = NAME
    # As the enumeration's own metaclass does for those that are written in it; it lets nobody set one afterwards.
    type.__setattr__(PeftType, NAME, member)
    PeftType._member_map_[NAME] = member
    PeftType._member_names_.append(NAME)
    PeftType._value2member_map_[NAME] = member
    return member
