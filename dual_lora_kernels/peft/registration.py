"""The tuner's name in PEFT: a member of ``PeftType`` that PEFT itself does not have."""

from __future__ import annotations

from peft.utils import PeftType

from ..peft_files import PEFT_NAME


def _extended(name: str) -> PeftType:
    """The member `name` of PeftType, which is added where it is missing: an Enum is closed, PEFT has no other way."""
    if name not in PeftType.__members__:
        member = str.__new__(PeftType, name)
        member._name_ = name
        member._value_ = name
        setattr(PeftType, name, member)  # Python 3.12 finds members so, 3.11 by the map
        PeftType._member_names_.append(name)
        PeftType._member_map_[name] = member
        PeftType._value2member_map_[name] = member
    return PeftType(name)


PEFT_TYPE = _extended(PEFT_NAME)
