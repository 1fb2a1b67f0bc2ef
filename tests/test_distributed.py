"""Training on several processes computes what one process does."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from torch.distributed.tensor import Replicate, Shard

from . import distributed_cases as cases
from . import distributed_layers as layers
from .models import llama
from .processes import Processes

ROUNDINGS = 32
"""Roundings of the dtype in a gradient that another order of additions may make; 14 were seen. A missing sum over four
processes makes errors of 0.81 to 0.91, which are a hundred of bfloat16's."""
DTYPES = [torch.float32, torch.bfloat16]


def _bound(dtype: torch.dtype) -> float:
    return ROUNDINGS * torch.finfo(dtype).eps


def _check_training(result: dict[str, Any], dtype: torch.dtype) -> None:
    assert result["loss"] <= 4 * torch.finfo(dtype).eps
    assert result["gradients"] <= _bound(dtype)
    # A free run of 20 steps may take another way where a last bit turns a sign; one without sums ends 0.1 apart.
    assert max(abs(a - b) for a, b in zip(result["losses"], result["expected"], strict=True)) <= 0.05


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("layout", cases.LAYOUTS)
def test_training_on_two(two: Processes, layout: str, dtype: torch.dtype) -> None:
    for result in two.run(cases.train, layout, dtype, 20, {}):
        _check_training(result, dtype)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("layout", ["ddp", "fsdp", "fsdp tp"])
def test_training_on_four(four: Processes, layout: str, dtype: torch.dtype) -> None:
    for result in four.run(cases.train, layout, dtype, 20, {}):
        _check_training(result, dtype)


TIGHT = 1e-4
"""A bound of clipping that many entries reach; in the gradient of half a batch others than in the whole one's."""


@pytest.mark.parametrize(
    ("layout", "ste", "is_exact"),
    [
        ("ddp", "clip", False),
        ("fsdp", "clip", False),
        ("tp", "clip", True),
        ("ddp", "dorefa", True),
        ("fsdp", "xnor", True),
    ],
)
def test_what_clipping_means_for_data_parallel_runs(two: Processes, layout: str, ste: str, is_exact: bool) -> None:
    """Each process clips its own gradient; tensor parallelism clips the whole, and the other estimators are linear."""
    for result in two.run(cases.train, layout, torch.float32, 2, {"ste": ste, "clip_bound": TIGHT}):
        assert (result["gradients"] <= _bound(torch.float32)) == is_exact, result["gradients"]


def test_the_older_fsdp_trains_and_saves_nothing_in_parts(two: Processes, tmp_path: Path) -> None:
    for result in two.run(cases.train_by_the_older_fsdp, tmp_path / "adapter"):
        assert result["losses"] == pytest.approx(result["expected"], rel=2e-6)
        assert all("FSDP1 keep it in parts" in said for said in result["said"]), result["said"]
    assert not (tmp_path / "adapter").exists()


def test_fsdp_mixed_precision(two: Processes) -> None:
    assert max(two.run(cases.train_in_mixed_precision)) <= _bound(torch.bfloat16)


@pytest.mark.parametrize("dtype", [*DTYPES, torch.float16])
@pytest.mark.parametrize("style", layers.STYLES)
def test_a_split_layers_weight_has_the_whole_ones_bits(four: Processes, style: str, dtype: torch.dtype) -> None:
    four.run(layers.weight_bits, style, dtype)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("layout", cases.LAYOUTS)
def test_every_part_of_a_weight_has_the_whole_ones_bits(two: Processes, layout: str, dtype: torch.dtype) -> None:
    two.run(layers.bits_of_every_part, layout, dtype)


@pytest.mark.parametrize("layout", ["fsdp", "fsdp tp"])
def test_every_quarter_of_a_weight_has_the_whole_ones_bits(four: Processes, layout: str) -> None:
    four.run(layers.bits_of_every_part, layout, torch.bfloat16)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize(
    ("style", "options"),
    [
        ("colwise", {}),
        ("colwise", {"output_layouts": Replicate()}),
        ("rowwise", {}),
        ("rowwise", {"output_layouts": Shard(1)}),
    ],
)
def test_a_split_layers_gradients(four: Processes, style: str, options: dict[str, Any], dtype: torch.dtype) -> None:
    for errors in four.run(layers.gradients, style, dtype, options):
        assert max(errors.values()) <= _bound(dtype), errors


