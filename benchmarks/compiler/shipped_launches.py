"""Every kernel launch that the tile table ships, built from tensors on the meta device: what to compile and look at."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace

import torch

from dual_lora_kernels.backends import Block, DenseBase, Drawn, Estimator, Factors, ParameterGradients
from dual_lora_kernels.backends.triton import launches
from dual_lora_kernels.backends.triton.architecture import Architecture
from dual_lora_kernels.backends.triton.arguments import Hashes
from dual_lora_kernels.backends.triton.launch import Launch
from dual_lora_kernels.backends.triton.shapes import BLOCK_RANKS, TABLE, PanelShape, ProductShape, Shapes
from dual_lora_kernels.column_sampling import Sample
from dual_lora_kernels.precision import accumulation_dtype
from dual_lora_kernels.quantised.four_bit import FourBitLayout, FourBitWeight
from dual_lora_kernels.tuning.kernel_calls import RANK

from ..harness.environment import DTYPE_NAMES

KERNELS = ("effective_weight", "factor_gradients", "forward", "input_gradient", "token_product")
"""Those with entries in the table."""
SUM_KERNEL = "add_partials"
"""It has one shape everywhere."""
FEATURES = 4096
"""Rows and columns of the weight: whole tiles, so that no kernel masks its loads, as in most layers."""
MASKED_ROWS, MASKED_COLUMNS = 4099, 4112
"""A weight that ends within every tile. Vocabularies make odd numbers of rows; columns stay on 16-byte boundaries."""
LARGEST_RANK = BLOCK_RANKS[-1]
"""The largest rank of a fused kernel and of a slice; compiled with fp32 factors, the larger ones."""
MASKED_RANKS = {RANK: 12, LARGEST_RANK: 24}
"""Ranks that no block has, in the place of those that one has."""
MASKS = ("none", "batch", "all")
"""What a case's loads are masked for: nothing, the tokens and the rank alone, or every dimension."""
TOKENS = 4096
"""For shapes without a bound on their tokens."""
WIDE_FAMILIES = {"any_32bit": torch.float32, "any_64bit": torch.float64}
"""Families for fp32 and fp64 computation."""
WIDE_TARGETS = ("sm_90", "gfx942", "gfx1100")
"""The chips that those are compiled for: one of each kind of matrix unit."""
FAMILIES = tuple(TABLE)
_HASH_LENGTH = 2 * FEATURES
_COMPUTE_UNITS = 132  # launches do not depend on it


