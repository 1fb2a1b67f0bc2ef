"""Growth and the cost model: exponents of made-up data, formulas against what PyTorch is seen to do, the preset."""

from __future__ import annotations

import argparse
import json
import math
from pathlib import Path
from typing import Any

import jsonschema
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from rich.console import Console
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves
from torch.utils.flop_counter import FlopCounterMode

from benchmarks.distributed import cost_model
from benchmarks.harness.report import RESULTS
from benchmarks.harness.results import Case, Measurement, Results, document, read, write
from benchmarks.layers.layer_step import floor_step, step
from benchmarks.layers.memory import peak_temporary_bytes
from benchmarks.layers.methods import EagerDualLora, build, frozen_linear, trainable_parameters
from benchmarks.presets import scale as preset
from benchmarks.publish.studies import load
from benchmarks.scale import compare, cost, large_model, rates
from benchmarks.scale.exponents import exponent, exponents, larger_half
from benchmarks.scale.stacks import frozen_layers, stack_floor
from dual_lora_kernels import passes
from dual_lora_kernels.backends import Block, DenseBase, Estimator, Factors, ParameterGradients
from dual_lora_kernels.backends.eager import EagerBackend
from dual_lora_kernels.runtime_settings import current_settings

SCHEMA = json.loads((RESULTS / "schema.json").read_text(encoding="utf-8"))
PYTORCH = ("lora", "dora", "loha", "hira", "naive")
"""Methods whose every operation PyTorch's dispatcher sees."""

# Exponents ----------------------------------------------------------------------------------------------------------


@given(
    sizes=st.lists(st.integers(1, 10**6), min_size=2, max_size=8, unique=True),
    power=st.floats(-1, 3),
    noise=st.lists(st.floats(0.9, 1.1), min_size=1, max_size=7),
)
@settings(max_examples=30, deadline=None)
def test_an_exponent_is_recovered(sizes: list[int], power: float, noise: list[float]) -> None:
    """Exactly without noise; with as much at every size, the medians' noise is one factor, which no slope sees."""
    found = exponent({size: [1e-3 * size**power * each for each in noise] for size in sizes})
    assert found.value == pytest.approx(power, abs=1e-6)
    assert found.sizes == larger_half(sizes)
    # A draw's medians are within the noise: the slope's error is at most its logarithm over the narrowest spacing.
    spread = math.log(max(noise) / min(noise))
    spacing = min(math.log(b / a) for a, b in zip(found.sizes, found.sizes[1:], strict=False))
    assert power - 2 * spread / spacing - 1e-6 <= found.lower <= found.upper <= power + 2 * spread / spacing + 1e-6


def test_an_interval_is_as_wide_as_the_rounds_differ() -> None:
    steady = exponent({size: [size * each for each in (1.0, 1.01, 0.99, 1.0, 1.02)] for size in (1, 2, 4)})
    shaken = exponent({size: [size * each for each in (1.0, 1.4, 0.7, 1.0, 2.0)] for size in (1, 2, 4)})
    assert shaken.upper - shaken.lower > 10 * (steady.upper - steady.lower) > 0


@pytest.mark.parametrize(("sizes", "half"), [([4, 1, 2], (2, 4)), ([1, 2], (1, 2)), ([1, 2, 3, 4, 5], (3, 4, 5))])
def test_the_larger_half(sizes: list[int], half: tuple[int, ...]) -> None:
    assert larger_half(sizes) == half


def test_one_size_has_no_exponent() -> None:
    with pytest.raises(ValueError, match=r"sizes: got \[3\], expected two"):
        exponent({3: [1.0]})


def test_exponents_come_from_the_cases_of_their_axis() -> None:
    cases = [
        Case(
            {"axis": axis, "tokens": m, "out_features": 8, "in_features": 8, "rank": 4, "layers": layers}, "floor",
            {"floor": Measurement((1e-3 * m * layers**2,)), "lora": Measurement(left_out="not installed")},
        )
        for axis, m, layers in (("tokens", 8, 1), ("tokens", 64, 1), ("depth", 8, 1), ("depth", 8, 4))
    ]  # fmt: skip
    assert {axis: exponents(cases, axis) for axis in ("size", "rank")} == {"size": {}, "rank": {}}
    found = {axis: exponents(cases, axis) for axis in ("tokens", "depth")}
    assert {axis: set(of) for axis, of in found.items()} == {"tokens": {"floor"}, "depth": {"floor"}}
    assert found["tokens"]["floor"].value == pytest.approx(1)
    assert found["depth"]["floor"].value == pytest.approx(2)


