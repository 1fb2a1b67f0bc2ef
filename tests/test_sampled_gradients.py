"""Gradients from a sample of columns: exact where arithmetic is, unbiased, and nothing else of the layer changes."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from benchmarks.layers.memory import peak_temporary_bytes
from dual_lora_kernels import (
    draw_columns,
    dual_lora_linear,
    reference,
    settings,
    strategy,
)
from dual_lora_kernels.backends.grid import TILE, Part, RankProducts, drawn_groups, spans
from dual_lora_kernels.column_sampling import Sample, choose
from dual_lora_kernels.self_check.problems import FUSED_RANK, Problem, exact, gaussian, naive_gradients
from dual_lora_kernels.validation import STRAIGHT_THROUGH_ESTIMATORS

from .accuracy import ErrorRatios
from .bits import bits
from .conftest import IS_INTERPRETED

FACTORS = "ABCD"
BOUND = 0.05
"""Of clipping: most entries reach it."""


def _draws(problem: Problem, fraction: float, seed: int = 0) -> torch.Tensor:
    generator = torch.Generator().manual_seed(seed)
    return draw_columns(problem.x.shape[1], fraction, generator=generator).to(problem.x.device)


def _run(problem: Problem, draws: torch.Tensor | None, **options: Any) -> list[torch.Tensor]:
    """Output, ∂X and the factors' gradients."""
    leaf = problem.requiring_grad()
    out = dual_lora_linear(leaf.x, problem.weight, *leaf.factors, problem.bias, draws=draws, **options)
    return [out.detach(), *torch.autograd.grad(out, (leaf.x, *leaf.factors[:4]), problem.grad)]


def _specified(problem: Problem, sample: Sample, **options: Any) -> list[torch.Tensor]:
    """∂A, ∂B, ∂C, ∂D of the specification from a sample."""
    columns, weights = sample
    weights = torch.zeros(problem.x.shape[1], dtype=torch.float64, device=problem.x.device).index_add_(
        0, columns, weights.double()
    )
    found = reference.linear_gradients(
        problem.grad, problem.x, problem.weight, *problem.factors, weights=weights, **options
    )
    return [getattr(found, name) for name in FACTORS]


@pytest.mark.parametrize("ste", STRAIGHT_THROUGH_ESTIMATORS)
@given(
    m=st.integers(0, 9),
    n=st.integers(1, 40),
    k=st.integers(1, 60),
    ranks=st.tuples(st.integers(1, 16), st.integers(1, 16)),
    fraction=st.floats(0.02, 1.0),
    seed=st.integers(0, 1000),
)
def test_against_the_specification_in_fp64(
    device: torch.device, backend: str, ste: str, m: int, n: int, k: int, ranks: tuple[int, int], fraction: float,
    seed: int,
) -> None:  # fmt: skip
    problem = gaussian(m, n, k, *ranks, dtype=torch.float64, device=device, seed=seed)
    draws = _draws(problem, fraction, seed)
    truth = _specified(problem, choose(problem.x, draws), ste=ste)
    _, _, *computed = _run(problem, draws, ste=ste, backend=backend)
    for name, value, expected in zip(FACTORS, computed, truth, strict=True):
        torch.testing.assert_close(value, expected, rtol=1e-9, atol=1e-10, msg=name)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16], ids=str)
def test_bits_under_exact_arithmetic(device: torch.device, backend: str, dtype: torch.dtype) -> None:
    problem = exact(5, 70, 256, 3, 7, dtype=dtype, device=device)
    problem.x.fill_(1.0)  # equal norms: every weight is 2, a power of two
    draws = _draws(problem, 0.5)
    sample = choose(problem.x, draws)
    assert (sample.weights == 2).all()
    truth = _specified(problem.to(torch.float32), sample)
    _, _, *computed = _run(problem, draws, backend=backend)
    for name, value, expected in zip(FACTORS, computed, truth, strict=True):
        assert torch.equal(value, expected), name


@pytest.mark.parametrize("workspace", [1 << 16, 1 << 25])
@pytest.mark.parametrize(
    ("dtype", "factor_dtype"),
    [(torch.float32, None), (torch.bfloat16, torch.float32), (torch.bfloat16, torch.bfloat16), (torch.float16, None)],
    ids=str,
)
def test_errors_against_fp64(
    device: torch.device,
    backend: str,
    dtype: torch.dtype,
    factor_dtype: torch.dtype | None,
    workspace: int,
    error_ratios: ErrorRatios,
) -> None:
    """As large as the naive implementation's own, which computes the sampled columns as a layer of their own."""
    for seed in range(2 if IS_INTERPRETED else 6):
        problem = gaussian(33, 90, 350, 4, 6, dtype=dtype, factor_dtype=factor_dtype, device=device, seed=seed)
        draws = _draws(problem, 0.3, seed)
        sample = choose(problem.x, draws)
        wide = problem.to(torch.float64)
        truth = _specified(wide, sample)
        naive = _naive(problem, sample)
        with settings(workspace_bytes=workspace):
            _, _, *computed = _run(problem, draws, backend=backend)
        for name, value, plain, expected in zip(FACTORS, computed, naive, truth, strict=True):
            error_ratios.add(name, value, plain, expected)
    error_ratios.check()


