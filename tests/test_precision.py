"""The guard that keeps fp32 products in fp32."""

from __future__ import annotations

import pytest
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


@pytest.mark.parametrize("setting", ["highest", "high", "medium"])
@pytest.mark.parametrize("device_type", ["cpu", "cuda"])
def test_both_forms_of_the_setting_can_be_read_inside_and_are_back_afterwards(setting: str, device_type: str) -> None:
    """PyTorch 2.13 raises where the old and the new form disagree, in whatever reads them: its compiler, cuBLAS."""

    def forms() -> tuple[object, ...]:
        cuda, cpu = torch.backends.cuda.matmul, torch.backends.mkldnn.matmul
        return torch.get_float32_matmul_precision(), cuda.allow_tf32, cuda.fp32_precision, cpu.fp32_precision

    before = torch.get_float32_matmul_precision()
    torch.set_float32_matmul_precision(setting)
    try:
        outside = forms()
        with ieee_matmul(device_type):
            assert forms() == ("highest", False, "ieee", "ieee")
        assert forms() == outside
    finally:
        torch.set_float32_matmul_precision(before)
