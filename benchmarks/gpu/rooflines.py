"""Each kernel's time against its two floors: the bytes it must move and the operations it must do, at measured rates.

Bytes: every operand read once and every result written once, no partial sums. Operations: multiplications and additions
of the products; the elementwise part is left out, and the rank products count once although fp32 factors take three
TF32 products on NVIDIA's tensor cores. Both rates are this device's own, measured in the same run: a copy, and a bf16
matrix product.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass

import torch

from dual_lora_kernels.tuning.device_time import seconds_per_call
from dual_lora_kernels.tuning.kernel_calls import PRODUCTS, RANK, call, rotated

BF16, FP32 = 2, 4
"""Bytes."""


@dataclass(frozen=True)
class Ceilings:
    """Measured rates: bytes per second of a copy (read and written), operations per second of a bf16 product."""

    bytes_per_second: float
    operations_per_second: float


@dataclass(frozen=True)
class Work:
    """What a call cannot avoid."""

    bytes: int
    operations: int

    def floor(self, ceilings: Ceilings) -> tuple[float, float]:
        """Seconds for the bytes, and for the operations."""
        return self.bytes / ceilings.bytes_per_second, self.operations / ceilings.operations_per_second


@dataclass(frozen=True)
class Point:
    """One kernel on one layer. `tokens` is 0 for the kernels over a panel."""

    kernel: str
    rows: int
    columns: int
    tokens: int

    @property
    def label(self) -> str:
        """For tables and charts."""
        tokens = f", M={self.tokens}" if self.tokens else ""
        return f"{self.kernel} {self.rows}x{self.columns}{tokens}"


@dataclass(frozen=True)
class Reached:
    """A measured point. Times in seconds; `fraction` of the roofline: the larger floor over the time."""

    seconds: float
    bytes: int
    operations: int
    bytes_floor: float
    operations_floor: float

    @property
    def fraction(self) -> float:
        """1 is the roofline."""
        return max(self.bytes_floor, self.operations_floor) / self.seconds


def ceilings(device: torch.device, copied: int = 2**30, size: int = 8192) -> Ceilings:
    """Measure them: a copy of `copied` bytes, a product of size³ on random numbers (zeros run faster)."""
    source = torch.randn(copied // BF16, device=device, dtype=torch.bfloat16)
    target = torch.empty_like(source)
    copy = seconds_per_call([lambda: target.copy_(source)], device)
    a, b = (torch.randn(size, size, device=device, dtype=torch.bfloat16) for _ in range(2))
    product = seconds_per_call([lambda: torch.mm(a, b)], device, milliseconds=100)
    return Ceilings(2 * source.nbytes / copy, 2 * size**3 / product)


def work(point: Point) -> Work:
    """Bytes and operations of one call, with r1 = r2 = `RANK`."""
    n, k, m = point.rows, point.columns, point.tokens
    factors = 2 * RANK * (n + k) * FP32
    rebuild = 2 * (2 * RANK) * n * k
    if point.kernel == "effective_weight":
        return Work(2 * n * k * BF16 + factors, rebuild)
    if point.kernel in PRODUCTS:
        return Work((n * k + m * (n + k)) * BF16 + factors, 2 * m * n * k + rebuild)
    # The factors are read, their gradients written; ∂P and ∂Q are each multiplied by two factors.
    contract = 2 * rebuild
    if point.kernel == "factor_gradients":
        return Work(n * k * FP32 + 2 * factors, rebuild + contract)
    return Work(m * (n + k) * BF16 + 2 * factors, 2 * m * n * k + rebuild + contract)


def points(
    layers: tuple[tuple[int, int], ...], product_tokens: tuple[int, ...], token_product_tokens: tuple[int, ...]
) -> Iterator[Point]:
    """Every kernel on the first layer, then on the others: the most telling first."""
    for rows, columns in layers:
        yield Point("effective_weight", rows, columns, 0)
        yield Point("factor_gradients", rows, columns, 0)
        for kernel in PRODUCTS:
            yield from (Point(kernel, rows, columns, tokens) for tokens in product_tokens)
        yield from (Point("token_product", rows, columns, tokens) for tokens in token_product_tokens)


def reached(point: Point, rates: Ceilings, device: torch.device) -> Reached:
    """Time one point."""
    given = rotated(point.kernel, point.rows, point.columns, point.tokens, device)
    seconds = seconds_per_call([call(point.kernel, each) for each in given], device)
    needed = work(point)
    return Reached(seconds, needed.bytes, needed.operations, *needed.floor(rates))
