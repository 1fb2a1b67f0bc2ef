"""C++ kernels for CPUs (csrc/): P and Q computed once where W and the factors' gradients both need them, in cache.

setup.py builds the library where there is a compiler. It registers its operators with PyTorch when it is loaded, at the
first call; nothing here needs it before.
"""

from __future__ import annotations

import json
from collections.abc import Sequence
from functools import cache
from pathlib import Path
from typing import Any

import torch

from ..quantised.four_bit import FourBitWeight
from ..rounding import is_dithered
from .block import Base, Block, DenseBase, Factors, ParameterGradients
from .interface import PANEL_UNIT, Estimator, Settings

_PACKAGE = Path(__file__).parents[1]
_FEW_TOKENS = 64
"""Tokens up to which W is multiplied in cache, row by row, instead of panel by panel (docs/decisions.md)."""
_OPERATORS = (
    "cpu_capability",
    "cpu_effective_weight",
    "cpu_factor_gradients",
    "cpu_weight_and_factor_gradients",
    "cpu_few_tokens",
)
_ops: Any = torch.ops.dual_lora_kernels
_ESTIMATORS = {"clip": 0, "dorefa": 1, "xnor": 2}
"""Numbers as in csrc/job.h."""
_DTYPES = {torch.float32: 0, torch.bfloat16: 1, torch.float16: 2}
"""Numbers as in csrc/views.h."""


class NativeBackend:
    """The backend for CPUs."""

    name = "native"
    panel_unit = PANEL_UNIT
    takes_cpu_dtypes = True
    wants_threads = False

    @property
    def fused(self) -> NativeFewTokens:
        return NativeFewTokens()

    @property
    def shared_products(self) -> NativeBackend:
        return self

    def why_unavailable(self) -> str | None:
        return _load_failure()

    def why_not(self, device: torch.device, compute_dtype: torch.dtype, factor_dtype: torch.dtype) -> str | None:
        return None if device.type == "cpu" else f"it has no kernels for device type {device.type!r}"

    def why_not_auto(self, device: torch.device) -> str | None:
        return None

    def description(self) -> str:
        """What runs, in words."""
        return f"{_ops.cpu_capability()} kernels on {torch.get_num_threads()} threads"

    def reads(self, base: Base) -> bool:
        return isinstance(base, DenseBase | FourBitWeight)

    def weight_temporaries(self, workspace: int) -> int:
        return workspace // 4  # it needs none, but its speed was measured with panels of three quarters

    def gradient_temporaries(self, workspace: int, factors: Factors) -> int:
        return workspace // 4  # partial sums of the factors' gradients

    def effective_weight(self, out: torch.Tensor, block: Block, settings: Settings) -> None:
        for own, part, _ in block.pieces(self, out, block.loading_bytes(self, settings.workspace)):
            _ops.cpu_effective_weight(part, *_tensors(own.base), own.factors, own.dtype, _dither(own))

    def factor_gradients(
        self, h: torch.Tensor, block: Block, estimator: Estimator, gradients: ParameterGradients, settings: Settings
    ) -> None:
        budget, kind = self.gradient_temporaries(settings.workspace, block.factors), _ESTIMATORS[estimator.kind]
        weights = None if block.drawn is None else block.drawn.sample.weights
        _ops.cpu_factor_gradients(h, block.factors, weights, gradients[:4], kind, estimator.bound, budget)

    def weight_and_factor_gradients(
        self,
        out: torch.Tensor,
        h: torch.Tensor,
        block: Block,
        estimator: Estimator,
        gradients: ParameterGradients,
        settings: Settings,
    ) -> None:
        budget, kind = self.gradient_temporaries(settings.workspace, block.factors), _ESTIMATORS[estimator.kind]
        for own, part, (top, left) in block.pieces(self, out, block.loading_bytes(self, settings.workspace)):
            (rows, columns), targets = own.shape, gradients
            if own.shape != block.shape:
                targets = gradients.rows(top, top + rows).columns(left, left + columns)
            own_h = h[top : top + rows, left : left + columns]
            _ops.cpu_weight_and_factor_gradients(
                (part, *targets[:4]), *_tensors(own.base), own_h, own.factors, own.dtype, _dither(own), kind,
                estimator.bound, budget,
            )  # fmt: skip


class NativeFewTokens:
    """The forward pass for a few tokens as one kernel, which reads W0 once and writes no W."""

    def why_not(self, operation: str, input: torch.Tensor, block: Block, settings: Settings) -> str | None:
        if operation != "forward":
            return "only its forward pass has a kernel of its own"
        if (input.dtype == torch.float64) != (block.factors.A.dtype == torch.float64):
            return f"input of {input.dtype} with factors of {block.factors.A.dtype} accumulates in two dtypes"
        return None

    def preferred(self, operation: str, input: torch.Tensor) -> bool:
        return input.shape[0] <= _FEW_TOKENS

    def weight_product(
        self, operation: str, input: torch.Tensor, block: Block, bias: torch.Tensor | None, settings: Settings
    ) -> torch.Tensor:
        out = input.new_empty(input.shape[0], block.shape[0])
        _ops.cpu_few_tokens(out, input, *_tensors(block.base), block.factors, bias, _dither(block))
        return out

    def token_product(self, *args: Any) -> None:
        raise NotImplementedError("why_not() refuses this pass")


@cache
def _load_failure() -> str | None:
    library = _PACKAGE / "_native.abi3.so"
    if not library.exists():
        return f"its C++ library is not in this installation ({_build_outcome()}); see README, Install"
    try:
        if not _is_whole(library):
            return "its C++ library is damaged (cut short); install the package again"
        torch.ops.load_library(library)
    except OSError as error:
        return f"its C++ library cannot be loaded ({error}); reinstall the package against this PyTorch"
    if not all(hasattr(_ops, name) for name in _OPERATORS):
        return "its C++ library is another version's; install the package again"
    return None


def _build_outcome() -> str:
    record = _PACKAGE / "_native_build.json"
    if not record.exists():
        return "the package was not installed by pip"
    try:
        return str(json.loads(record.read_text(encoding="utf-8")).get("missing", "the library was removed"))
    except (OSError, ValueError, AttributeError):
        return "the record of its build is damaged, too"


def _is_whole(library: Path) -> bool:
    """Whether a 64-bit ELF file has its section headers, which linkers put last; true for files of other formats.

    Loading a file that was cut short, or that ends in zeros after a power cut, ends the process with a signal.
    """
    with library.open("rb") as file:
        header = file.read(64)
        if header[:5] != b"\x7fELF\x02" or len(header) < 64:
            return header[:4] != b"\x7fELF" and any(header)
        offset, size, count = (int.from_bytes(header[a:b], "little") for a, b in ((40, 48), (58, 60), (60, 62)))
        file.seek(offset)
        sections = file.read(size * count)
    return len(sections) == size * count and any(sections[-size:])


def _tensors(base: Base | None) -> tuple[Sequence[torch.Tensor], Sequence[int]]:
    """W0 as the operators take it: its tensors, and what they mean where it is not dense."""
    if base is None:
        return (), ()
    if isinstance(base, FourBitWeight):
        layout = base.layout
        return base.tensors, (
            layout.row0, layout.col0, layout.row_length, layout.blocksize, layout.nested_blocksize,
            _DTYPES[layout.dtype],
        )  # fmt: skip
    assert base.dense is not None, "it has been loaded"
    return (base.dense,), ()


def _dither(block: Block) -> tuple[int, int] | None:
    """Where the block begins in the dither's field; None where W is rounded to nearest."""
    return block.origin if is_dithered(block.dtype, block.rounding) else None