@dataclass(frozen=True)
class Case:
    """One kernel, compiled for `chip` with a shape of `family`, which differs from the chip for fp32 and fp64."""

    family: str
    chip: str
    kernel: str
    shape: PanelShape | ProductShape
    compute_dtype: torch.dtype
    factor_dtype: torch.dtype
    rank: int = RANK
    masks: str = "none"
    four_bit: bool = False
    """W0 is NF4 with double quantisation, read and dequantised inside the kernel."""
    drawn: bool = False
    """Columns are a sample, with weights."""

    @property
    def tokens(self) -> int:
        """The input's rows: as many as the shape is meant for, or one less where they are masked."""
        up_to = self.shape.up_to if isinstance(self.shape, ProductShape) else None
        return (up_to or TOKENS) - (self.masks != "none")

    @property
    def weight(self) -> tuple[int, int]:
        """Rows and columns of the weight."""
        return (MASKED_ROWS, MASKED_COLUMNS) if self.masks == "all" else (FEATURES, FEATURES)

    @property
    def tile(self) -> str:
        """The tile's sizes as a human writes them."""
        shape = self.shape
        if isinstance(shape, ProductShape):
            return f"{shape.block_m}×{shape.block_n}×{shape.block_k}"
        return f"{shape.rows}×{shape.columns}"

    @property
    def name(self) -> str:
        """Short, for tables and messages: chip, kernel, compute/factor dtypes, tile, warps, stages."""
        dtypes = f"{dtype_name(self.compute_dtype)}/{dtype_name(self.factor_dtype)}"
        rank = "" if self.rank == RANK else f" r{self.rank}"
        masks = "" if self.masks == "none" else f", {self.masks} masked"
        storage = " nf4" if self.four_bit else " drawn" if self.drawn else ""
        shape = f"{self.tile} {self.shape.warps}w {self.shape.stages}s"
        return f"{self.chip} {self.kernel}{storage} {dtypes}{rank} {shape}{masks}"

    def launch(self) -> Launch:
        """The kernel's launch for a weight and tokens of its sizes and factors of its rank."""
        compute, (rows, columns), rank = self.compute_dtype, self.weight, self.rank
        chip = Architecture(self.chip, _COMPUTE_UNITS)
        factors = Factors(
            _meta(rank, columns, dtype=self.factor_dtype), _meta(rows, rank, dtype=self.factor_dtype),
            _meta(rank, columns, dtype=self.factor_dtype), _meta(rows, rank, dtype=self.factor_dtype),
            _meta(dtype=torch.float32),
        )  # fmt: skip
        hashes = Hashes(_meta(_HASH_LENGTH, dtype=torch.int32), _meta(_HASH_LENGTH, dtype=torch.int32))
        weight = _meta(rows, columns, dtype=compute)
        base = _four_bit_weight(rows, columns, compute) if self.four_bit else DenseBase(weight)
        block = Block(base, factors, "dither", compute)
        if self.drawn:
            sample = Sample(*(_meta(columns, dtype=dtype) for dtype in (torch.int64, torch.float32)))
            block = block._replace(base=None, drawn=Drawn(factors.A, factors.C, sample))
        inputs, outputs = (_meta(self.tokens, features, dtype=compute) for features in (columns, rows))
        if self.kernel in ("forward", "input_gradient"):
            assert isinstance(self.shape, ProductShape)
            source, result = (outputs, inputs) if self.kernel == "input_gradient" else (inputs, outputs)
            split = None
            if self.shape.up_to is not None:  # where tokens are few, sums are split
                parts = _meta(2, *result.shape, dtype=accumulation_dtype(compute))
                split = launches.SplitSum(parts, _meta(FEATURES, dtype=torch.int32))
            return launches.weight_product(self.kernel, result, source, block, None, hashes, self.shape, chip, split)
        if self.kernel == "effective_weight":
            assert isinstance(self.shape, PanelShape)
            return launches.effective_weight(weight, block, hashes, self.shape, chip)
        gradients, estimator = ParameterGradients(*factors[:4]), Estimator("clip", 1.0)
        wide = accumulation_dtype(compute)
        if self.kernel == SUM_KERNEL:
            return launches.add_partials(gradients, factors.ranks, self._partials(64, 64, wide))
        if self.kernel == "factor_gradients":
            assert isinstance(self.shape, PanelShape)
            partials = self._partials(self.shape.rows, self.shape.columns, wide)
            h = _meta(rows, columns, dtype=wide)
            return launches.factor_gradients(h, block, estimator, gradients, partials, self.shape, chip)
        assert isinstance(self.shape, ProductShape)
        partials = self._partials(self.shape.block_m, self.shape.block_n, wide)
        return launches.token_product(outputs, inputs, block, estimator, gradients, partials, self.shape, chip)

    def _partials(self, tile_rows: int, tile_columns: int, dtype: torch.dtype) -> tuple[torch.Tensor, torch.Tensor]:
        """Partial sums: up [column tiles, rows, r1 + r2], down [row tiles, columns, r1 + r2]."""
        (rows, columns), ranks = self.weight, 2 * self.rank
        return (
            _meta(launches.ceil_div(columns, tile_columns), rows, ranks, dtype=dtype),
            _meta(launches.ceil_div(rows, tile_rows), columns, ranks, dtype=dtype),
        )


