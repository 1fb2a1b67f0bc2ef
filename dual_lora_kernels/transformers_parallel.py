"""Layers that transformers has split by tensor parallelism (``tp_plan="auto"``), which wraps their forward.

Dual LoRA reads a layer's weight without calling the layer, so it has to apply the rules of its plan itself.
"""

from __future__ import annotations

import inspect
import sys
from collections.abc import Callable
from typing import TYPE_CHECKING, Any, NamedTuple, Self

import torch
from torch import nn

from .tensor_parallel import COLUMNS, ROWS, Split, check_divides

if TYPE_CHECKING:
    from torch.distributed.device_mesh import DeviceMesh

_DEFINING = "transformers.distributed.tensor_parallel"
_DIMS = {"ColwiseParallel": ROWS, "RowwiseParallel": COLUMNS}


class Rules(NamedTuple):
    """One of transformers' parallel styles, and the mesh that it has split a layer over."""

    style: Any
    mesh: DeviceMesh

    @property
    def split(self) -> Split:
        """How the layer is split."""
        return Split(self.mesh, _DIMS[type(self.style).__name__])

    def call(
        self, module: nn.Module, input: torch.Tensor, compute: Callable[[torch.Tensor], torch.Tensor]
    ) -> torch.Tensor:
        """``compute(input)``, between what the style does to a layer's input and output."""
        (own,), _ = self.style.transform_inputs_pre_forward(module, (input,), {}, self.mesh)
        result: torch.Tensor = self.style.transform_output_post_forward(module, compute(own), self.mesh)
        return result

    def __deepcopy__(self, memo: dict[int, Any]) -> Self:
        return self  # process groups cannot be copied


def rules_of(module: nn.Module) -> Rules | None:
    """The rules by which transformers has split `module`; None for a layer that it has not."""
    forward, defining = vars(module).get("forward"), sys.modules.get(_DEFINING)
    if defining is None or getattr(forward, "__module__", None) != _DEFINING:
        return None
    assert forward is not None
    found = inspect.getclosurevars(forward).nonlocals
    return Rules(found["self"], found["mesh"]) if {"self", "mesh"} <= found.keys() else None


def why_not_split(rules: Rules, in_features: int, out_features: int) -> str | None:
    """Why a layer under these rules cannot be adapted; None if it can."""
    kind = type(rules.style).__name__
    if kind not in _DIMS:
        return f"transformers has split it by {kind}, expected colwise or rowwise"
    try:
        check_divides(rules.mesh, rules.split.dim, (out_features, in_features)[rules.split.dim])
    except ValueError as error:
        return str(error)
    return None
