"""Which chips the Triton backend knows, the tile shapes of their families, and its reasons where it does not run."""

from __future__ import annotations

import dataclasses
from types import SimpleNamespace

import pytest
import torch

from dual_lora_kernels import available_backends
from dual_lora_kernels.backends import resolve_backend
from dual_lora_kernels.backends.triton.architecture import Architecture, _gpu_architecture
from dual_lora_kernels.backends.triton.shapes import TABLE


def _resolve(device: str) -> None:
    resolve_backend("triton", torch.device(device), torch.float32, torch.float32)


def test_triton_on_a_cpu_says_why_not() -> None:
    assert "triton" in available_backends()
    with pytest.raises(ValueError, match="in its interpreter only"):
        _resolve("cpu")


def test_triton_on_an_unknown_device_says_why_not() -> None:
    with pytest.raises(ValueError, match="no kernels for device type 'mps'"):
        _resolve("mps")


@pytest.mark.parametrize("rocm", [False, True])
def test_an_unknown_chip_is_named_with_those_that_are_known(rocm: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    chip = SimpleNamespace(name="Old", gcnArchName="gfx906:sramecc+", major=7, minor=0, multi_processor_count=80)
    monkeypatch.setattr(torch.cuda, "get_device_properties", lambda _: chip)
    monkeypatch.setattr(torch.version, "hip", "6.0" if rocm else None)
    reason = _gpu_architecture.__wrapped__(0)
    assert isinstance(reason, str)
    assert ("gfx906" in reason and "gfx942" in reason) if rocm else ("7.0" in reason and "9.0" in reason)


@pytest.mark.parametrize(
    ("rocm", "name", "family"), [(None, (8, 6), "sm_89"), (None, (9, 0), "sm_90"), ("6.4", "gfx942:xnack-", "gfx942")]
)
def test_chips_use_their_familys_shapes(
    rocm: str | None, name: tuple[int, int] | str, family: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    major, minor = name if isinstance(name, tuple) else (9, 4)
    chip = SimpleNamespace(name="Chip", gcnArchName=name, major=major, minor=minor, multi_processor_count=80)
    monkeypatch.setattr(torch.cuda, "get_device_properties", lambda _: chip)
    monkeypatch.setattr(torch.version, "hip", rocm)
    assert _gpu_architecture.__wrapped__(0) == Architecture(family, 80)


@pytest.mark.parametrize("rank", [0, 8, 24, 64])
def test_a_table_with_a_fused_rank_that_is_no_block_is_refused(rank: int) -> None:
    """`token_product` takes its ranks as one block: beyond the largest it would leave some out, unnoticed."""
    with pytest.raises(ValueError, match=f"^fused_rank: got {rank}, expected 16 or 32"):
        dataclasses.replace(TABLE["sm_90"], fused_rank=rank)
