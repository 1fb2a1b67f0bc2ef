"""W of a layer kept in memory for calls without gradients, until what it was made from changes."""

from __future__ import annotations

import logging
import sys
from collections.abc import Sequence
from typing import NamedTuple

import torch
from torch.optim.optimizer import register_optimizer_step_post_hook

from .functional import compute_dtype

_logger = logging.getLogger("dual_lora_kernels")


class PreparedWeight(NamedTuple):
    """W [out_features, in_features], and the state of the tensors that it was made from."""

    weight: torch.Tensor
    state: object

    def serves(self, input: torch.Tensor, others: Sequence[torch.Tensor | None]) -> bool:
        """Whether a call may use it: one in its dtype that needs no gradient. `others`: the layer's own tensors."""
        if torch.compiler.is_compiling() or input.dtype != self.weight.dtype or compute_dtype(input) != input.dtype:
            return False
        return not torch.is_grad_enabled() or not any(t is not None and t.requires_grad for t in (input, *others))

    def is_current(self, sources: Sequence[torch.Tensor]) -> bool:
        """Whether nothing that it was made from has changed since; the log says so if something has."""
        if self.state == state_of(sources):
            return True
        _logger.warning("a prepared DualLoraLinear has changed: it computes W in every call until prepare()")
        return False


def state_of(sources: Sequence[torch.Tensor]) -> object:
    """Where tensors are, and their versions: every change in place counts one up.

    DeepSpeed's optimisers change parameters past that, so for those that train the steps of all optimisers count too.
    """
    steps = _steps() if "deepspeed" in sys.modules and any(tensor.requires_grad for tensor in sources) else 0
    return steps, *((tensor.data_ptr(), tensor._version) for tensor in sources)


def _steps() -> int:
    """Optimisers' steps since the first call."""
    global _step_count
    if _step_count is None:
        _step_count = 0
        register_optimizer_step_post_hook(_count)
    return _step_count


def _count(*_: object) -> None:
    global _step_count
    assert _step_count is not None
    _step_count += 1


_step_count: int | None = None