@pytest.mark.parametrize("style", layers.STYLES)
def test_a_split_layers_sample_is_the_same_in_all_processes(four: Processes, style: str) -> None:
    for errors in four.run(layers.sampled, style):
        assert max(errors.values()) <= _bound(torch.float32), errors


@pytest.mark.parametrize(("style", "replicated"), [("colwise", "AC"), ("rowwise", "BD")])
def test_a_missing_sum_is_noticed(four: Processes, style: str, replicated: str) -> None:
    """The check above fails where the gradients of replicated factors stay partial sums."""
    for errors in four.run(layers.gradients_without_a_sum, style):
        for name in "ABCD":
            assert (errors[name] > _bound(torch.bfloat16)) == (name in replicated), errors


def test_one_sum_serves_both_groups(two: Processes) -> None:
    for counts in two.run(layers.collectives):
        assert counts == {"colwise": 1, "rowwise": 1}


MESSAGES = {
    "divides": "ValueError: mesh: got 2 processes, expected a number that divides up's out_features, 41",
    "divides by style": "ValueError: mesh: got 2 processes, expected a number that divides the layer's in_features, 41",
    "dimensions": "ValueError: mesh: got 2 dimensions, expected one, of tensor parallelism",
    "no plan": "ValueError: plan: got none, and the model brings none",
    "no such name": "ValueError: plan: got 'side', which matches no module of Model",
    "no style": "TypeError: plan['up']: got 'diagonal', expected a ParallelStyle, 'colwise' or 'rowwise'",
    "not adapted": "TypeError: plan: got DualLoraColwiseParallel for plain, a Linear without adapter",
    "not adapted, by style": "TypeError: module: got Linear, expected an adapted linear layer",
    "twice": "TypeError: plan: got DualLoraRowwiseParallel for up: it has been sharded already",
    "no mesh": "TypeError: mesh: got 2, expected a DeviceMesh",
    "a list": "TypeError: plan: got list, expected styles by module names",
    "an activation": "TypeError: plan: got ColwiseParallel for 1, a GELU, expected it for linear layers and embeddings",
    "heads": "ValueError: mesh: got 2 processes, expected a number that divides num_key_value_heads, 3",
    "tp after fully_shard": "ValueError: model: got a model in the hands of fully_shard",
    "by keyword": "TypeError: input: got it by keyword, expected it as the first argument",
    "whole input": "ValueError: input: got shape (2, 40), expected [..., 20], a 2th of in_features = 40",
    "part of an input": "ValueError: input: got shape (2, 6), expected [..., 24]",
    "prepare": "RuntimeError: weight is sharded (Shard(dim=0) over tp), so no copy can be kept",
    "merge": "ValueError: model: got up with a sharded weight (Shard(dim=0) over",
    "after DDP": "ValueError: model: got a model in the hands of DistributedDataParallel",
    "after fully_shard": "ValueError: model: got a model in the hands of fully_shard",
    "after parallelize_module": "weight is sharded (Shard(dim=0) over tp); adapt the model before parallelize_module",
    "outside": "ValueError: factors: got A as Shard(dim=0) over",
}


def test_what_cannot_be_is_refused(two: Processes) -> None:
    for messages in two.run(layers.refusals):
        for case, message in MESSAGES.items():
            assert message in messages[case], f"{case}: {messages[case]}"


PEFT_SAYS = {
    "mixed batch": "adapter_names: got some for a layer of tensor parallelism",
    "unload": "model: got a layer that parallelize_dual_lora has split",
    "after DDP": "model: got a model in the hands of DistributedDataParallel",
}


def test_pefts_verbs_under_tensor_parallelism(two: Processes) -> None:
    for result in two.run(layers.verbs_of_peft):
        assert max(result["errors"].values()) <= _bound(torch.float32), result["errors"]
        for case, message in PEFT_SAYS.items():
            assert message in result["said"][case], result["said"][case]


def test_a_layer_that_was_sharded_while_merged_gets_its_weight_back(two: Processes) -> None:
    two.run(layers.merged_then_sharded)


def test_factors_are_one_draw_in_uneven_parts(four: Processes) -> None:
    four.run(layers.reset_uneven)


@pytest.fixture(scope="module")
def saved_model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("base")
    llama().save_pretrained(folder)
    return folder


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("door", ["own", "peft"])
def test_transformers_tensor_parallelism(two: Processes, saved_model: Path, door: str, dtype: torch.dtype) -> None:
    for errors in two.run(layers.transformers_plan, saved_model, door, dtype):
        assert max(errors.values()) <= _bound(dtype), errors
