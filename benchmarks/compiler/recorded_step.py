"""What a layer's training step launches on a GPU, recorded without one from tensors on the meta device."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any
from unittest import mock

import torch
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from dual_lora_kernels import panel_split, panels, passes
from dual_lora_kernels.backends import Block, DenseBase, Estimator, Factors, ParameterGradients
from dual_lora_kernels.backends.triton import TritonBackend, choice, execute
from dual_lora_kernels.backends.triton.architecture import Architecture
from dual_lora_kernels.backends.triton.arguments import Hashes
from dual_lora_kernels.backends.triton.launch import Launch
from dual_lora_kernels.runtime_settings import current_settings


@dataclass(frozen=True)
class Product:
    """A product of the vendor's library, [m, k] times [k, n]; bytes that it reads and writes."""

    m: int
    n: int
    k: int
    bytes: int


@dataclass(frozen=True)
class SmallOperation:
    """Any other operation of PyTorch that launches something."""

    name: str
    bytes: int


_HASHES = 65536
Event = Launch | Product | SmallOperation


class _Recorder(TorchDispatchMode):
    """Records PyTorch's operations, but for views and allocations."""

    def __init__(self, events: list[Event]) -> None:
        super().__init__()
        self.events = events

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = kwargs or {}
        result = func(*args, **kwargs)
        name = func.overloadpacket.__name__
        if name in ("mm", "addmm"):
            a, b = args[-2:]
            self.events.append(Product(a.shape[0], b.shape[1], a.shape[1], a.nbytes + b.nbytes + result.nbytes))
        elif not func.is_view and not name.startswith(("empty", "new_empty")):
            tensors = [each for each in tree_leaves((args, result)) if isinstance(each, torch.Tensor)]
            if tensors:  # questions about dtypes have none, and launch nothing
                self.events.append(SmallOperation(name, sum(each.nbytes for each in tensors)))
        return result


def _meta(*shape: int, dtype: torch.dtype = torch.bfloat16) -> torch.Tensor:
    return torch.empty(shape, dtype=dtype, device="meta")


def _token_product(grad: torch.Tensor, x: torch.Tensor, out: torch.Tensor, cast_budget: int) -> None:
    # On a GPU the product writes fp32 by itself, which the meta device cannot say.
    torch.mm(grad.t(), x)


@contextmanager
def on_chip(chip: Architecture) -> Iterator[None]:
    """Triton's passes over meta tensors within it run as on `chip`."""
    hashes = _meta(_HASHES, dtype=torch.int32)
    with (
        mock.patch.object(execute, "_architecture", return_value=chip),
        mock.patch.object(choice, "architecture", return_value=chip),
        mock.patch.object(execute, "hashes", return_value=Hashes(hashes, hashes)),
        mock.patch.object(execute, "counters", return_value=hashes),
        mock.patch.object(panel_split, "compute_units", return_value=chip.compute_units),
        mock.patch.object(panels, "token_product_reaches", return_value=True),
        mock.patch.object(panels, "token_product", side_effect=_token_product),
    ):
        yield


@contextmanager
def recording(chip: Architecture) -> Iterator[list[Event]]:
    """As `on_chip`, and what runs within it fills the list that it yields; no kernel runs."""
    events: list[Event] = []
    with on_chip(chip), mock.patch.object(Launch, "run", lambda launch: events.append(launch)), _Recorder(events):
        yield events


@dataclass(frozen=True)
class Step:
    """The events of a training step's passes."""

    forward: list[Event]
    input_gradient: list[Event]
    parameter_gradients: list[Event]

    @property
    def events(self) -> list[Event]:
        """All of them."""
        return [*self.forward, *self.input_gradient, *self.parameter_gradients]


def layer_block(rows: int, columns: int, rank: int, factor_dtype: torch.dtype) -> Block:
    """A bf16 layer's weight [rows, columns] with r1 = r2 = `rank`, on the meta device."""
    A, B = _meta(rank, columns, dtype=factor_dtype), _meta(rows, rank, dtype=factor_dtype)
    factors = Factors(A, B, A, B, _meta(dtype=torch.float32))
    return Block(DenseBase(_meta(rows, columns)), factors, "dither", torch.bfloat16)


class LayerStep:
    """A bf16 layer's training step on the meta device, with W0 frozen and no bias."""

    def __init__(
        self, rows: int, columns: int, tokens: int, rank: int, factor_dtype: torch.dtype = torch.float32
    ) -> None:
        self._backend, self._settings = TritonBackend(), current_settings()
        self._block = layer_block(rows, columns, rank, factor_dtype)
        self._x, self._grad = _meta(tokens, columns), _meta(tokens, rows)

    def forward(self) -> None:
        """Y."""
        passes.forward(self._x, self._block, None, self._backend, self._settings)

    def input_gradient(self) -> None:
        """∂X."""
        passes.input_gradient(self._grad, self._block, self._backend, self._settings)

    def parameter_gradients(self) -> None:
        """The factors' gradients."""
        sums = ParameterGradients.zeros(self._block.factors, [True] * 4, torch.float32)
        passes.parameter_gradients(
            self._grad, self._x, self._block, Estimator("clip", 1.0), sums, self._backend, self._settings
        )


def training_step(
    chip: Architecture, rows: int, columns: int, tokens: int, rank: int, factor_dtype: torch.dtype = torch.float32
) -> Step:
    """The events of `LayerStep` on `chip`."""
    step = LayerStep(rows, columns, tokens, rank, factor_dtype)
    with recording(chip) as forward:
        step.forward()
    with recording(chip) as input_gradient:
        step.input_gradient()
    with recording(chip) as parameter_gradients:
        step.parameter_gradients()
    return Step(forward, input_gradient, parameter_gradients)


def decoding(chip: Architecture, rows: int, columns: int, tokens: int, rank: int) -> list[Event]:
    """The forward pass of a bf16 layer without gradients."""
    with recording(chip) as events:
        block = layer_block(rows, columns, rank, torch.float32)
        passes.forward(_meta(tokens, columns), block, None, TritonBackend(), current_settings())
    return events
