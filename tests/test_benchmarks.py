"""The benchmark suite: what its tables say about rounding, and that every part measures what it claims to."""

from __future__ import annotations

import json
from collections.abc import Iterator
from pathlib import Path

import pytest
import torch

from benchmarks.harness import timing
from benchmarks.layers import dither_field, dither_table, gradient_operands, layer_step, methods
from benchmarks.layers.memory import AllocationTrace, peak_temporary_bytes, replay
from benchmarks.training import doors, merge_drift
from dual_lora_kernels import set_workspace_bytes

# By an implementation of its own, before this one was written; docs/numerics.md, "Rounding", explains the columns.
MEASURED = {  # rms of ΔW → gain (nearest, two products), SNR in dB (two products, dithered)
    1e-3: (1.000, 1.000, 35.4, 35.4),
    1e-4: (0.974, 1.000, 15.5, 15.5),
    3e-5: (0.740, 0.979, 5.3, 5.6),
    1e-5: (0.330, 0.673, -2.8, -2.9),
    3e-6: (0.108, 0.252, -12.1, -12.4),
}
GAIN_TOLERANCE = 0.012
"""Other random numbers and fewer tokens: twice the largest difference seen over seeds."""
SNR_TOLERANCE = 0.4
"""In dB, likewise."""


@pytest.fixture(scope="module")
def dither_rows() -> dict[float, dither_table.Row]:
    return {row.rms: row for row in dither_table.rows()}


@pytest.mark.parametrize("rms", MEASURED)
def test_dithered_rounding_lets_the_whole_update_arrive(dither_rows: dict[float, dither_table.Row], rms: float) -> None:
    assert dither_rows[rms].ways["dithered"].gain == pytest.approx(1.0, abs=0.02)


@pytest.mark.parametrize("rms", MEASURED)
def test_the_other_ways_lose_what_the_design_measured(dither_rows: dict[float, dither_table.Row], rms: float) -> None:
    nearest, two_products, snr_two_products, snr_dithered = MEASURED[rms]
    ways = dither_rows[rms].ways
    assert ways["nearest"].gain == pytest.approx(nearest, abs=GAIN_TOLERANCE)
    assert ways["two_products"].gain == pytest.approx(two_products, abs=GAIN_TOLERANCE)
    assert ways["two_products"].snr == pytest.approx(snr_two_products, abs=SNR_TOLERANCE)
    assert ways["dithered"].snr == pytest.approx(snr_dithered, abs=SNR_TOLERANCE)


def test_the_dither_field_is_like_independent_noise() -> None:
    size = 1024
    found = dither_field.statistics(size)
    # Five standard errors of an independent uniform field of this size.
    assert found.mean == pytest.approx(0.5, abs=5 / 12**0.5 / size)
    assert found.variance_times_12 == pytest.approx(1.0, abs=5 * 0.8**0.5 / size)
    assert found.largest_correlation < 5 / size
    assert found.singular_value_ratio == pytest.approx(1.0, abs=0.02)
    assert list(found.carry_singular_value_ratios.values()) == pytest.approx(
        [1.0] * len(dither_field.CARRY_FRACTIONS), abs=0.02
    )


@pytest.fixture
def scratch_operator() -> Iterator[torch._ops.OpOverload]:
    """x → x + 1 by way of a 1 MiB tensor, in forward and in backward, inside ``torch.library`` operators."""
    library = torch.library.Library("benchmark_test", "DEF")
    library.define("scratch(Tensor x) -> Tensor")

    def scratch(x: torch.Tensor) -> torch.Tensor:
        scratch = torch.empty(2**20, dtype=torch.uint8)
        return x + 1 + 0 * scratch.fill_(1)[0]

    operator = torch.ops.benchmark_test.scratch.default
    library.impl("scratch", scratch, "CompositeExplicitAutograd")
    torch.library.register_autograd("benchmark_test::scratch", lambda _, grad: operator(grad) - 1, lib=library)
    yield operator
    library._destroy()


def test_the_memory_trace_sees_inside_custom_operators_and_backward(scratch_operator: torch._ops.OpOverload) -> None:
    x = torch.zeros(4, requires_grad=True)
    forward = peak_temporary_bytes(lambda: scratch_operator(x.detach()))
    assert forward.largest == 2**20
    assert 2**20 <= forward.peak_temporary < 2**20 + 1024
    y = scratch_operator(x).sum()
    assert peak_temporary_bytes(lambda: torch.autograd.grad(y, x)).largest == 2**20


def test_the_memory_trace_tells_results_from_temporaries() -> None:
    def function() -> torch.Tensor:
        result = torch.empty(3 * 2**20, dtype=torch.uint8)
        for _ in range(2):
            torch.empty(2**20, dtype=torch.uint8).fill_(0)
        return result

    trace = peak_temporary_bytes(function)
    assert (trace.peak, trace.peak_temporary, trace.largest) == (4 * 2**20, 2**20, 3 * 2**20)


