"""What an argument may be besides the obvious: NumPy's numbers are taken, tensors that are not dense are refused."""

from __future__ import annotations

import dataclasses
import io
import json
from collections.abc import Callable
from fractions import Fraction
from typing import Any

import numpy as np
import pytest
import torch

from dual_lora_kernels import (
    DualLoraConfig,
    DualLoraLinear,
    DualLoraWarmup,
    doctor,
    dual_lora_linear,
    dual_lora_parameter_groups,
    set_workspace_bytes,
)
from dual_lora_kernels.self_check.problems import Problem, gaussian

NUMBERS = [np.float32(0.5), np.float64(0.5), np.float16(0.5), np.int64(1), Fraction(1, 2), 1]


@pytest.fixture
def problem() -> Problem:
    return gaussian(3, 5, 4, 2, 3)


@pytest.mark.parametrize("number", NUMBERS, ids=lambda number: type(number).__name__)
def test_any_real_number_will_do(problem: Problem, number: Any) -> None:
    A, B, C, D, _ = problem.factors
    out = dual_lora_linear(problem.x, problem.weight, A, B, C, D, number, clip_bound=number)
    assert torch.equal(out, dual_lora_linear(problem.x, problem.weight, A, B, C, D, float(number)))
    layer = DualLoraLinear(4, 5, r1=np.int32(2), r2=np.int64(3), alpha=number, init_std=number, clip_bound=number)
    layer.set_scale(number)
    assert layer.scale.item() == float(number)
    layer(problem.x).sum().backward()
    assert DualLoraConfig(alpha=number, init_std=number).alpha == number


def test_no_numpy_number_is_kept() -> None:
    """JSON has none, and `torch.load` refuses them by default."""
    count, number = np.int64(2), np.float64(0.5)
    config = DualLoraConfig(r1=count, r2=count, alpha=number, dropout=number, init_std=number, clip_bound=number)
    kept = dataclasses.asdict(config)
    assert DualLoraConfig(**json.loads(json.dumps(kept))) == config
    layer = DualLoraLinear(count, count, alpha=number, init_std=number, clip_bound=number)
    assert {type(layer.in_features), type(layer.out_features)} == {int}
    warmup = DualLoraWarmup(layer, count)
    warmup.set_step(count)
    groups = dual_lora_parameter_groups(layer, number, direction_lr=np.float32(0.1), weight_decay=number)
    states = (warmup.state_dict(), torch.optim.AdamW(groups).state_dict())
    file = io.BytesIO()
    torch.save(states, file)
    file.seek(0)
    assert torch.load(file, weights_only=True) == states


def test_the_doctor_prints_numpys_workspace() -> None:
    set_workspace_bytes(np.int64(2**24))
    assert json.loads(json.dumps(dataclasses.asdict(doctor.examine())))["workspace_bytes"] == 2**24


@pytest.mark.parametrize("option", ["alpha", "init_std", "dropout", "clip_bound"])
@pytest.mark.parametrize("value", [True, np.bool_(True), "1", 1j, np.complex64(1), None])
def test_what_is_no_real_number_is_refused(option: str, value: Any) -> None:
    with pytest.raises(TypeError, match=rf"^{option}: got .*expected a number"):
        DualLoraLinear(4, 5, **{option: value})


BEYOND: list[tuple[str, dict[str, Any]]] = [
    ("alpha", {"alpha": 1e39, "r1": 1, "r2": 1}),
    ("alpha", {"alpha": 10**400}),
    ("alpha", {"alpha": np.float64(1e300)}),
    ("alpha", {"alpha": Fraction(10**400)}),
    ("init_std", {"init_std": 1e39}),
    ("r1", {"r1": 10**400}),
    ("r2", {"r2": 2**31}),
    ("clip_bound", {"clip_bound": 10**400}),
]


@pytest.mark.parametrize(("name", "options"), BEYOND)
def test_numbers_beyond_their_range_are_refused(name: str, options: dict[str, Any]) -> None:
    for make in (lambda: DualLoraLinear(4, 5, **options), lambda: DualLoraConfig(**options)):
        with pytest.raises(ValueError, match=rf"^{name}: got .{{1,60}}, expected "):
            make()


@pytest.mark.parametrize("value", [1e39, -1e39, 10**400, float("nan")])
def test_a_scale_beyond_fp32_is_refused(value: float) -> None:
    layer = DualLoraLinear(4, 5)
    before = layer.scale.clone()
    with pytest.raises(ValueError, match=r"^scale: got .{1,60}, expected a finite number in \[-1.7"):
        layer.set_scale(value)
    assert torch.equal(layer.scale, before)


KINDS: dict[str, Callable[[torch.Tensor], torch.Tensor]] = {
    "sparse_coo": lambda tensor: tensor.to_sparse(),
    "sparse_csr": lambda tensor: tensor.to_sparse_csr(),
    "nested": lambda tensor: torch.nested.nested_tensor([tensor, tensor[:1]]),
    "nested jagged": lambda tensor: torch.nested.nested_tensor([tensor, tensor[:1]], layout=torch.jagged),
    "_mkldnn": lambda tensor: tensor.to_mkldnn(),
}


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("argument", ["input", "weight", "A", "B", "C", "D"])
@pytest.mark.filterwarnings("ignore:.*prototype", "ignore:.*beta state")
def test_tensors_that_are_not_dense_are_refused(problem: Problem, argument: str, kind: str) -> None:
    call = {"input": problem.x, "weight": problem.weight} | problem.factors._asdict()
    call[argument] = KINDS[kind](call[argument])
    with pytest.raises(TypeError, match=rf"^{argument}: got a {kind.split()[0]} tensor, expected a dense one"):
        dual_lora_linear(**call)


def test_a_quantised_tensor_is_refused(problem: Problem) -> None:
    quantised = torch.quantize_per_tensor(problem.x, 0.1, 0, torch.qint8)
    with pytest.raises(TypeError, match=r"^input\.dtype: got torch\.qint8"):
        dual_lora_linear(quantised, problem.weight, *problem.factors)


def test_a_lazy_parameter_is_refused(problem: Problem) -> None:
    lazy = torch.nn.LazyLinear(5).weight
    with pytest.raises(TypeError, match=r"^weight: got an uninitialised UninitializedParameter"):
        dual_lora_linear(problem.x, lazy, *problem.factors)


def test_a_sparse_scale_is_refused(problem: Problem) -> None:
    A, B, C, D, scale = problem.factors
    with pytest.raises(TypeError, match=r"^scale: got a sparse_coo tensor, expected a dense one"):
        dual_lora_linear(problem.x, problem.weight, A, B, C, D, scale.to_sparse())


@pytest.mark.parametrize("merged", [False, True])
@pytest.mark.parametrize("dropout", [0.0, 0.5])
@pytest.mark.parametrize("kind", [*KINDS, "list"])
@pytest.mark.filterwarnings("ignore:.*prototype", "ignore:.*beta state")
def test_a_layer_refuses_the_same_inputs_in_every_state(kind: str, dropout: float, merged: bool) -> None:
    layer = DualLoraLinear(4, 5, dropout=dropout)
    if merged:
        layer.eval().merge()
    x = [[1.0] * 4] if kind == "list" else KINDS[kind](torch.ones(3, 4))
    with pytest.raises(TypeError, match=r"^input: got .* expected a (dense one|tensor)"):
        layer(x)
