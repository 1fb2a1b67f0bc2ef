"""`DualLoraConfig`: which layers to adapt, and how."""

from __future__ import annotations

import re
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch

from .fields import explains_unknown_fields
from .validation import check_dtype, check_hyperparameters

ALL_LINEAR = "all-linear"
"""The value of `DualLoraConfig.target_modules` that stands for every adaptable linear layer but the output head."""


@explains_unknown_fields
@dataclass(frozen=True)
class DualLoraConfig:
    """How `apply_dual_lora` adapts a model.

    Args:
        target_modules: ``"all-linear"``: every adaptable linear layer except the output head and layers whose weight is
            tied to another module's. A list of names: each a layer's full name or the end of it after a dot
            (``["q_proj", "v_proj"]``). Any other string: a regular expression that must match the full name.
        exclude_modules: names, as in a list of targets, that are left alone whatever `target_modules` says.
        modules_to_save: names, as in a list of targets, of modules that are trained whole, in place, and saved with the
            adapter. None: the head of a transformers model that is a backbone with a new head on it (for classification
            and the like, not a language model's); the log names it. ``()``: none.
        r1, r2, alpha, dropout, init_std, ste, rounding, clip_bound, gradient_columns, adapter_dtype: see
            `DualLoraLinear`.

    Raises:
        ValueError, TypeError: a field is out of range; the message names it.
    """

    target_modules: str | Sequence[str] = ALL_LINEAR
    exclude_modules: Sequence[str] = ()
    modules_to_save: Sequence[str] | None = None
    r1: int = 16
    r2: int = 16
    alpha: float = 32.0
    dropout: float = 0.0
    init_std: float = 0.02
    ste: str = "clip"
    rounding: str = "dither"
    clip_bound: float = 1.0
    gradient_columns: float = 1.0
    adapter_dtype: torch.dtype | None = None

    def __post_init__(self) -> None:
        options = self.layer_options()
        adapter_dtype = options.pop("adapter_dtype")
        check_hyperparameters(**options)
        for name in ("r1", "r2"):
            object.__setattr__(self, name, int(options[name]))
        for name in ("alpha", "dropout", "init_std", "clip_bound", "gradient_columns"):
            object.__setattr__(self, name, float(options[name]))
        if adapter_dtype is not None:
            check_dtype("adapter_dtype", adapter_dtype)
        targets = self.target_modules
        if isinstance(targets, str):
            try:
                re.compile(targets)
            except re.error as error:
                raise ValueError(f"target_modules: got {targets!r}, expected a regular expression: {error}") from None
        else:
            object.__setattr__(self, "target_modules", _names("target_modules", targets))
            if not self.target_modules:
                raise ValueError(f"target_modules: got {targets!r}, expected names of layers or their last parts")
        for name in ("exclude_modules", "modules_to_save"):
            if getattr(self, name) is not None:
                object.__setattr__(self, name, _names(name, getattr(self, name)))

    @property
    def base_model_name_or_path(self) -> None:
        """What ``get_peft_model`` reads first. Raises TypeError, since it takes PEFT's configurations alone."""
        raise TypeError(
            "peft_config: got dual_lora_kernels.DualLoraConfig, which is for apply_dual_lora; expected "
            "dual_lora_kernels.peft.DualLoraConfig"
        )

    def layer_options(self) -> dict[str, Any]:
        """The keyword arguments of `DualLoraLinear.from_linear`."""
        names = (
            "r1", "r2", "alpha", "dropout", "init_std", "ste", "rounding", "clip_bound", "gradient_columns",
            "adapter_dtype",
        )  # fmt: skip
        return {name: getattr(self, name) for name in names}


def _names(field: str, names: Sequence[str]) -> tuple[str, ...]:
    """Names of layers as a tuple, so that the configuration can be hashed."""
    if (
        isinstance(names, str)
        or not isinstance(names, Sequence)
        or not all(isinstance(name, str) and name for name in names)
    ):
        raise ValueError(f"{field}: got {names!r}, expected a list of names of layers or their last parts")
    return tuple(names)
