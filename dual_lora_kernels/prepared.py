"""W of a layer kept in memory for calls without gradients, until what it was made from changes."""

from __future__ import annotations

import logging
from collections.abc import Sequence
from typing import NamedTuple

import torch

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
    """Where tensors are, and their versions: every change in place counts one up."""
    return tuple((tensor.data_ptr(), tensor._version) for tensor in sources)
