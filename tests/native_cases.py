"""Drawn problems for the native kernels: any shape, dtypes and strides, in arithmetic that is exact in any order."""

from __future__ import annotations

import os
from dataclasses import dataclass, fields
from typing import Any

import torch
from hypothesis import settings
from hypothesis import strategies as st

from dual_lora_kernels import reference
from dual_lora_kernels.backends import Block, Estimator, Factors, ParameterGradients, base_of
from dual_lora_kernels.precision import accumulation_dtype
from dual_lora_kernels.self_check.problems import exact
from dual_lora_kernels.validation import STRAIGHT_THROUGH_ESTIMATORS

from .bits import bits

DTYPES = [torch.float32, torch.bfloat16, torch.float16, torch.float64]
LAYOUTS = ["dense", "transposed", "slice", "columns"]
_EDGES = [size + step for size in (16, 32, 48, 96, 192, 384, 400, 768) for step in (-1, 0, 1)]
"""Around the kernels' blocks (csrc/job.h: 16 rows, 384 columns; 96 columns of gradients) and vectors."""
SIZES = st.one_of(st.integers(1, 50), st.sampled_from(_EDGES), st.integers(1, 900))
RANKS = st.one_of(st.integers(1, 20), st.integers(1, 70))
OFFSETS = st.one_of(st.integers(0, 5), st.integers(2**31 - 500, 2**34))


