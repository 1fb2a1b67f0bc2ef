"""The guard that keeps fp32 products in fp32."""

from __future__ import annotations

import torch

from dual_lora_kernels.precision import ieee_matmul


def test_the_precision_guard_holds_until_its_last_thread_leaves() -> None:
    setting = torch.backends.mkldnn.matmul
    before = torch.get_float32_matmul_precision()
    torch.set_float32_matmul_precision("medium")
    try:
        assert setting.fp32_precision == "bf16"
        first, second = ieee_matmul("cpu"), ieee_matmul("cpu")
        first.__enter__()
        second.__enter__()
        first.__exit__(None, None, None)
        assert setting.fp32_precision == "ieee"
        second.__exit__(None, None, None)
        assert setting.fp32_precision == "bf16"
    finally:
        torch.set_float32_matmul_precision(before)


def test_the_precision_guard_gives_inherited_values_back() -> None:
    """Writing the parent's value into the child would pin it there."""
    child, parent = torch.backends.cuda.matmul, torch.backends
    before = child.fp32_precision, parent.fp32_precision
    child.fp32_precision, parent.fp32_precision = "none", "tf32"
    try:
        with ieee_matmul("cuda"):
            assert child.fp32_precision == "ieee"
        assert child.fp32_precision == "tf32"
        parent.fp32_precision = "ieee"
        assert child.fp32_precision == "ieee"
    finally:
        child.fp32_precision, parent.fp32_precision = before
