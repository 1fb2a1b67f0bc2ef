"""Verifying a merged checkpoint finds what is wrong, and admits what another order of sums gives."""

from __future__ import annotations

import shutil
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file

from dual_lora_kernels import merge_checkpoint
from dual_lora_kernels.backends import Factors
from dual_lora_kernels.checkpoint_merge import merge, plan, shards, verify

from .merged_checkpoints import refused, save_adapter, save_base, save_inputs
from .models import llama

LAYER = "model.layers.0.self_attn.q_proj"


@pytest.fixture
def here(tmp_path: Path) -> Path:
    return save_inputs(tmp_path / "here")


@pytest.mark.parametrize("bit", [0, 6, 14])
@pytest.mark.parametrize("name", [f"{LAYER}.weight", "model.norm.weight"])
def test_verifying_finds_a_single_other_bit(name: str, bit: int, here: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A bit that turns between writing and verifying, of a merged weight and of a copied one."""
    write = merge.write_shard

    def damaging(path: Path, outputs: Any, *rest: Any) -> None:
        write(path, outputs, *rest)
        if name in outputs:
            state = load_file(path)
            state[name].view(torch.int16).view(-1)[7] ^= 1 << bit
            save_file(state, path, {"format": "pt"})

    monkeypatch.setattr(merge, "write_shard", damaging)
    message = r"no order of summation explains that" if "proj" in name else "does not have the base's bytes"
    refused(here, ValueError, rf"{name} in .*{message}", verify=True)


def test_verifying_admits_what_sums_in_another_order_give(here: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Columns of the factors in another order are the same sums, with other last bits: in fp32, many weights differ."""
    shutil.rmtree(here / "base")
    save_base(llama(), here / "base")
    shutil.rmtree(here / "adapter")
    save_adapter(here / "base", here / "adapter", r1=16, r2=16)
    read = verify.FactorCache.__getitem__

    def shuffled(cache: Any, update: Any) -> shards.Read:
        (A, B, C, D, scale), largest = read(cache, update)
        order = torch.arange(16).flip(0)
        return shards.Read(Factors(A[order], B[:, order], C[order], D[:, order], scale), largest)

    class Shuffled(verify.FactorCache):
        __getitem__ = shuffled

    monkeypatch.setattr(verify, "FactorCache", Shuffled)
    summary = merge_checkpoint(here / "base", here / "adapter", here / "out", verify=True)
    assert summary.verification is not None
    assert summary.verification.other_bits > summary.verification.weights // 100


def test_verifying_finds_another_rounding(here: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    write = merge.write_shard

    def to_nearest(*arguments: Any) -> None:
        with monkeypatch.context() as patch:
            patch.setattr(plan.Update, "rounding", "nearest")
            write(*arguments)

    monkeypatch.setattr(merge, "write_shard", to_nearest)
    refused(here, ValueError, "no order of summation explains that", verify=True)