def _naive(problem: Problem, sample: Sample) -> list[torch.Tensor]:
    """In the layer's dtype throughout: ∂B and ∂D as differences that weights multiply, column by column."""
    columns, weights = sample
    dtype = problem.x.dtype
    A, B, C, D = (factor.to(dtype) for factor in problem.factors[:4])
    p, q = B @ A[:, columns], D @ C[:, columns]
    scaled = (problem.grad.t() @ problem.x[:, columns]) * problem.scale.to(dtype)
    grad_p = scaled * reference.sign(q) * (p > 0) * weights.to(dtype)
    grad_q = (scaled * p.relu()).clamp(-1, 1) * weights.to(dtype)
    return [
        torch.zeros_like(A).index_add_(1, columns, B.t() @ grad_p),
        grad_p @ A[:, columns].t(),
        torch.zeros_like(C).index_add_(1, columns, D.t() @ grad_q),
        grad_q @ C[:, columns].t(),
    ]


def test_the_naive_implementation_is_one() -> None:
    """From all columns it is the one that the package's own tests compare with."""
    problem = gaussian(9, 30, 40, 3, 4)
    everything = Sample(torch.arange(40), torch.ones(40))
    expected = naive_gradients(problem)[3:7]
    for value, plain in zip(_naive(problem, everything), expected, strict=True):
        torch.testing.assert_close(value, plain, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_the_output_stays_exact(device: torch.device, backend: str, dtype: torch.dtype) -> None:
    problem = gaussian(7, 60, 70, 4, 3, dtype=dtype, device=device)
    whole, sampled = (_run(problem, draws, backend=backend) for draws in (None, _draws(problem, 0.25)))
    assert torch.equal(bits(whole[0]), bits(sampled[0]))


def test_an_input_gradient_reads_the_same_weight(device: torch.device, backend: str) -> None:
    """G = I gives ∂X = W. (∂X of another G comes from panels that may be cut otherwise: its sums' order differs.)"""
    problem = gaussian(60, 60, 70, 4, 3, dtype=torch.bfloat16, device=device)
    grad = torch.eye(60, dtype=torch.bfloat16, device=device)
    found = []
    for draws in (None, _draws(problem, 0.25)):
        leaf = problem.requiring_grad()
        out = dual_lora_linear(leaf.x, problem.weight, *leaf.factors, backend=backend, draws=draws)
        found.append(torch.autograd.grad(out, (leaf.x, leaf.A), grad)[0])
    assert torch.equal(bits(found[0]), bits(found[1]))


@pytest.mark.parametrize("ste", STRAIGHT_THROUGH_ESTIMATORS)
def test_the_mean_over_draws_is_the_exact_gradient(ste: str) -> None:
    """With a bound that clips. Entries share their draws, so what varies about 1 has a few dozen degrees of freedom."""
    problem = _uneven()
    truth = _run(problem, None, ste=ste, clip_bound=BOUND)[2:]
    assert all(excess < 1.8 for excess in _excesses(problem, ste, truth))


def test_clipping_after_the_weights_would_be_biased() -> None:
    """So would sums without weights: the test above can fail."""
    problem = _uneven()
    exact_gradients = _run(problem, None, clip_bound=BOUND)[2:]
    as_if_clipped_later = _run(problem, None, clip_bound=BOUND / 3)[2:]  # the bound of entries with a weight of 3
    assert all(excess > 8 for excess in _excesses(problem, "clip", as_if_clipped_later)[2:])
    assert all(excess > 3 for excess in _excesses(problem, "clip", [gradient * 0.8 for gradient in exact_gradients]))


def _uneven() -> Problem:
    problem = gaussian(12, 14, 40, 3, 3)
    problem.x[:, ::9] *= 8
    return problem


def _excesses(problem: Problem, ste: str, truth: list[torch.Tensor], count: int = 600) -> list[float]:
    """For each factor Σ (mean over draws − truth)² over what it is on average where the truth is the mean."""
    found = [_run(problem, _draws(problem, 0.3, seed), ste=ste, clip_bound=BOUND)[2:] for seed in range(count)]
    estimates = [torch.stack(of_one) for of_one in zip(*found, strict=True)]
    return [
        ((own.mean(0) - expected).square().sum() / (own.var(0) / count).sum()).item()
        for own, expected in zip(estimates, truth, strict=True)
    ]


def test_gradients_of_columns_that_were_not_drawn_are_zero(device: torch.device, backend: str) -> None:
    problem = gaussian(9, 30, 300, 4, 3, device=device)
    draws = _draws(problem, 0.1)
    drawn = torch.zeros(300, dtype=torch.bool)
    drawn[choose(problem.x, draws).columns.cpu()] = True
    _, _, A, _, C, _ = _run(problem, draws, backend=backend)
    for gradient in (A.cpu(), C.cpu()):
        assert (gradient[:, ~drawn] == 0).all()
        assert (gradient[:, drawn] != 0).any(0).all()


@pytest.mark.parametrize("col0", [0, 100, 700])
@pytest.mark.parametrize("most", [1, 2, 9])
def test_the_eager_backends_products_of_drawn_columns_have_the_whole_ones_bits(col0: int, most: int) -> None:
    problem = gaussian(1, 300, 900, 16, 24)
    products = RankProducts(problem.factors, (0, col0))
    columns = choose(torch.randn(5, 900), draw_columns(900, 0.4)).columns
    scratch = [torch.empty(10 * TILE * TILE) for _ in range(4)]
    (rows,) = [span for span in spans(0, 300, 1) if span.first == 0]
    whole = [
        torch.cat(parts, 1)
        for parts in zip(
            *(
                [each.squeeze(0).squeeze(0).clone() for each in products.write(Part(rows, span), *scratch[:2])]
                for span in spans(col0, 900, 1)
            ),
            strict=True,
        )
    ]
    for own, tiles, places in drawn_groups(columns, col0, most):
        found = products.write_drawn(Part(rows, tiles), places, *scratch[2:])
        for value, expected in zip(found, whole, strict=True):
            assert torch.equal(value, expected[:, columns[own]])


def test_a_trained_weight_makes_all_of_it_exact(device: torch.device, backend: str) -> None:
    """∂W0 is H itself, so it is there."""
    problem = gaussian(7, 20, 30, 4, 3, device=device)
    found = []
    for draws in (None, _draws(problem, 0.25)):
        leaf = problem.requiring_grad()
        out = dual_lora_linear(leaf.x, leaf.weight, *leaf.factors, leaf.bias, backend=backend, draws=draws)
        found.append(torch.autograd.grad(out, leaf.differentiable, leaf.grad))
    for one, two in zip(*found, strict=True):
        assert torch.equal(one, two)


@pytest.mark.parametrize("wanted", [(0,), (1,), (2, 3), (0, 3)])
def test_subsets_of_factors(device: torch.device, backend: str, wanted: tuple[int, ...]) -> None:
    problem = gaussian(7, 20, 30, 4, 3, device=device)
    draws = _draws(problem, 0.5)
    whole = _run(problem, draws, backend=backend)[2:]
    factors = [f.clone().requires_grad_(i in wanted) for i, f in enumerate(problem.factors[:4])]
    out = dual_lora_linear(problem.x, problem.weight, *factors, problem.scale, backend=backend, draws=draws)
    for index, value in zip(wanted, torch.autograd.grad(out, [factors[i] for i in wanted], problem.grad), strict=True):
        torch.testing.assert_close(value, whole[index])


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_a_sampled_step_stays_within_the_workspace(device: torch.device, backend: str, dtype: torch.dtype) -> None:
    """Columns of X are gathered a few at a time: all of them would take 3 times the bound."""
    tokens, rows, columns = (128, 128, 256) if IS_INTERPRETED else (2048, 768, 2048)
    workspace = 1 << (15 if IS_INTERPRETED else 22)
    rank = 4 if strategy() == "fused" else FUSED_RANK
    problem = gaussian(tokens, rows, columns, rank, rank, dtype=dtype, device=device)
    leaf = problem.requiring_grad()
    thin = 6 * rank * (rows + columns) * 4  # factors' gradients and what is gathered of factors
    draws = _draws(problem, 0.75)
    assert tokens * columns * dtype.itemsize * 0.75 >= 1.4 * workspace

    def step() -> list[torch.Tensor]:
        out = dual_lora_linear(problem.x, problem.weight, *leaf.factors, backend=backend, draws=draws)
        return [out, *torch.autograd.grad(out, leaf.factors[:4], problem.grad)]

    with settings(workspace_bytes=workspace):
        step()
        trace = peak_temporary_bytes(step, device)
    output, norms = tokens * rows * dtype.itemsize, min(tokens * columns, 1 << 20) * 4
    assert trace.largest <= max(workspace, output, norms)
    assert trace.peak_temporary <= workspace + 2 * norms + thin


@pytest.mark.parametrize(
    ("draws", "message"),
    [
        (torch.zeros(3), r"draws.dtype: got torch.float32, expected torch.int64"),
        (torch.zeros(3, dtype=torch.int32), "draws.dtype: got torch.int32"),
        (torch.zeros(0, dtype=torch.int64), r"draws: got shape \(0,\)"),
        (torch.zeros(31, dtype=torch.int64), r"n from 1 to in_features = 30"),
        (torch.zeros(2, 2, dtype=torch.int64), r"draws: got shape \(2, 2\)"),
        (torch.zeros(3, dtype=torch.int64, device="meta"), "draws.device: got meta"),
        ([1, 2], r"draws: got \[1, 2\]"),
    ],
)
def test_bad_draws(draws: Any, message: str) -> None:
    problem = gaussian(2, 20, 30, 4, 3)
    with pytest.raises((TypeError, ValueError), match=message):
        dual_lora_linear(problem.x, problem.weight, *problem.factors, draws=draws)