def shipped_cases(
    families: Sequence[str] = FAMILIES,
    kernels: Sequence[str] = KERNELS,
    table: dict[str, Shapes] = TABLE,
    masks: Sequence[str] = MASKS,
) -> Iterator[Case]:
    """Everything in `table`: 16-bit families in bf16 with fp32 and with bf16 factors, the wide ones on some chips.

    fp32 factors also of `LARGEST_RANK`, where the family runs that fused. Each with all of `masks` that concern it.
    """
    for case in _unmasked_cases(families, kernels, table):
        if "none" in masks:
            yield case
        masked = ("batch",) if isinstance(case.shape, ProductShape) and case.shape.whole_tiles else ("batch", "all")
        for mask in masked:
            if mask in masks:
                yield replace(case, masks=mask, rank=MASKED_RANKS[case.rank])
        if _is_usual(case):
            makes_weight = case.kernel in ("effective_weight", "forward", "input_gradient")
            twin = replace(case, four_bit=True) if makes_weight else replace(case, drawn=True)
            if "none" in masks:
                yield twin
            if "all" in masks and isinstance(case.shape, PanelShape):
                yield replace(twin, masks="all", rank=MASKED_RANKS[case.rank])


def sum_cases(families: Sequence[str] = FAMILIES) -> Iterator[Case]:
    """The kernel that adds partial gradients, in fp32 and fp64, for ranks that fill its tile and for others."""
    shape = PanelShape(launches.SUM_LINES, launches.SUM_RANKS, launches.SUM_WARPS, 1)
    for family in families:
        dtype = WIDE_FAMILIES.get(family, torch.float32)
        for chip in WIDE_TARGETS if family in WIDE_FAMILIES else (family,):
            case = Case(family, chip, SUM_KERNEL, shape, dtype, dtype)
            yield from (case, replace(case, masks="all", rank=MASKED_RANKS[RANK]))


def _is_usual(case: Case) -> bool:
    """Whether NF4, or a sample of columns, is compiled for a case as well: 16-bit computation and fp32 factors."""
    return case.compute_dtype.itemsize == 2 and case.factor_dtype == torch.float32 and case.rank == RANK


def _four_bit_weight(rows: int, columns: int, dtype: torch.dtype) -> FourBitWeight:
    """NF4 as bitsandbytes makes it by default, with blocks of 64 and absmax in blocks of 256."""
    blocks = launches.ceil_div(rows * columns, 64)
    packed, absmax = (_meta(size, dtype=torch.uint8) for size in (rows * columns // 2, blocks))
    table, nested_table, nested = (
        _meta(size, dtype=torch.float32) for size in (16, 256, launches.ceil_div(blocks, 256))
    )
    offset = _meta(dtype=torch.float32)
    layout = FourBitLayout((rows, columns), 0, 0, dtype, columns, 64, 256)
    return FourBitWeight((packed, table, absmax, nested_table, nested, offset), layout)


def _unmasked_cases(families: Sequence[str], kernels: Sequence[str], table: dict[str, Shapes]) -> Iterator[Case]:
    for family in families:
        chips = WIDE_TARGETS if family in WIDE_FAMILIES else (family,)
        compute = WIDE_FAMILIES.get(family, torch.bfloat16)
        factor_dtypes = (compute,) if family in WIDE_FAMILIES else (torch.float32, torch.bfloat16)
        for chip in chips:
            for kernel in kernels:
                entry = getattr(table[family], kernel)
                for shape in entry if isinstance(entry, tuple) else (entry,):
                    for factor_dtype in factor_dtypes:
                        yield Case(family, chip, kernel, shape, compute, factor_dtype)
                    if family not in WIDE_FAMILIES and table[family].fused_rank >= LARGEST_RANK:
                        yield Case(family, chip, kernel, shape, compute, torch.float32, LARGEST_RANK)


def dtype_name(dtype: torch.dtype) -> str:
    """``"bf16"`` for bfloat16, and so on."""
    return next(name for name, known in DTYPE_NAMES.items() if known == dtype)


def _meta(*shape: int, dtype: torch.dtype) -> torch.Tensor:
    return torch.empty(shape, dtype=dtype, device="meta")