# The cost model's formulas ------------------------------------------------------------------------------------------


class _Counter(TorchDispatchMode):
    """Numbers that operations other than products read and write, and how many operations there are."""

    def __init__(self) -> None:
        super().__init__()
        self.numbers = self.launches = 0

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        result = func(*args, **(kwargs or {}))
        name = func.overloadpacket.__name__
        if func.is_view or name.startswith(("mm", "empty", "new_empty", "detach", "_unsafe_view", "alias")):
            return result
        tensors = [each for each in tree_leaves((args, result)) if isinstance(each, torch.Tensor)]
        self.launches += bool(tensors)
        self.numbers += sum(each.numel() for each in tensors)
        return result


def _built(name: str, layer: cost.Layer) -> tuple[torch.nn.Module, torch.Tensor, torch.Tensor]:
    linear = frozen_linear(layer.in_features, layer.out_features, torch.float32)
    x = torch.randn(layer.tokens, layer.in_features, requires_grad=True)
    return build(name, linear, layer.rank, layer.rank), x, torch.randn(layer.tokens, layer.out_features)


LAYERS = st.builds(
    cost.Layer, tokens=st.integers(2, 40), out_features=st.integers(8, 48), in_features=st.integers(8, 48),
    rank=st.integers(1, 6),
)  # fmt: skip
"""Of one token PyTorch leaves sums over tokens out."""


@pytest.mark.parametrize("name", PYTORCH)
@given(layer=LAYERS)
@settings(max_examples=5, deadline=None)
def test_operations_of_products_are_those_that_pytorch_counts(name: str, layer: cost.Layer) -> None:
    module, x, grad = _built(name, layer)
    with FlopCounterMode(display=False) as first:
        y = module(x)
    with FlopCounterMode(display=False) as second:
        torch.autograd.grad(y, (x, *trainable_parameters(module)), grad)
    found = cost.passes(name, layer)
    assert first.get_total_flops() == found.forward.operations
    assert second.get_total_flops() == found.backward.operations


@pytest.mark.parametrize("name", PYTORCH)
@given(layer=LAYERS)
@settings(max_examples=5, deadline=None)
def test_numbers_and_launches_are_those_that_the_dispatcher_sees(name: str, layer: cost.Layer) -> None:
    module, x, grad = _built(name, layer)
    with _Counter() as first:
        y = module(x)
    with _Counter() as second:
        torch.autograd.grad(y, (x, *trainable_parameters(module)), grad)
    for seen, work in zip((first, second), cost.passes(name, layer), strict=True):
        assert seen.launches == work.launches
        # Left out: DoRA's vectors of N numbers, ten at most, and single numbers, five at most.
        vectors = 10 * layer.out_features if name == "dora" else 0
        assert 0 <= seen.numbers - work.numbers <= vectors + 5


@pytest.mark.parametrize("name", [*PYTORCH, "dual_lora_eager", "dual_lora"])
@given(layer=LAYERS)
@settings(max_examples=5, deadline=None)
def test_what_is_saved_for_backward_is_what_autograd_saves(name: str, layer: cost.Layer) -> None:
    module, x, _ = _built(name, layer)
    parameters = {parameter.untyped_storage().data_ptr() for parameter in module.parameters()}
    saved: dict[int, int] = {}

    def note(tensor: torch.Tensor) -> torch.Tensor:
        storage = tensor.untyped_storage()
        if storage.data_ptr() not in parameters:
            saved[storage.data_ptr()] = storage.nbytes() // 4
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(note, lambda tensor: tensor):
        y = module(x)
    assert y.requires_grad
    # Left out: DoRA's three vectors of N numbers, and single numbers such as scales.
    vectors = 3 * layer.out_features if name == "dora" else 0
    assert 0 <= sum(saved.values()) - cost.memory(name, layer).saved <= vectors + 2