def test_a_replay_ignores_memory_from_before_the_start() -> None:
    events = [(1, 10), (9, -1000), (2, 20), (1, -10), (1, 5), (2, -20)]  # address 1 is used twice, 9 was there before
    assert replay(events) == AllocationTrace(peak=30, peak_temporary=30, largest=20)
    assert replay([]) == AllocationTrace(0, 0, 0)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("name", methods.METHODS)
def test_methods_share_the_weight_and_train_equally_many_parameters(name: str, dtype: torch.dtype) -> None:
    linear = methods.frozen_linear(48, 40, dtype)
    module = methods.build(name, linear, r1=4, r2=4)
    assert any(parameter.data_ptr() == linear.weight.data_ptr() for parameter in module.parameters())
    assert not linear.weight.requires_grad
    equal = (4 + 4) * (48 + 40)
    expected = {"frozen": 0, "full": 48 * 40, "dora": equal + 40}.get(name, equal)
    trainable = methods.trainable_parameters(module)
    assert sum(parameter.numel() for parameter in trainable) == expected
    x = torch.randn(5, 48, dtype=dtype, requires_grad=True)
    y, grad_x, *grads = layer_step.step(module, x, torch.ones(5, 40, dtype=dtype))()
    assert (y.shape, y.dtype, grad_x.shape) == ((5, 40), dtype, x.shape)
    assert [grad.shape for grad in grads] == [parameter.shape for parameter in trainable]
    assert all(parameter.grad is None for parameter in trainable)


def test_an_unknown_method_is_named() -> None:
    with pytest.raises(ValueError, match="method: got 'qlora', expected one of frozen, "):
        methods.build("qlora", methods.frozen_linear(8, 8, torch.float32))


def test_rounds_are_interleaved_and_rotate() -> None:
    calls: list[str] = []
    candidates = {name: (lambda name=name: calls.append(name)) for name in "abc"}
    seconds = timing.interleaved(candidates, rounds=3, warmup=1, device=torch.device("cpu"))
    assert "".join(calls) == "cab" + "abc" + "bca" + "cab"
    assert {name: len(times) for name, times in seconds.items()} == {"a": 3, "b": 3, "c": 3}


def test_ratios_compare_within_a_round() -> None:
    seconds = {"floor": [1.0, 10.0, 2.0], "own": [2.0, 20.0, 4.0]}  # the second round was ten times slower
    assert timing.ratios(seconds, "own", "floor") == timing.Quartiles(2.0, 2.0, 2.0)
    assert timing.quartiles([3.0]) == timing.Quartiles(3.0, 3.0, 3.0)


def test_dual_lora_never_allocates_the_weight() -> None:
    """Memory of a whole step under a small workspace: naive needs several times the weight, the package the bound."""
    size, tokens, workspace = 1024, 8, 512 * 1024
    set_workspace_bytes(workspace)
    linear = methods.frozen_linear(size, size, torch.float32)
    x, grad = torch.randn(tokens, size, requires_grad=True), torch.randn(tokens, size)
    traces = {}
    for name in ("dual_lora", "naive"):
        step = layer_step.step(methods.build(name, linear), x, grad)
        step()
        traces[name] = peak_temporary_bytes(step)
    weight_bytes = linear.weight.nbytes
    assert traces["naive"].peak_temporary > 3 * weight_bytes
    assert traces["dual_lora"].largest < workspace < weight_bytes // 4
    # Beside the workspace: the forward's output, the token-sized tensors of the step, and packed copies of the factors.
    factor_bytes = 4 * 16 * size * 4
    assert traces["dual_lora"].peak_temporary < workspace + 4 * x.nbytes + factor_bytes


def test_operands_of_the_gradients_products_err_by_their_precision(tmp_path: Path) -> None:
    """FP8's three mantissa bits cost more than bf16's seven, and two of them more still."""
    gradient_operands.main(["--rows", "64", "--columns", "96", "--tokens", "128", "--out", str(tmp_path)])
    document = json.loads((tmp_path / "gradient_operands.json").read_text(encoding="utf-8"))
    for errors in document["relative_errors"].values():
        fp32, bf16, _, e4m3, e5m2, _ = errors.values()
        for index in range(4):
            assert fp32[index] < 2.0**-8
            assert bf16[index] < e4m3[index] < e5m2[index]


def test_merging_changes_what_lora_trained_and_not_what_dual_lora_trained(tmp_path: Path) -> None:
    merge_drift.main(["--families", "LLaMA-2", "Mixtral", "--out", str(tmp_path)])
    results = json.loads((tmp_path / "merge_drift.json").read_text())["results"]
    for by_method in results.values():
        ours = by_method["Dual LoRA"]
        assert ours["other_weights"] == 0
        assert 0.9 < ours["kept"] < 1.1
        for name in ("LoRA", "DoRA"):
            assert by_method[name]["kept"] < 0.85


def test_doors_end_to_end(tmp_path: Path) -> None:
    doors.main(["--hidden", "64", "--layers", "1", "--rounds", "2", "--out", str(tmp_path)])
    seconds = json.loads((tmp_path / "cpu_doors.json").read_text())["seconds"]
    assert set(seconds["training"]) == {"LoRA (PEFT)", "plain door", "PEFT's door"}
    assert "a generated token" in (tmp_path / "cpu_doors.md").read_text()
