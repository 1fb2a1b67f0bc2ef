"""Fused or panels: which way a pass runs faster.

Fused reads W0 once and writes nothing but its result, but rebuilds W for every block of tokens. Panels rebuild W once
and run the product at the vendor's speed, for one more write and read of W. So the number of tokens decides, against
the family's entry in ``tile_shapes.json``.

Where the entries come from: no GPU has run this yet. For an H100 they follow from counts. Per element of W a panel
costs 6 bytes (W0 and W read, W written: 2.0 ps at 3 TB/s) beside its product; fused costs about 1.0 ps of rank products
and rounding for every 128 tokens, so they break even between 256 and 512 tokens. For H, panels cost 8 bytes in L2 (1.6
ps) beside 2.9 ps of product at 1024 tokens and 11.7 at 4096. `python -m benchmarks.tune` measures and rewrites them.
"""

from __future__ import annotations

import torch

from .architecture import Architecture, architecture


def is_fused_faster(operation: str, tokens: int, dtype: torch.dtype, device: torch.device) -> bool:
    """Whether ``"forward"``, ``"input_gradient"`` or ``"token_product"`` on so many tokens runs as one kernel."""
    chip = architecture(device)
    assert isinstance(chip, Architecture), chip
    return tokens <= chip.shapes(dtype.itemsize).fused_up_to[operation]