def test_the_eager_backends_products_are_counted_too() -> None:
    """W is rebuilt for each of three passes. On whole tiles: those that a layer cuts are computed whole."""
    layer = cost.Layer(tokens=8, out_features=256, in_features=512, rank=4)
    x, grad = torch.randn(layer.tokens, layer.in_features), torch.randn(layer.tokens, layer.out_features)
    A, B = torch.randn(layer.rank, layer.in_features), torch.randn(layer.out_features, layer.rank)
    factors = Factors(A, B, A.clone(), B.clone(), torch.tensor(2.0))
    block = Block(DenseBase(torch.randn(layer.out_features, layer.in_features)), factors, "nearest", torch.float32)
    own, backend = current_settings(), EagerBackend()
    with FlopCounterMode(display=False) as first:
        passes.forward(x, block, None, backend, own)

    def addmm(added: Any, a: tuple[int, int], b: tuple[int, int], **others: Any) -> int:
        return 2 * a[0] * a[1] * b[1]

    in_place = {torch.ops.aten.addmm_: addmm}  # which PyTorch's counter does not know
    with FlopCounterMode(display=False, custom_mapping=in_place) as second:
        sums = ParameterGradients.zeros(factors, [True] * 4, torch.float32)
        passes.gradients(grad, x, True, block, Estimator("clip", 1.0), sums, backend, own)
    found = cost.passes("dual_lora_eager", layer)
    assert first.get_total_flops() == found.forward.operations
    assert second.get_total_flops() == found.backward.operations


def test_the_floor_is_three_products_and_dual_lora_has_no_others() -> None:
    layer = cost.Layer(tokens=6, out_features=10, in_features=14)
    x, grad, weight = torch.randn(6, 14), torch.randn(6, 10), torch.randn(10, 14)
    with FlopCounterMode(display=False) as counted:
        floor_step(weight, x, grad)()
    assert counted.get_total_flops() == cost.passes("floor", layer).step().operations == 3 * 2 * 6 * 10 * 14
    assert cost.passes("dual_lora", layer).step().operations == 3 * 2 * 6 * 10 * 14
    assert cost.passes("floor", layer).step(checkpointing=True).operations == 4 * 2 * 6 * 10 * 14


@pytest.mark.parametrize("name", ["dora", "loha", "hira", "naive"])
def test_temporary_memory_is_the_formulas(name: str) -> None:
    """On a layer whose weight is 64 times as large as what depends on tokens: that is what the 5 % are for."""
    layer = cost.Layer(tokens=4, out_features=256, in_features=256, rank=1)
    linear = frozen_linear(layer.in_features, layer.out_features, torch.float32)
    x, grad = torch.randn(4, 256, requires_grad=True), torch.randn(4, 256)
    run = step(build(name, linear, 1, 1), x, grad)
    run()
    assert peak_temporary_bytes(run).peak_temporary == pytest.approx(
        cost.memory(name, layer).bytes(layer, itemsize=4), rel=0.05
    )


def test_an_unknown_method_is_named() -> None:
    with pytest.raises(ValueError, match="method: got 'qlora', expected one of frozen, floor, lora"):
        cost.passes("qlora", cost.Layer(1, 1, 1))


# Seconds ------------------------------------------------------------------------------------------------------------


