"""`DualLoraConfig` for PEFT."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any, Literal

from peft.config import PeftConfig

from ..fields import alpha_for, check_patterns, explains_unknown_fields, ranks_for
from ..validation import check_choice, check_hyperparameters
from .registration import PEFT_TYPE

_BIASES = ("none", "all", "dual_lora_only")
_SHARED = ("dropout", "ste", "rounding", "clip_bound", "gradient_columns")
"""Fields that an adapter has under the same name."""


@explains_unknown_fields
@dataclass
class DualLoraConfig(PeftConfig):  # type: ignore[misc]  # mypy skips PEFT
    """What ``LoraConfig`` is for LoRA: pass it to ``get_peft_model``, ``add_adapter``, SFTTrainer and so on.

    Args:
        r1, r2: ranks of the magnitude group (A, B) and of the direction group (C, D).
        alpha: numerator of the scale alpha / √(r1·r2).
        dropout: probability of dropping elements of the adapter's input in training. It takes two products a layer.
        init_std: standard deviation of the factors at the start. There is no start at which ΔW is zero: both groups
            would never get a gradient. Warm the scale up instead.
        warmup_steps: optimiser steps in which the scale rises from near 0 to alpha / √(r1·r2), after each step of an
            optimiser that holds the factors; 20 to 50 are usual, and without any training can collapse. 0: none, the
            scale is full from the start. Where the optimiser holds other tensors than the factors (FSDP1's flat
            parameters), use ``DualLoraWarmupCallback``; DeepSpeed's are seen.
        init_weights: True, or False for standard normal factors: an update that is seen at once, for tests.
        ste, rounding, clip_bound: see `dual_lora_kernels.dual_lora_linear`.
        gradient_columns: see `dual_lora_kernels.DualLoraLinear`.
        target_modules: names (a layer's or their ends), a regular expression for the whole name, or ``"all-linear"``.
            None: the layers that LoRA adapts by default in this architecture. Linear layers and Conv1D can be adapted.
        exclude_modules: names or a regular expression of layers that are left alone.
        layers_to_transform, layers_pattern: see ``LoraConfig``.
        rank_pattern: ranks of layers that differ from r1 and r2: by name or regular expression, a rank for both groups
            or a pair, as ``{"q_proj": 8, "layers.0.mlp.up_proj": (16, 4)}``.
        alpha_pattern: alphas of layers that differ from alpha.
        modules_to_save: modules to train whole and to save with the adapter (a new classification head, say).
        bias: ``"none"``, ``"all"`` or ``"dual_lora_only"``: which biases train.

    Further fields are PeftConfig's: task_type, inference_mode, base_model_name_or_path, revision.

    Raises:
        ValueError, TypeError: a field is out of range or unknown; the message names it.
    """

    r1: int = field(default=16, metadata={"help": "Rank of the magnitude group A, B."})
    r2: int = field(default=16, metadata={"help": "Rank of the direction group C, D."})
    alpha: float = field(default=32.0, metadata={"help": "Numerator of the scale alpha / sqrt(r1 r2)."})
    dropout: float = field(default=0.0, metadata={"help": "Dropout on the adapter's input."})
    init_std: float = field(default=0.02, metadata={"help": "Standard deviation of the factors at the start."})
    warmup_steps: int = field(default=0, metadata={"help": "Optimiser steps in which the scale rises to the full one."})
    init_weights: bool = field(default=True, metadata={"help": "False: standard normal factors, for tests."})
    ste: str = field(default="clip", metadata={"help": "Gradient of the sign: 'clip', 'dorefa' or 'xnor'."})
    rounding: str = field(default="dither", metadata={"help": "Of W0 + dW to 16 bits: 'dither' or 'nearest'."})
    clip_bound: float = field(default=1.0, metadata={"help": "Bound of ste='clip'."})
    gradient_columns: float = field(
        default=1.0, metadata={"help": "Part of the columns from which the factors' gradients are estimated."}
    )
    target_modules: list[str] | set[str] | str | None = field(
        default=None, metadata={"help": "Names, a regular expression, or 'all-linear'."}
    )
    exclude_modules: list[str] | set[str] | str | None = field(
        default=None, metadata={"help": "Names or a regular expression of layers to leave alone."}
    )
    layers_to_transform: list[int] | int | None = field(
        default=None, metadata={"help": "Indices of the layers to adapt; only with a list of target_modules."}
    )
    layers_pattern: list[str] | str | None = field(
        default=None, metadata={"help": "Name of the list that layers_to_transform counts in, such as 'layers'."}
    )
    rank_pattern: dict[str, Any] = field(
        default_factory=dict, metadata={"help": "Ranks by name or regular expression: a rank or a pair (r1, r2)."}
    )
    alpha_pattern: dict[str, float] = field(
        default_factory=dict, metadata={"help": "alpha by name or regular expression."}
    )
    modules_to_save: list[str] | None = field(
        default=None, metadata={"help": "Modules that are trained whole and saved with the adapter."}
    )
    bias: Literal["none", "all", "dual_lora_only"] = field(
        default="none", metadata={"help": "Which biases train: 'none', 'all' or 'dual_lora_only'."}
    )

    def __post_init__(self) -> None:
        super().__post_init__()
        self.peft_type = PEFT_TYPE
        check_hyperparameters(
            r1=self.r1, r2=self.r2, alpha=self.alpha, dropout=self.dropout, init_std=self.init_std,
            ste=self.ste, clip_bound=self.clip_bound, rounding=self.rounding, gradient_columns=self.gradient_columns,
        )  # fmt: skip
        if isinstance(self.warmup_steps, bool) or not isinstance(self.warmup_steps, int) or self.warmup_steps < 0:
            raise ValueError(f"warmup_steps: got {self.warmup_steps!r}, expected a number of steps, 0 or more")
        check_patterns(self.rank_pattern, self.alpha_pattern)
        check_choice("bias", self.bias, _BIASES)
        for name in ("target_modules", "exclude_modules"):
            value = getattr(self, name)
            setattr(self, name, set(value) if isinstance(value, list | tuple) else value)
        if isinstance(self.target_modules, str):
            for name in ("layers_to_transform", "layers_pattern"):
                if getattr(self, name) is not None:
                    raise ValueError(f"`{name}` cannot be used when `target_modules` is a str.")
        if self.layers_pattern and self.layers_to_transform is None:
            raise ValueError("When `layers_pattern` is specified, `layers_to_transform` must also be specified. ")

    def layer_options(self, name: str) -> dict[str, Any]:
        """The options of `DualLoraAdapter` for the layer called `name`."""
        r1, r2 = ranks_for(name, self.r1, self.r2, self.rank_pattern)
        return {
            "r1": r1,
            "r2": r2,
            "alpha": alpha_for(name, self.alpha, self.alpha_pattern),
            "init_std": self.init_std if self.init_weights else 1.0,
            **{option: getattr(self, option) for option in _SHARED},
        }
