"""Fused or panels: which way a pass can run, and which way it runs faster.

Fused reads W0 once and writes nothing but its result, but rebuilds W for every block of tokens. Panels rebuild W once
and run the product at the vendor's speed, for one more write and read of W. So the number of tokens decides, against
the family's entry in ``tile_shapes.json``.

Where the entries come from: no GPU has run this yet. The model in ``benchmarks/model`` sees both ways break even near
64 tokens for Y and ∂X on H200 and MI300X, at 1024² to 14336 × 4096, and near 256 for H (docs/decisions.md).
`dual-lora tune` measures and rewrites them.
"""

from __future__ import annotations

import torch

from ...precision import accumulation_dtype
from ..block import Block
from ..interface import Settings
from .architecture import Architecture, architecture
from .execute import fused_rank_limit, least_token_product_bytes, why_unfit


def why_not(operation: str, input: torch.Tensor, block: Block, settings: Settings) -> str | None:
    """See `FusedPasses.why_not`."""
    factors, ranks = block.factors, block.factors.ranks
    if accumulation_dtype(input.dtype) != accumulation_dtype(factors.A.dtype):
        return f"input of {input.dtype} with factors of {factors.A.dtype} accumulates in two dtypes"
    if max(ranks) > (limit := fused_rank_limit(input)):
        return f"ranks {ranks[0]} and {ranks[1]} exceed {limit}, up to which fused kernels fit this chip"
    if operation == "token_product" and (needed := least_token_product_bytes(input, factors)) > settings.workspace:
        return f"one row of tiles needs {needed} bytes of partial sums, the workspace has {settings.workspace}"
    return why_unfit(operation, input, factors, block.base)


def preferred(operation: str, input: torch.Tensor) -> bool:
    """See `FusedPasses.preferred`."""
    chip = architecture(input.device)
    assert isinstance(chip, Architecture), chip
    return input.shape[0] <= chip.shapes(input.itemsize).fused_up_to[operation]
