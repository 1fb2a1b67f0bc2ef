"""The five rates of a machine that the cost model turns work into seconds with, measured as subjects of one case."""

from __future__ import annotations

from collections.abc import Callable, Mapping

import torch
from rich.console import Console

from dual_lora_kernels import dual_lora_merge_

from ..harness.environment import DTYPE_NAMES
from ..harness.results import Case, Measurement, Setting
from ..harness.timing import interleaved
from .cost import PACKING, Layer, Rates, merging, passes

KIND = "rates"
_LAYER = Layer(512, 2048, 2048)
"""As large as no cache of a core, and a layer like those that are predicted."""
_LAUNCHES = 200
_SMALL_SCALE = 1e-9
"""Of an update that is merged again and again into one weight."""


def measure(dtype: str, device: torch.device, rounds: int, console: Console) -> Case:
    """Three products, a copy, W over W0, and launches of operations on a single number, forward and backward.

    One copy is into memory that is there. The other, of a weight four times as large, gets its memory anew as large
    results of PyTorch's operations do, which on a CPU takes longer than the copying.
    """
    numbers, n, k, r = DTYPE_NAMES[dtype], _LAYER.out_features, _LAYER.in_features, _LAYER.rank
    x, grad, weight = (
        torch.randn(*shape, dtype=numbers, device=device) for shape in ((_LAYER.tokens, k), (_LAYER.tokens, n), (n, k))
    )
    target, large = torch.empty_like(weight), torch.zeros(2 * n, 2 * k, dtype=numbers, device=device)
    A, B, C, D = (torch.randn(*shape, device=device) for shape in ((r, k), (n, r), (r, k), (n, r)))
    one = torch.ones(1, device=device)
    start = torch.ones(1, device=device, requires_grad=True)

    def products() -> None:
        torch.mm(x, weight.t())
        torch.mm(grad.t(), x, out=target)
        torch.mm(grad, weight)

    def launches() -> None:
        value = start
        for _ in range(_LAUNCHES // 2):
            value = value * one
        torch.autograd.grad(value, start)

    subjects: Mapping[str, Callable[[], object]] = {
        "product": products,
        "copy": lambda: target.copy_(weight),
        "new_copy": large.clone,
        "generate": lambda: dual_lora_merge_(weight, A, B, C, D, _SMALL_SCALE),
        "launch": launches,
    }
    counts = {
        "product": {"operations": passes("floor", _LAYER).step().operations},
        "copy": {"bytes": 2 * weight.nbytes},
        "new_copy": {"bytes": 2 * large.nbytes},
        "generate": {"operations": merging(_LAYER).generation},
        "launch": {"launches": _LAUNCHES},
    }
    seconds = interleaved(subjects, rounds=rounds, warmup=2, device=device, console=console)
    settings: dict[str, Setting] = {
        "kind": KIND, "dtype": dtype, "out_features": n, "in_features": k, "tokens": _LAYER.tokens, "rank": r,
    }  # fmt: skip
    measured = {name: Measurement(tuple(seconds[name]), counts=counts[name]) for name in subjects}
    return Case(settings, "product", measured)


def rates(case: Case) -> Rates:
    """Of a case that `measure` has made, by the medians.

    Raises:
        ValueError: it is another kind of case.
    """
    if case.settings["kind"] != KIND:
        raise ValueError(f"case: got one of kind {case.settings['kind']!r}, expected {KIND!r}")

    def rate(subject: str, what: str) -> float:
        return case.subjects[subject].counts[what] / case.seconds(subject).median

    products = rate("product", "operations") * (1 + PACKING / _LAYER.tokens)
    generation, launch = rate("generate", "operations"), 1 / rate("launch", "launches")
    return Rates(products, rate("copy", "bytes"), rate("new_copy", "bytes"), generation, launch)
