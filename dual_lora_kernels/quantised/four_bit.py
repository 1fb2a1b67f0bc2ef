"""bitsandbytes' NF4 and FP4: two codes a byte, and an absmax for every `blocksize` elements of the flattened weight."""

from __future__ import annotations

from typing import NamedTuple

import torch

from .weight import QuantisedWeight


class FourBitLayout(NamedTuple):
    """`row_length` is the whole matrix's in_features: element (i, j) is number i · row_length + j of the flat one."""

    shape: tuple[int, int]
    row0: int
    col0: int
    dtype: torch.dtype
    row_length: int
    blocksize: int
    nested_blocksize: int
    """Of the absmax' own quantisation; 0 where absmax is stored as it is."""


class FourBitWeight(QuantisedWeight):
    """W0[e] = round(table[code[e]] · absmax[e // blocksize]) for flat element e, multiplied in fp32.

    Tensors: packed uint8 [⌈N·K / 2⌉], the even element's code in a byte's upper half; table fp32 [16]; absmax fp32
    [blocks]. With double quantisation (QLoRA, section 3) absmax is uint8, and nested_table fp32 [256], nested_absmax
    fp32 [⌈blocks / nested_blocksize⌉] and offset fp32 [] follow:
    absmax[b] = nested_table[code[b]] · nested_absmax[b // nested_blocksize] + offset.

    This is bit for bit what bitsandbytes' CUDA kernels and its PyTorch code give. Its CPU kernel (0.50.2) reads other
    numbers where a block crosses a row's end (docs/decisions.md).
    """

    kind = "four_bit"
    layout_type = FourBitLayout
    layout: FourBitLayout

    def check(self) -> None:
        (n, _), layout = self.layout.shape, self.layout
        packed, _, absmax, *nested = self.tensors
        count = (layout.row0 + n) * layout.row_length
        blocks = -(-count // layout.blocksize)
        least = {"packed": (packed, -(-count // 2)), "table": (self.tensors[1], 16), "absmax": (absmax, blocks)}
        if layout.nested_blocksize:
            table, nested_absmax, offset = nested
            groups = -(-blocks // layout.nested_blocksize)
            least |= {"nested_table": (table, 256), "nested_absmax": (nested_absmax, groups), "offset": (offset, 1)}
        for name, (tensor, elements) in least.items():
            if tensor.numel() < elements or not tensor.is_contiguous():
                raise ValueError(
                    f"{name}: got {tensor.numel()} elements with strides {tensor.stride()}, expected {elements} or "
                    f"more, contiguous, for a weight of {list(layout.shape)} in blocks of {layout.blocksize}"
                )

    def values(self) -> torch.Tensor:
        (n, k), layout = self.layout.shape, self.layout
        first, stride = layout.row0 * layout.row_length + layout.col0, layout.row_length
        packed, table = self.tensors[:2]
        left = first % 2
        if k == stride:  # whole rows, which are one run of bytes
            pairs = _pairs(packed[first // 2 : (first + n * k + 1) // 2], table)
            numbers = pairs.view(-1)[left : left + n * k].view(n, k)
        elif stride % 2 == 0:  # every row begins in the same half of a byte
            length = (left + k + 1) // 2
            own = packed.as_strided((n, length), (stride // 2, 1), packed.storage_offset() + first // 2)
            numbers = _pairs(own, table).view(n, 2 * length)[:, left : left + k]
        else:
            elements = self._elements(first)
            codes = packed[elements >> 1].int()
            numbers = table[torch.where(elements % 2 == 0, codes >> 4, codes & 15)]
        return numbers * self._absmax(first)

    def _elements(self, first: int) -> torch.Tensor:
        """The numbers [n, k] of the elements in the flattened matrix, of which `first` is the block's first."""
        (n, k), stride = self.layout.shape, self.layout.row_length
        dtype = torch.int32 if first + n * stride < 2**31 else torch.int64
        rows, columns = (torch.arange(size, dtype=dtype, device=self.device) for size in (n, k))
        return (first + stride * rows)[:, None] + columns

    def _absmax(self, first: int) -> torch.Tensor:
        """The absmax of each element [n, k]."""
        (n, k), blocksize, stride = self.layout.shape, self.layout.blocksize, self.layout.row_length
        if stride % blocksize == 0 and k >= blocksize:  # every row has the same pattern: look its blocks up, and repeat
            left = first % blocksize
            rows = first // blocksize + stride // blocksize * torch.arange(n, device=self.device)
            blocks = rows[:, None] + torch.arange(-(-(left + k) // blocksize), device=self.device)
            return self._absmax_of(blocks).repeat_interleave(blocksize, dim=1)[:, left : left + k]
        return self._absmax_of(self._elements(first) // blocksize)

    def _absmax_of(self, blocks: torch.Tensor) -> torch.Tensor:
        """The absmax of the blocks of these numbers."""
        absmax = self.tensors[2][blocks]
        if not self.layout.nested_blocksize:
            return absmax
        table, nested, offset = self.tensors[3:]
        return table[absmax.int()].mul_(nested[blocks // self.layout.nested_blocksize]).add_(offset)


def _pairs(packed: torch.Tensor, table: torch.Tensor) -> torch.Tensor:
    """The table's entries [..., 2] for both codes of each byte, by one look-up."""
    codes = torch.arange(256, device=table.device)
    return torch.nn.functional.embedding(packed.int(), torch.stack((table[codes >> 4], table[codes & 15]), dim=1))