def test_seconds_add_up() -> None:
    own = cost.Rates(products=100.0, bytes=1000.0, new_bytes=500.0, generation=10.0, launch=0.5)
    large, small = cost.Product(10, 40, 10), cost.Product(1, 100, 1)
    work = cost.Work((large, small), sweeps=(cost.Sweep(5, 50),), launches=2, generation=30)
    # 8000 operations that take as long as 4.2 times as many, since 32 lines come on top of the shortest side's 10; 200
    # take as long as 6600; four launches. 201 numbers of 4 bytes take less, those of 400 longer.
    assert own.seconds(work, 4) == pytest.approx(336 + 66 + 1 + 3 + 2)
    assert own.seconds(cost.Work((small,)), 400) == pytest.approx(201 * 400 / 1000 + 0.5)
    assert own.moving([cost.Sweep(1, cost.KEPT // 4)], 4) == cost.KEPT / 1000
    assert own.moving([cost.Sweep(3, cost.KEPT // 4 + 1)], 4) == 3 * (cost.KEPT + 4) / 500


def test_rates_are_read_from_their_case() -> None:
    case = rates.measure("fp32", torch.device("cpu"), 1, Console(quiet=True))
    found = rates.rates(case)
    assert found.products == pytest.approx(3 * 2 * (512 + 32) * 2048**2 / case.subjects["product"].seconds[0])
    assert found.new_bytes == 2 * 4 * 4096**2 / case.subjects["new_copy"].seconds[0]
    assert found.bytes == 2 * 4 * 2048**2 / case.subjects["copy"].seconds[0]
    assert found.generation == 2048**2 * (4 * 16 + 4) / case.subjects["generate"].seconds[0]
    with pytest.raises(ValueError, match="case: got one of kind 'step', expected 'rates'"):
        rates.rates(Case({"kind": "step"}, "floor", {}))


RATES = cost.Rates(1e11, 1e10, 5e9, 5e10, 5e-6)
STEP = {"kind": "step", "dtype": "fp32", "tokens": 64, "out_features": 96, "in_features": 80, "rank": 4}
TRAIN = {"kind": "train", "dtype": "fp32", "model": "llama-h128", "layers": 2, "batch": 2, "sequence": 16, "rank": 4}


@pytest.mark.parametrize("at", [STEP, STEP | {"layers": 3, "axis": "depth"}, TRAIN])
def test_a_machine_that_is_as_the_model_says_is_predicted(at: dict[str, Any]) -> None:
    names = (*cost.PREDICTED, "dual_lora_half")
    blank = Case(at, "floor", {name: Measurement((1.0,)) for name in names})
    times = {name: compare.predicted_seconds(blank, name, RATES) for name in cost.PREDICTED} | {"dual_lora_half": 9.0}
    case = Case(at, "floor", {name: Measurement((time,)) for name, time in times.items()})
    found = list(compare.comparisons([case], RATES))
    assert [each.subject for each in found] == [name for name in cost.PREDICTED if name != "floor"]
    assert [each.error for each in found] == pytest.approx([1] * len(found))
    assert compare.typical_error(found) == pytest.approx(1)


@pytest.mark.parametrize(
    "change", [{"dtype": "bf16"}, {"base": "nf4"}, {"checkpointing": True}, {"kind": "decode"}, {"busy_processes": 2}]
)
def test_what_the_model_does_not_know_is_not_compared(change: dict[str, Any]) -> None:
    timed = {"floor": Measurement((1.0,)), "lora": Measurement((1.0,))}
    assert compare.comparable(Case(STEP, "floor", timed))
    assert not compare.comparable(Case(STEP | change, "floor", timed))
    assert not compare.comparable(Case(STEP, "floor", {"lora": Measurement((1.0,))}))
    with pytest.raises(ValueError, match="comparisons: got none"):
        compare.typical_error([])


def test_the_large_model_has_the_operations_of_the_other_cost_model() -> None:
    model, own = large_model.MODEL, cost_model.Settings(rank=32)
    for checkpointing, forwards in ((False, 1), (True, 2)):
        layers = model.layers * sum(
            cost.passes("lora", each).step(checkpointing).operations for each in large_model.layers()
        )
        expected, _ = cost_model.operations(model, 1, "LoRA", own, forwards)
        assert layers + compare.other_operations(model, own, forwards) == expected


def test_the_large_models_estimates_are_in_order() -> None:
    """Dual LoRA's memory is LoRA's and a workspace, less what NF4's LoRA dequantises; naive saves five weights."""
    document = load("step_model_h200")
    found = {each.method: each for each in large_model.estimates(document)}
    assert found["lora"].seconds < found["floor"].seconds < found["dual_lora"].seconds < found["naive"].seconds
    for layout, own in found["dual_lora"].gigabytes.items():
        assert own == pytest.approx(found["lora"].gigabytes[layout], abs=0.5)
        assert found["naive"].gigabytes[layout] > found["dora"].gigabytes[layout] > own + 1
    with pytest.raises(ValueError, match="predicted: got 'MI300X', expected 'H200'"):
        large_model.chip_rates(document | {"chip": {"name": "MI300X"}})


# The preset ---------------------------------------------------------------------------------------------------------


def test_a_stacks_floor_is_its_products() -> None:
    layers = frozen_layers(12, 3, torch.float64, torch.device("cpu"))
    x, grad = torch.randn(5, 12, dtype=torch.float64, requires_grad=True), torch.randn(5, 12, dtype=torch.float64)
    y, grad_x = stack_floor([layer.weight for layer in layers], x, grad)()
    expected = torch.nn.Sequential(*layers)(x)
    torch.testing.assert_close(y, expected.detach() - torch.nn.Sequential(*layers)(torch.zeros_like(x)).detach())
    torch.testing.assert_close(grad_x, torch.autograd.grad(expected, x, grad)[0])
    with FlopCounterMode(display=False) as counted:
        stack_floor([layer.weight for layer in layers], x, grad)()
    assert counted.get_total_flops() == 3 * cost.passes("floor", cost.Layer(5, 12, 12)).step().operations


def _as_json(results: Results) -> Any:
    return json.loads(json.dumps(document(results) | {"command": "a test"}))


def test_the_preset_measures_every_axis(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    points = (
        preset.Point("tokens", 16, 4, 2), preset.Point("size", 24, 4, 2), preset.Point("rank", 16, 4, 1),
        preset.Point("depth", 16, 4, 2, layers=2),
    )  # fmt: skip
    monkeypatch.setattr(preset, "QUICK", points)
    parser = argparse.ArgumentParser()
    preset.add(parser)
    options = parser.parse_args(["--device", "cpu"])
    options.quick, options.rounds = True, 1
    results = preset.run(options, Console(quiet=True))
    jsonschema.validate(_as_json(results), SCHEMA)
    kinds = [case.settings.get("axis", case.settings["kind"]) for case in results.cases]
    assert kinds == ["rates", "tokens", "size", "rank", "depth"]
    for case in results.cases[1:]:
        assert case.timed() == list(preset.SUBJECTS)
        for measured in case.subjects.values():
            assert bool(measured.checked) == (case.settings["layers"] == 1)
            assert all(error <= 2 for error in measured.checked.values())
    title, headings, cells = preset.table(results.cases[-1])
    assert "2 layers of 16²" in title
    assert {len(row) for row in cells} == {len(headings)}
    assert read(write(results, "scale", tmp_path)).cases[1].settings == results.cases[1].settings
    options.axis = ["rank"]
    assert len(preset.run(options, Console(quiet=True)).cases) == 2


@pytest.mark.parametrize("layers", [1, 2])
def test_a_subject_that_fails_leaves_the_others(layers: int, monkeypatch: pytest.MonkeyPatch) -> None:
    """A stack, which nothing checks, is run before it is timed too."""
    right = preset.step

    def failing(module: torch.nn.Module, x: torch.Tensor, grad: torch.Tensor) -> Any:
        def run() -> Any:
            raise MemoryError("no room\nfor it")

        return run if any(isinstance(each, EagerDualLora) for each in module.modules()) else right(module, x, grad)

    monkeypatch.setattr(preset, "step", failing)
    point = preset.Point("depth", 16, 4, 2, layers)
    case = preset._measure(point, "fp32", torch.device("cpu"), 1, Console(quiet=True))
    assert case.subjects["dual_lora_eager"].left_out == "MemoryError: no room"
    assert case.timed() == [name for name in preset.SUBJECTS if name != "dual_lora_eager"]
    assert ["dual_lora_kernels, eager", "MemoryError: no room", "–", "–", "–"] in preset.table(case)[2]


def test_without_its_floor_a_point_is_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    def failing(*_: object) -> Any:
        raise MemoryError("no room")

    monkeypatch.setattr(preset, "stack_floor", failing)
    with pytest.raises(RuntimeError, match=r"16², 4 tokens, .*: the floor MemoryError: no room"):
        preset._measure(preset.Point("size", 16, 4), "fp32", torch.device("cpu"), 1, Console(quiet=True))