def examples(count: int) -> settings:
    """So many drawn cases; a third under `make sanitize`, where each takes ten times as long."""
    return settings(max_examples=count // 3 if os.environ.get("DUAL_LORA_SANITIZE") else count)


def numbers(tensor: torch.Tensor) -> torch.Tensor:
    """Bits with one NaN and one zero: MKL's P of rank 1 is −0 for 0 · −1, where a sum that starts at 0 is 0."""
    return bits(torch.where(tensor.isnan(), torch.nan, tensor + 0))


def place(values: torch.Tensor, layout: str) -> torch.Tensor:
    """`values` in that layout, inside a larger tensor (its `_base`) that is NaN elsewhere."""
    n, k = values.shape

    def surroundings(rows: int, cols: int) -> torch.Tensor:
        return torch.full((rows, cols), torch.nan, dtype=values.dtype)

    if layout == "expanded":  # for what is only read
        return values[:1].expand(n, k)
    if layout == "dense":
        view = surroundings(n + 2, k)[1 : n + 1]
    elif layout == "transposed":
        view = surroundings(k + 2, n)[1 : k + 1].t()
    elif layout == "slice":
        view = surroundings(n + 2, k + 7)[1 : n + 1, 3 : k + 3]
    else:
        view = surroundings(n + 2, 2 * k + 2)[1 : n + 1, 1 : 2 * k + 1 : 2]
    return view.copy_(values)


def check(written: torch.Tensor, before: torch.Tensor, expected: torch.Tensor) -> None:
    """`written`, made by `place`, has the numbers of `expected`, and around it what was (`before`: its base)."""
    assert torch.equal(numbers(written), numbers(expected))
    written.copy_(torch.as_strided(before, written.shape, written.stride(), written.storage_offset()))
    assert torch.equal(bits(written._base), bits(before))


class Described:
    """Tensors in hypothesis' messages as what a case drew: dtype, shape and strides."""

    def __repr__(self) -> str:
        def text(value: Any) -> str:
            if isinstance(value, torch.Tensor) and value.dim():
                return f"{value.dtype} {list(value.shape)} strides {value.stride()}"
            return f"({', '.join(map(text, value))})" if isinstance(value, tuple) else str(value)

        return "\n".join(f"{field.name}: {text(getattr(self, field.name))}" for field in fields(self))


@dataclass(frozen=True, repr=False)
class Case(Described):
    """What a drawn call is about, besides the factors. `weight` is W0 or None; W is rounded to `out_dtype`."""

    factors: Factors
    weight: torch.Tensor | None
    out_dtype: torch.dtype
    stored: torch.dtype
    out_layout: str
    rounding: str
    row0: int
    col0: int
    in_place: bool

    @property
    def block(self) -> Block:
        """What the call computes W of."""
        return Block(base_of(self.weight), self.factors, self.rounding, self.out_dtype, self.row0, self.col0)

    @property
    def expected(self) -> torch.Tensor:
        """The reference's W."""
        return reference.effective_weight(
            self.weight, *self.factors, self.out_dtype, self.rounding, self.row0, self.col0
        ).to(self.stored, copy=True)

    def out(self) -> torch.Tensor:
        """Where W goes; W0 itself if the case is in place."""
        if self.in_place:
            assert self.weight is not None
            return self.weight
        n, k = self.factors.B.shape[0], self.factors.A.shape[1]
        return place(torch.full((n, k), torch.nan, dtype=self.stored), self.out_layout)


@st.composite
def cases(draw: Any, factor_dtypes: list[torch.dtype] = DTYPES) -> Case:
    n, k, r1, r2 = draw(SIZES), draw(SIZES), draw(RANKS), draw(RANKS)
    problem = exact(1, n, k, r1, r2, seed=draw(st.integers(0, 1000)))
    read = st.sampled_from([*LAYOUTS, "expanded"])
    factor_dtype = draw(st.sampled_from(factor_dtypes))
    matrices = [place(factor.to(factor_dtype), draw(read)) for factor in problem.factors[:4]]
    scale = problem.scale.to(draw(st.sampled_from([torch.float32, torch.float64])))
    weight_dtype = draw(st.sampled_from([None, *DTYPES]))
    layout, out_dtype = draw(read), draw(st.sampled_from(DTYPES))
    weight = None if weight_dtype is None else place(problem.weight.to(weight_dtype), layout)
    stored = draw(st.sampled_from([out_dtype, *([torch.float32] if out_dtype.itemsize == 2 else [])]))
    may_overwrite = weight_dtype == stored and layout != "expanded"
    return Case(
        factors=Factors(*matrices, scale),
        weight=weight,
        out_dtype=out_dtype,
        stored=stored,
        out_layout=draw(st.sampled_from(LAYOUTS)),
        rounding=draw(st.sampled_from(["dither", "nearest"])),
        row0=draw(OFFSETS),
        col0=draw(OFFSETS),
        in_place=may_overwrite and draw(st.booleans()),
    )


@dataclass(frozen=True, repr=False)
class GradientCase(Described):
    """H, how to differentiate, and the gradients that are wanted, which hold numbers already."""

    h: torch.Tensor
    estimator: Estimator
    gradients: ParameterGradients
    workspace: int

    def expected(self, factors: Factors) -> list[torch.Tensor | None]:
        """What the reference adds to each gradient; where all is exact, fp64 has the same numbers."""
        A, B, C, D = (factor.double() for factor in factors[:4])
        p, q = reference.rank_product(B, A), reference.rank_product(D, C)
        grad_p, grad_q = reference.product_gradients(self.h.double(), p, q, factors.scale.double(), *self.estimator)
        if self.h.dtype == torch.bfloat16 and torch.ops.dual_lora_kernels.cpu_capability() == "avx512_bf16":
            grad_p, grad_q = (grad.bfloat16().double() for grad in (grad_p, grad_q))  # contracted in pairs
        added = (B.t() @ grad_p, grad_p @ A.t(), D.t() @ grad_q, grad_q @ C.t())
        pairs = zip(self.gradients[:4], added, strict=True)
        return [None if old is None else (old.double() + new).to(old.dtype) for old, new in pairs]


@st.composite
def gradient_cases(draw: Any, factors: Factors) -> GradientCase:
    n, k = factors.B.shape[0], factors.A.shape[1]
    generator = torch.Generator().manual_seed(draw(st.integers(0, 1000)))
    narrow = [] if factors.A.dtype == torch.float64 else DTYPES[:3]
    h_dtype = draw(st.sampled_from([*narrow, torch.float64]))
    dtype = accumulation_dtype(h_dtype)

    def integers(*shape: int) -> torch.Tensor:
        return torch.randint(-3, 4, shape, generator=generator).to(dtype)

    wanted = draw(st.lists(st.booleans(), min_size=4, max_size=4))
    return GradientCase(
        h=place(integers(n, k).to(h_dtype), draw(st.sampled_from(LAYOUTS))),
        estimator=Estimator(
            draw(st.sampled_from(STRAIGHT_THROUGH_ESTIMATORS)), draw(st.sampled_from([1.0, 0.25, 1e9]))
        ),
        gradients=ParameterGradients(
            *(
                place(integers(*factor.shape), draw(st.sampled_from(LAYOUTS))) if wants else None
                for factor, wants in zip(factors[:4], wanted, strict=True)
            )
        ),
        workspace=draw(st.sampled_from([1, 10_000, 100_000, 1 << 20, 1 << 25])),
    )
