"""Adds a method to PEFT, whose list of methods (the `PeftType` enum) is closed and has no plug-in entry point."""

from peft.mapping import PEFT_TYPE_TO_TUNER_MAPPING
from peft.utils.peft_types import PeftType, register_peft_method


def register(name: str, config_cls: type, model_cls: type) -> None:
    """Makes `name` (upper case) a PEFT method with the prefix `<name>_`. Doing it again changes nothing."""
    if name not in PeftType.__members__:
        _extend_enum(name)
    if PeftType[name] not in PEFT_TYPE_TO_TUNER_MAPPING:
        register_peft_method(name=name.lower(), config_cls=config_cls, model_cls=model_cls)


def _extend_enum(name: str) -> None:
    # A full enum member, so that `PeftType.TINT`, `PeftType["TINT"]`, `PeftType("TINT")`, iteration and pickling all
    # work. Enum forbids this through its metaclass, hence `type.__setattr__`; seen to hold on Python 3.10 to 3.13.
    member = str.__new__(PeftType, name)
    member._name_ = member._value_ = name
    member.__objclass__ = PeftType
    member._sort_order_ = len(PeftType._member_names_)
    type.__setattr__(PeftType, name, member)
    PeftType._member_names_.append(name)
    PeftType._member_map_[name] = member
    PeftType._value2member_map_[name] = member
    if isinstance(getattr(PeftType, "_hashable_values_", None), list):  # Python >= 3.12
        PeftType._hashable_values_.append(name)
