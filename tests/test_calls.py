"""Direct calls and calls through the operators compute the same; remembered checks hide no error."""

from __future__ import annotations

import threading
from itertools import pairwise

import pytest
import torch

from dual_lora_kernels import dual_lora_linear, functional, products, reference, settings
from dual_lora_kernels.backends import workers
from dual_lora_kernels.self_check.problems import Problem, autograd_gradients, gaussian, naive_gradients

from .accuracy import ErrorRatios
from .bits import bits

DTYPES = [torch.float32, torch.bfloat16, torch.float16]
NAMES = reference.Gradients._fields
SHAPES = [(1, 40, 30), (130, 40, 30), (70, 300, 520)]


def _run(problem: Problem, **options: object) -> list[torch.Tensor]:
    """(output, *gradients) of `dual_lora_linear`."""
    leaf = problem.requiring_grad()
    out = dual_lora_linear(leaf.x, leaf.weight, *leaf.factors, leaf.bias, **options)
    return [out.detach(), *torch.autograd.grad(out, leaf.differentiable, leaf.grad)]


@pytest.mark.parametrize("shape", SHAPES, ids=str)
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_operators_and_direct_calls_compute_the_same_bits(
    device: torch.device, backend: str, dtype: torch.dtype, shape: tuple[int, int, int], monkeypatch: pytest.MonkeyPatch
) -> None:
    problem = gaussian(*shape, 4, 4, dtype=dtype, device=device)
    direct = _run(problem, backend=backend)
    monkeypatch.setattr(functional, "_is_observed", lambda: True)
    for value, through_operators in zip(direct, _run(problem, backend=backend), strict=True):
        assert torch.equal(bits(value), bits(through_operators))


def test_the_whole_weight_as_one_panel_computes_what_panels_do(device: torch.device, backend: str) -> None:
    problem = gaussian(70, 300, 520, 4, 4, dtype=torch.float64, device=device)
    whole = _run(problem, backend=backend)
    with settings(workspace_bytes=1 << 16):
        for value, by_panels in zip(whole, _run(problem, backend=backend), strict=True):
            torch.testing.assert_close(value, by_panels, rtol=1e-12, atol=1e-12)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"C": torch.zeros(4, 30, dtype=torch.float64)}, "C.dtype"),
        ({"A": torch.zeros(5, 30)}, "B: got shape"),
        ({"input": torch.zeros(2, 31)}, "input: got shape"),
        ({"bias": torch.zeros(41)}, "bias: got shape"),
        ({"scale": float("nan")}, "scale: got nan"),
        ({"scale": torch.zeros(1)}, "scale: got a tensor of shape"),
        ({"scale": torch.tensor(1.0, requires_grad=True)}, "requires grad"),
        ({"scale": torch.tensor(float("inf"))}, "scale: got inf"),
        ({"clip_bound": True}, "clip_bound: got True"),
        ({"clip_bound": -1.0}, "clip_bound"),
        ({"ste": ["clip"]}, "ste: got"),
        ({"rounding": "up"}, "rounding: got 'up'"),
        ({"backend": "cuda"}, "backend: got 'cuda'"),
    ],
    ids=str,
)
def test_what_was_checked_before_hides_no_error(change: dict[str, object], message: str) -> None:
    problem = gaussian(2, 40, 30, 4, 4)
    factors = dict(zip(("A", "B", "C", "D", "scale"), problem.factors, strict=True))
    given = {"input": problem.x, "weight": problem.weight, **factors, "bias": problem.bias, "clip_bound": 1.0}
    for _ in range(2):
        dual_lora_linear(**given)  # type: ignore[arg-type]
    with pytest.raises((TypeError, ValueError), match=message):
        dual_lora_linear(**(given | change))  # type: ignore[arg-type]


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=str)
@pytest.mark.parametrize("workspace", [1 << 16, 1 << 25])
def test_products_in_fp32_where_there_are_no_units(
    backend: str, dtype: torch.dtype, workspace: int, error_ratios: ErrorRatios, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A processor without 16-bit units, whatever this one has."""
    monkeypatch.setattr(products, "_has_units", lambda _: False)
    monkeypatch.setattr(functional, "_checked", {})
    caches = products.product_dtype, products.token_product_dtype
    for cached in caches:
        cached.cache_clear()
    try:
        with settings(workspace_bytes=workspace):
            for seed in range(3):
                problem = gaussian(90, 130, 170, 4, 4, dtype=dtype, factor_dtype=dtype, seed=seed)
                truth = autograd_gradients(problem.to(torch.float64))
                computed = _run(problem, backend=backend), naive_gradients(problem), truth
                for name, own, naive, true in zip(("output", *NAMES), *computed, strict=True):
                    error_ratios.add(name, own, naive, true)
    finally:
        for cached in caches:
            cached.cache_clear()
    error_ratios.check()


# ---- threads of the package's own


@pytest.fixture
def two_threads() -> object:
    before = torch.get_num_threads()
    torch.set_num_threads(2)
    yield
    torch.set_num_threads(before)


@pytest.mark.parametrize("first", [0, 1, 255, 256])
@pytest.mark.parametrize("lines", [1, 255, 256, 257, 5000])
@pytest.mark.parametrize("most", [1, 2, 3, 64])
def test_shares_cover_all_lines_in_whole_units(lines: int, most: int, first: int) -> None:
    shares = workers.shares(lines, 256, most, first % 256)
    assert 1 <= len(shares) <= most
    assert (shares[0][0], shares[-1][1]) == (0, lines)
    for (_, stop), (start, _) in pairwise(shares):
        assert stop == start
        assert (start + first) % 256 == 0


@pytest.mark.usefixtures("two_threads")
def test_workers_run_on_one_thread_and_leave_pytorchs_number_alone() -> None:
    inside: list[tuple[int, bool, bool]] = []

    def work() -> None:
        inside.append((torch.get_num_threads(), torch.is_grad_enabled(), torch.is_inference_mode_enabled()))
        workers.run([lambda: inside.append((0, False, False))], torch.device("cpu"))  # within a worker: at once

    with torch.inference_mode():
        workers.run([work, work], torch.device("cpu"))
    assert sorted(inside) == [(0, False, False)] * 2 + [(1, False, True)] * 2
    assert torch.get_num_threads() == 2
    workers.run([work], torch.device("cpu"))
    assert inside[-2] == (1, False, False)


@pytest.mark.usefixtures("two_threads")
def test_an_exception_of_a_worker_is_raised_when_all_have_ended() -> None:
    ended: list[int] = []

    def fail() -> None:
        raise ValueError("planted")

    with pytest.raises(ValueError, match="planted"):
        workers.run([fail, lambda: ended.append(1)], torch.device("cpu"))
    assert ended == [1]


@pytest.mark.usefixtures("two_threads")
def test_other_threads_counts_are_as_they_were() -> None:
    """PyTorch keeps the last number that was set, for threads to come: new workers must not take each other's 1."""
    seen: list[int] = []
    for _ in range(30):
        workers._pool = None
        workers.run([lambda: None] * 2, torch.device("cpu"))
        thread = threading.Thread(target=lambda: seen.append(torch.get_num_threads()))
        thread.start()
        thread.join()
    assert seen == [2] * 30
