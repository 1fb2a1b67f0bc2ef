"""Fused or panels: which way a pass can run, and which way it runs faster.

Fused reads W0 once and writes nothing but its result, but rebuilds W for every block of tokens. Panels rebuild W once
and run the product at the vendor's speed, for one more write and read of W. So the number of tokens decides, against
the family's entry in ``tile_shapes.json``.

Where the entries come from: no GPU has run this yet. For an H100 they follow from counts. Per element of W a panel
costs 6 bytes (W0 and W read, W written: 2.0 ps at 3 TB/s) beside its product; fused costs about 1.0 ps of rank products
and rounding for every 128 tokens, so they break even between 256 and 512 tokens. For H, panels cost 8 bytes in L2 (1.6
ps) beside 2.9 ps of product at 1024 tokens and 11.7 at 4096. `dual-lora tune` measures and rewrites them.
"""

from __future__ import annotations

import torch

from ...precision import accumulation_dtype
from ..block import Factors
from ..interface import Settings
from .architecture import Architecture, architecture
from .execute import fused_rank_limit, least_token_product_bytes, why_unfit


def why_not(operation: str, input: torch.Tensor, factors: Factors, settings: Settings) -> str | None:
    """See `FusedPasses.why_not`."""
    ranks = factors.ranks
    if accumulation_dtype(input.dtype) != accumulation_dtype(factors.A.dtype):
        return f"input of {input.dtype} with factors of {factors.A.dtype} accumulates in two dtypes"
    if max(ranks) > (limit := fused_rank_limit(input)):
        return f"ranks {ranks[0]} and {ranks[1]} exceed {limit}, up to which fused kernels fit this chip"
    if operation == "token_product" and (needed := least_token_product_bytes(input, factors)) > settings.workspace:
        return f"one row of tiles needs {needed} bytes of partial sums, the workspace has {settings.workspace}"
    return why_unfit(operation, input, factors)


def preferred(operation: str, input: torch.Tensor) -> bool:
    """See `FusedPasses.preferred`."""
    chip = architecture(input.device)
    assert isinstance(chip, Architecture), chip
    return input.shape[0] <= chip.shapes(input.itemsize).fused_up_to[operation]
