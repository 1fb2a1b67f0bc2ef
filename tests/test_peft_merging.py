"""Merging and unmerging through PEFT."""

from __future__ import annotations

import copy
import math
from typing import Any

import pytest
import torch
from peft import get_peft_model

from dual_lora_kernels.peft import DualLoraConfig, DualLoraLayer

from .models import gpt2, llama, logits
from .peft_models import SMALL, X, adapted, config, layers, net, weights


@pytest.mark.parametrize("make", [llama, gpt2])
def test_merge_and_unload(make: Any) -> None:
    torch.manual_seed(1)
    model = get_peft_model(make(), config()).eval()
    expected = logits(model)
    merged = model.merge_and_unload()
    assert type(merged) is type(make())
    assert not any(isinstance(module, DualLoraLayer) for module in merged.modules())
    torch.testing.assert_close(logits(merged), expected, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16], ids=str)
def test_merge_adapter_and_unmerge_adapter_are_exact(dtype: torch.dtype) -> None:
    model = adapted(dtype=dtype)
    before = weights(model)
    model.merge_adapter()
    assert all(not torch.equal(weight, before[name]) for name, weight in weights(model).items())
    model.unmerge_adapter()
    assert all(torch.equal(weight, before[name]) for name, weight in weights(model).items())


def test_unload_gives_the_base_model_back() -> None:
    model = adapted()
    assert torch.equal(logits(model.unload()), logits(llama()))


def test_merging_some_of_the_adapters() -> None:
    model = net()
    model.add_adapter("other", DualLoraConfig(target_modules=["first"], **SMALL))
    with_one = model(X)
    merged = copy.deepcopy(model).merge_and_unload(adapter_names=["default"])
    torch.testing.assert_close(merged(X), with_one)
    model.merge_adapter(["default"])
    with pytest.warns(UserWarning, match="additionally merging other"):
        model.merge_adapter(["other"])
    assert model.base_model.model.first.merged_adapters == ["default", "other"]


@pytest.mark.parametrize("safe", [False, True])
def test_an_adapter_that_is_not_finite_is_not_merged_anywhere(safe: bool) -> None:
    model = adapted()
    last = list(layers(model).values())[-1]
    with torch.no_grad():
        last.dual_adapter["default"].B[0, 0] = math.nan
    before = weights(model)
    for verb in (model.merge_adapter, model.merge_and_unload):
        with pytest.raises(ValueError, match=r"NaNs detected in the merged weights\. The adapter default seems"):
            verb(safe_merge=safe)
        assert all(torch.equal(weight, before[name]) for name, weight in weights(model).items())


def test_a_merged_model_cannot_train() -> None:
    model = net()
    model.merge_adapter()
    model(X)
    model.train()
    with pytest.raises(RuntimeError, match=r"merged, so it cannot train: call unmerge_adapter\(\)"):
        model(X)
