"""GPTQModel's layers with packed integers (GPTQ, AWQ), where a kernel keeps them as the checkpoint has them."""

from __future__ import annotations

from typing import Any, NamedTuple

import torch
from torch import nn

from .weight import QuantisedWeight

_GPTQ = ("TorchLinear", "TritonV2Linear")
_AWQ = ("AwqTorchLinear",)
"""The classes whose tensors stay in the plain format. Subclasses in the library are not meant: ParoLinear rotates the
input, those for MLX only carry tensors to another kernel. A user's own are."""
_BITS = (2, 4, 8)
"""The widths whose numbers never cross a word, and which lie in one plane."""
_DTYPES = (torch.float16, torch.bfloat16, torch.float32)
_NOT_YET = "is not initialised yet: let GPTQModel load the model, or call layer.post_init() after loading"


class PackedLayout(NamedTuple):
    """`group_size` consecutive columns share a scale; 0 where the fourth tensor tells each column's group."""

    shape: tuple[int, int]
    row0: int
    col0: int
    dtype: torch.dtype
    bits: int
    group_size: int
    packed_rows: bool
    interleaved: bool


class PackedWeight(QuantisedWeight):
    """W0[i, j] = (code[i, j] − zero_point[group(j), i]) · scale[group(j), i], rounded once, to `dtype`.

    Tensors: packed codes [K / f, N] (GPTQ) or, with `packed_rows`, [K, N / f] (AWQ), packed zero points
    [groups, N / f], scale [groups, N] in `dtype` and for GPTQ the group of each column int32 [K]. Words are int32 (GPTQ
    has int16 and int8 as well) and hold f numbers each, the first in the lowest bits. `interleaved`, which is AWQ with
    4 bits: the even ones of the eight come first, then the odd ones.
    """

    kind = "packed"
    layout_type = PackedLayout
    layout: PackedLayout

    def check(self) -> None:
        (n, k), layout = self.layout.shape, self.layout
        codes, per_word = self.tensors[0], self._per_word
        words = (layout.col0 + k, -(-(layout.row0 + n) // per_word))
        least = words if layout.packed_rows else (-(-words[0] // per_word), layout.row0 + n)
        if codes.dim() != 2 or codes.shape[0] < least[0] or codes.shape[1] < least[1]:
            raise ValueError(f"qweight: got shape {tuple(codes.shape)}, expected at least {least}")

    def values(self) -> torch.Tensor:
        layout, (codes, zero_points, scale, *group) = self.layout, self.tensors
        (n, k), row, col = layout.shape, layout.row0, layout.col0
        columns = slice(col, col + k)
        groups = group[0][columns] if group else torch.arange(col, col + k, device=self.device) // layout.group_size
        words, start = self._words(row, n)  # cut before the groups' are gathered, which are then no more than the block
        rows = slice(start, start + n)
        if layout.packed_rows:
            numbers = self._unpacked(codes[columns, words], 2)[:, rows]
        else:
            words_of_columns, first = self._words(col, k)
            numbers = self._unpacked(codes[words_of_columns, row : row + n], 1)[first : first + k]
        numbers -= self._unpacked(zero_points[:, words][groups], 2)[:, rows]
        return (numbers * scale[:, row : row + n][groups]).t()

    def _words(self, start: int, size: int) -> tuple[slice, int]:
        """(words that hold numbers start … start + size, the place of the first of these numbers in them)."""
        per_word = self._per_word
        return slice(start // per_word, (start + size - 1) // per_word + 1), start % per_word

    def _unpacked(self, words: torch.Tensor, axis: int) -> torch.Tensor:
        """All numbers int32 of `words` [a, b], a word's along the axis before which `axis` places them."""
        place = torch.arange(self._per_word, dtype=torch.int32, device=self.device)
        if self.layout.interleaved:
            place = place // 2 + place % 2 * (self._per_word // 2)
        shift = place * self.layout.bits
        numbers = words.unsqueeze(axis) >> (shift if axis == 2 else shift.unsqueeze(1))
        return numbers.bitwise_and_((1 << self.layout.bits) - 1).flatten(axis - 1, axis)

    @property
    def _per_word(self) -> int:
        return 8 * self.tensors[0].itemsize // self.layout.bits


def is_gptqs(module: nn.Module) -> bool:
    """Whether `module` is one of GPTQModel's linear layers, of any kernel."""
    return _kind(module) is not None


def why_not_gptqs(module: Any) -> str | None:
    """Why such a layer's weight cannot be read by rows and columns now; None if it can."""
    kind = _kind(module)
    if kind not in (*_GPTQ, *_AWQ):
        readable = ", ".join((*_GPTQ, *_AWQ))
        return (
            f"weight is packed for GPTQModel's {kind}, whose layout is not read; expected one of {readable}: load the "
            "GPTQ or AWQ model with backend=BACKEND.TORCH"
        )
    names = ["qweight", "qzeros", "scales"] + ["g_idx"] * (kind in _GPTQ)
    missing = [name for name in names if getattr(module, name, None) is None]
    if missing:
        return f"weight has no {missing[0]}: load or pack the layer first"
    if module.qweight.is_meta:
        return "weight is on the meta device, and has no numbers yet: load the model first"
    if module.bits not in _BITS:
        return f"weight has {module.bits} bits, expected one of {', '.join(map(str, _BITS))}"
    if kind in _GPTQ and not module.optimized:  # the zero points of old checkpoints are corrected before it
        return f"weight {_NOT_YET}"
    if kind in _AWQ and module.scales.dtype == torch.float32:  # which it rounds to float16
        return f"weight, whose scales are torch.float32, {_NOT_YET}"
    if module.scales.dtype not in _DTYPES:
        return f"weight has scales of {module.scales.dtype}, expected one of {', '.join(map(str, _DTYPES))}"
    if kind in _GPTQ and module.g_idx.numel() != module.in_features:
        return f"weight has {module.g_idx.numel()} numbers in g_idx, expected in_features = {module.in_features}"
    return _why_more_than_a_product(module)


def read_gptqs(module: Any) -> PackedWeight:
    """W0 in the dtype of the layer's scales. AWQ's layers cast these to the input's dtype in their own forward."""
    awq = _kind(module) in _AWQ
    tensors = [module.qweight, module.qzeros, module.scales]
    if not awq:
        tensors.append(module.g_idx.to(module.qweight.device))  # the library's own calls move it to the CPU
    shape, group_size = (module.out_features, module.in_features), module.group_size if awq else 0
    interleaved = awq and module.bits == 4
    return PackedWeight(
        tensors, PackedLayout(shape, 0, 0, module.scales.dtype, module.bits, group_size, awq, interleaved)
    )


def _why_more_than_a_product(module: Any) -> str | None:
    """Why the layer's outputs are not x · W0ᵀ + bias; None if they are."""
    for rotation in ("online_full_had", "online_partial_had"):
        if getattr(module, rotation, False):
            return f"layer rotates its input ({rotation}): expected one that multiplies by its weight alone"
    if getattr(module, "adapter", None) is not None:
        return f"layer has GPTQModel's adapter {type(module.adapter).__name__}: load the model without an adapter"
    return None


def _kind(module: nn.Module) -> str | None:
    """The name of a linear layer's class in GPTQModel, whose embeddings share a class with linear layers."""
    names = [base.__name__ for base in type(module).__mro__ if base.__module__.startswith("gptqmodel.")]
    return names[0] if "BaseQuantLinear" in names and "TorchQuantEmbeddings" not in names else None
