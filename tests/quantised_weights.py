"""Quantised weights drawn without a library: any codes, scales and shapes, and the numbers that they stand for."""

from __future__ import annotations

from typing import NamedTuple

import torch
from hypothesis import strategies as st

from dual_lora_kernels.quantised.four_bit import FourBitLayout, FourBitWeight
from dual_lora_kernels.quantised.integers import IntegerLayout, IntegerWeight
from dual_lora_kernels.quantised.weight import QuantisedWeight

DTYPES = [torch.bfloat16, torch.float32, torch.float16]


class FourBits(NamedTuple):
    """What a four-bit weight of n × k is drawn from."""

    n: int
    k: int
    blocksize: int
    nested: bool
    dtype: torch.dtype
    seed: int = 0

    def draw(self, device: torch.device | str = "cpu") -> tuple[FourBitWeight, torch.Tensor]:
        """The weight, and its numbers by the definition: element by element over the flattened matrix, in fp32."""
        generator = torch.Generator().manual_seed(self.seed)
        count = self.n * self.k
        blocks = -(-count // self.blocksize)
        codes = torch.randint(0, 16, (count + count % 2,), generator=generator)
        table = torch.randn(16, generator=generator)
        if self.nested:
            quantised = torch.randint(0, 256, (blocks,), generator=generator, dtype=torch.uint8)
            nested_table = torch.rand(256, generator=generator)
            nested_absmax = torch.rand(-(-blocks // 256), generator=generator)
            offset = torch.rand((), generator=generator)
            statistics = [quantised, nested_table, nested_absmax, offset]
            absmax = nested_table[quantised.long()] * nested_absmax[torch.arange(blocks) // 256] + offset
        else:
            statistics = [absmax := torch.rand(blocks, generator=generator)]
        packed = (codes[::2] << 4 | codes[1::2]).to(torch.uint8)
        layout = FourBitLayout((self.n, self.k), 0, 0, self.dtype, self.k, self.blocksize, 256 if self.nested else 0)
        numbers = (table[codes[:count]] * absmax[torch.arange(count) // self.blocksize]).to(self.dtype)
        tensors = [each.to(device) for each in (packed, table, *statistics)]
        return FourBitWeight(tensors, layout), numbers.view(self.n, self.k).to(device)


class Integers(NamedTuple):
    """What a weight of integers with scales is drawn from."""

    n: int
    k: int
    block_columns: int
    has_zero_point: bool
    dtype: torch.dtype
    seed: int = 0

    def draw(self, device: torch.device | str = "cpu") -> tuple[IntegerWeight, torch.Tensor]:
        """The weight, and its numbers by the definition."""
        generator = torch.Generator().manual_seed(self.seed)
        groups = self.k // self.block_columns
        integers = torch.randint(-128, 128, (self.n, self.k), generator=generator).to(torch.int8)
        scale = torch.rand(self.n, groups, generator=generator)
        tensors = [integers, scale]
        numbers = integers.to(self.dtype)
        if self.has_zero_point:
            tensors.append(torch.randint(-8, 8, (self.n, groups), generator=generator).to(torch.int8))
            numbers = numbers - tensors[2].repeat_interleave(self.block_columns, 1).to(self.dtype)
        numbers = (numbers * scale.repeat_interleave(self.block_columns, 1)).to(self.dtype)
        layout = IntegerLayout((self.n, self.k), 0, 0, self.dtype, 1, self.block_columns, 1.0)
        return IntegerWeight([each.to(device) for each in tensors], layout), numbers.to(device)


SIZES = st.one_of(st.integers(1, 40), st.sampled_from([63, 64, 65, 96, 127, 128, 130]))


@st.composite
def drawn(draw: st.DrawFn) -> tuple[QuantisedWeight, torch.Tensor]:
    """A weight of any kind, and its numbers."""
    n, k, dtype, seed = draw(SIZES), draw(SIZES), draw(st.sampled_from(DTYPES)), draw(st.integers(0, 100))
    if draw(st.booleans()):
        return FourBits(n, k, draw(st.sampled_from([32, 64, 128])), draw(st.booleans()), dtype, seed).draw()
    divisors = [size for size in range(1, k + 1) if k % size == 0]
    return Integers(n, k, draw(st.sampled_from(divisors)), draw(st.booleans()), dtype, seed).draw()
