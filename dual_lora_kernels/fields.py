"""What the configurations of both doors share: names of fields that people know from LoRA, and ranks by layer."""

from __future__ import annotations

import dataclasses
import difflib
import functools
import re
from collections.abc import Callable, Mapping, Sequence
from typing import Any, TypeVar

from .validation import check_number, check_positive_int

_Class = TypeVar("_Class", bound=type)
_INSTEAD = {
    "r": "r1 (rank of the magnitude group) and r2 (rank of the direction group)",
    "rank": "r1 (rank of the magnitude group) and r2 (rank of the direction group)",
    "lora_r": "r1 (rank of the magnitude group) and r2 (rank of the direction group)",
    "lora_alpha": "alpha",
    "lora_dropout": "dropout",
    "init_lora_weights": "init_std: the factors start as Gaussian noise of this deviation",
    "use_rslora": "nothing: the scale is alpha / √(r1·r2) anyway",
    "use_dora": "nothing: DoRA is another method",
    "fan_in_fan_out": "nothing: Conv1D layers are recognised",
    "lora_bias": "bias",
    "warmup_steps": "DualLoraWarmup(model, steps), or DualLoraWarmupCallback(steps) in a Trainer",
    **dict.fromkeys(
        ("bias", "task_type", "layers_to_transform", "rank_pattern", "alpha_pattern", "inference_mode"),
        "nothing: dual_lora_kernels.peft.DualLoraConfig has it",
    ),
    "target_parameters": "target_modules: only linear layers can be adapted",
}
"""What stands in the place of LoraConfig's fields."""


def explains_unknown_fields(cls: _Class) -> _Class:
    """Make a dataclass's TypeError for a field that it has not say which one was meant."""
    init: Callable[..., None] = cls.__init__  # type: ignore[misc]
    names = [field.name for field in dataclasses.fields(cls) if field.init]

    @functools.wraps(init)
    def checked(self: object, *args: Any, **values: Any) -> None:
        for name in [name for name in values if name not in names]:
            close = difflib.get_close_matches(name, names, 1)
            instead = _INSTEAD.get(name) or (close[0] if close else f"one of {', '.join(names)}")
            # PEFT looks for the first half, which is Python's, to load configurations of newer versions.
            raise TypeError(
                f"{cls.__name__}.__init__() got an unexpected keyword argument {name!r}; expected {instead}"
            )
        init(self, *args, **values)

    cls.__init__ = checked  # type: ignore[misc]
    return cls


def ranks_for(name: str, r1: int, r2: int, pattern: Mapping[str, Any] | None) -> tuple[int, int]:
    """(r1, r2) of the layer called `name`: what `pattern` says about it, else `r1` and `r2`.

    The values of `pattern` are one rank for both groups, or a pair of them.
    """
    found = _matching(name, pattern)
    if found is None:
        return r1, r2
    return (found, found) if isinstance(found, int) else (found[0], found[1])


def alpha_for(name: str, alpha: float, pattern: Mapping[str, Any] | None) -> float:
    """alpha of the layer called `name`: what `pattern` says about it, else `alpha`."""
    found = _matching(name, pattern)
    return alpha if found is None else float(found)


def check_patterns(rank_pattern: Mapping[str, Any] | None, alpha_pattern: Mapping[str, Any] | None) -> None:
    """Raise ValueError or TypeError unless the patterns' keys are regular expressions and their values fit."""
    for field, pattern in (("rank_pattern", rank_pattern), ("alpha_pattern", alpha_pattern)):
        for key, value in (pattern or {}).items():
            try:
                re.compile(key)
            except re.error as error:
                raise ValueError(f"{field}: got {key!r}, expected a name or a regular expression: {error}") from None
            where = f"{field}[{key!r}]"
            if field == "alpha_pattern":
                if check_number(where, value) <= 0:
                    raise ValueError(f"{where}: got {value!r}, expected a positive number")
            elif isinstance(value, Sequence) and not isinstance(value, str):
                if len(value) != 2:
                    raise ValueError(f"{where}: got {value!r}, expected a rank or a pair (r1, r2)")
                for rank in value:
                    check_positive_int(where, rank)
            else:
                check_positive_int(where, value)


def _matching(name: str, pattern: Mapping[str, Any] | None) -> Any:
    """The value of the first key that is `name`, its end after a dot, or a regular expression for either (PEFT's)."""
    for key, value in (pattern or {}).items():
        if re.match(rf"(.*\.)?({key})$", name):
            return value
    return None
