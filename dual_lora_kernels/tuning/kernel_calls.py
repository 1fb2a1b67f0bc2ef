"""Each kernel on operands of a layer's shape, as the package runs it: for timing and for comparing results."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import torch

from ..backends import Block, DenseBase, Estimator, Factors, ParameterGradients
from ..backends.triton import TritonBackend
from ..backends.triton.shapes import TABLE, PanelShape, ProductShape, Shapes
from ..runtime_settings import current_settings
from .device_time import copies

RANK = 16
"""r1 and r2 where kernels are timed: the layer's default."""
ESTIMATOR = Estimator("clip", 1.0)
ROUNDING = "dither"
WEIGHT_STD = 0.02
FACTOR_STD = 0.02
SCALE = 2.0
KERNELS = tuple(entry.name for entry in dataclasses.fields(Shapes) if not entry.name.startswith("fused_"))
PRODUCTS = ("forward", "input_gradient")
WEIGHT_READERS = ("effective_weight", *PRODUCTS)
TOKEN_READERS = (*PRODUCTS, "token_product")


@dataclass(frozen=True)
class Operands:
    """One layer's tensors: W0 [N, K] and `out` like it in bf16, X [M, K], G [M, N], H [N, K] in fp32, fp32 factors."""

    weight: torch.Tensor
    factors: Factors
    x: torch.Tensor
    grad: torch.Tensor
    out: torch.Tensor
    h: torch.Tensor
    gradients: ParameterGradients

    @property
    def block(self) -> Block:
        """The weight as one block."""
        return Block(DenseBase(self.weight), self.factors, ROUNDING, self.weight.dtype)


def operands(kernel: str, rows: int, columns: int, tokens: int, device: torch.device, rank: int = RANK) -> Operands:
    """Random operands of `kernel`, r1 = r2 = `rank`; those that it does not use are empty."""

    def draw(*shape: int, std: float = 1.0, dtype: torch.dtype = torch.bfloat16) -> torch.Tensor:
        return torch.randn(shape, device=device, dtype=dtype).mul_(std)

    def factor(*shape: int) -> torch.Tensor:
        return draw(*shape, std=FACTOR_STD, dtype=torch.float32)

    factors = Factors(
        factor(rank, columns), factor(rows, rank), factor(rank, columns), factor(rows, rank),
        torch.tensor(SCALE, device=device),
    )  # fmt: skip
    used_tokens = tokens if kernel in TOKEN_READERS else 0
    return Operands(
        weight=draw(rows if kernel in WEIGHT_READERS else 0, columns, std=WEIGHT_STD),
        factors=factors,
        x=draw(used_tokens, columns),
        grad=draw(used_tokens, rows),
        out=torch.empty(rows if kernel == "effective_weight" else 0, columns, device=device, dtype=torch.bfloat16),
        h=draw(rows if kernel == "factor_gradients" else 0, columns, dtype=torch.float32),
        gradients=ParameterGradients(*(torch.zeros_like(each) for each in factors[:4])),
    )


def rotated(kernel: str, rows: int, columns: int, tokens: int, device: torch.device) -> list[Operands]:
    """As many sets of operands as keep each call's out of the caches."""
    first = operands(kernel, rows, columns, tokens, device)
    tensors = (first.weight, first.x, first.grad, first.out, first.h)
    count = copies(sum(tensor.nbytes for tensor in tensors), device)
    return [first, *(operands(kernel, rows, columns, tokens, device) for _ in range(count - 1))]


def call(kernel: str, given: Operands) -> Callable[[], object]:
    """`kernel` on these operands: its launches, and the sum of their parts where they make parts."""
    backend, block, settings = TritonBackend(), given.block, current_settings()
    fused = backend.fused
    if kernel == "effective_weight":
        return lambda: backend.effective_weight(given.out, block, settings)
    if kernel == "factor_gradients":
        return lambda: backend.factor_gradients(given.h, block, ESTIMATOR, given.gradients, settings)
    if kernel == "token_product":
        return lambda: fused.token_product(given.grad, given.x, block, ESTIMATOR, given.gradients, settings)
    input = given.x if kernel == "forward" else given.grad
    return lambda: fused.weight_product(kernel, input, block, None, settings)


def results(kernel: str, given: Operands) -> tuple[torch.Tensor, ...]:
    """What one call computes: W, Y or ∂X, or the factors' gradients."""
    for gradient in given.gradients[:4]:
        assert gradient is not None
        gradient.zero_()
    returned = call(kernel, given)()
    if kernel == "effective_weight":
        return (given.out.clone(),)
    if kernel in PRODUCTS:
        assert isinstance(returned, torch.Tensor)
        return (returned,)
    return tuple(gradient.clone() for gradient in given.gradients if gradient is not None)


def adopt(family: str, kernel: str, shapes: Sequence[PanelShape | ProductShape]) -> None:
    """Let `kernel` run with `shapes`, one but for the fused products' token classes, on chips of `family`."""
    entry: Any = tuple(shapes) if kernel in PRODUCTS else shapes[0]
    TABLE[family] = dataclasses.replace(TABLE[family], **{kernel: entry})


@contextmanager
def shape_in_use(family: str, kernel: str, shape: PanelShape | ProductShape) -> Iterator[None]:
    """Within it, `kernel` runs with `shape` on chips of `family`, for any number of tokens and any weight."""
    before = TABLE[family]
    if isinstance(shape, ProductShape):
        shape = dataclasses.replace(shape, up_to=None, whole_tiles=False)
    adopt(family, kernel, [shape])
    try:
        yield
    finally:
        TABLE[family] = before
